"""Tokens of shards, kept on disk: a shard is tokenised once.

A shard's cache belongs to the exact content of the shard, the tokenizer and the text column, and
may end before the shard does: then its first row groups are there. train.data.token_file has the
format. Files appear and go whole.
"""

import contextlib
import errno
import hashlib
import os
import re
import time
from pathlib import Path

from nanofuse.train.data.shards import signature
from nanofuse.train.data.token_file import PARTIAL, CachedShard, CacheWriter, host
from nanofuse.train.errors import UserError
from nanofuse.train.files import sha256_of

FORMAT = "nanofuse-tokens-1"
FOLDER = ".tokens"
SUFFIX = ".arrow"
BYTES_A_SHARD_BYTE = 1.25  # of a cache of 16 bits, about, for text in zstd
LEFTOVER_SECONDS = 24 * 3600  # after which nobody writes a partial file any more

_contents = {}  # path, signature -> SHA-256


def content_of(path):
    """SHA-256 of a shard, hexadecimal; computed once while the file stays as it is."""
    key = str(path), signature(path)
    if key not in _contents:
        content = sha256_of(path)
        if signature(path) != key[1]:
            raise OSError(errno.EAGAIN, "is being written", str(path))
        _contents[key] = content
    return _contents[key]


def remove_leftovers(folder):
    """Remove the partial files of writers that were killed."""
    for path in folder.glob(f".*{PARTIAL}"):
        found = re.search(rf"\.([0-9a-f]{{8}})-(\d+)-[0-9a-f]{{8}}{PARTIAL}$", path.name)
        if not found:
            continue
        with contextlib.suppress(OSError):
            left = time.time() - path.stat().st_mtime > LEFTOVER_SECONDS
            if found[1] == host() and os.name == "posix":
                try:
                    os.kill(int(found[2]), 0)
                except (ProcessLookupError, OverflowError):
                    left = True
                except PermissionError:  # it runs, and is somebody else's
                    pass
            if left:
                path.unlink()


def open_cache(corpus, tokenizer, folder=""):
    """The TokenCache that --cache asks for: in a folder, by default beside the shards; None for
    "off" or a corpus without shards.

    Raises:
        UserError: `~` stands for no folder that the system knows, or the name is a file's.
    """
    if folder == "off" or corpus.shard_path(0) is None:
        return None
    try:
        directory = Path(folder).expanduser() if folder else None
    except RuntimeError:
        raise UserError(f"--cache {folder}: no home folder is known for it") from None
    if directory and os.path.exists(directory) and not os.path.isdir(directory):
        raise UserError(f"--cache {folder} is not a folder; name one, or drop the flag")
    return TokenCache(corpus, tokenizer, directory)


class TokenCache:
    """The cache of a corpus's shards for one tokenizer.

    Args:
        corpus: train.data.corpus.ParquetCorpus or StdlibCorpus, which has no shards to cache.
        tokenizer: train.data.tokenizer.Tokenizer.
        directory: folder that holds one folder per data folder; None: `.tokens` beside the shards.

    Attributes:
        keeps: whether a stream still writes into it; False once one could not.
    """

    def __init__(self, corpus, tokenizer, directory=None):
        self.corpus, self.dtype = corpus, tokenizer.dtype
        self.tokenizer = tokenizer.fingerprint
        self.directory = None if directory is None else Path(directory)
        self.keeps = True

    def where(self, shard):
        """The folder that a shard's cache is in."""
        data = self.corpus.shard_path(shard).parent
        if self.directory is None:
            return data / FOLDER
        data = data.resolve()
        return self.directory / f"{data.name}-{hashlib.sha256(os.fsencode(data)).hexdigest()[:8]}"

    def _facts(self, shard):
        """What a shard's cache belongs to: {name: text}."""
        return {
            "format": FORMAT,
            "content": content_of(self.corpus.shard_path(shard)),
            "tokenizer": self.tokenizer,
            "column": self.corpus.text_column,
            "row_groups": str(self.corpus.num_groups(shard)),
            "dtype": self.dtype.name,
        }

    def _files(self, shard):
        """Caches of a shard, of whatever content and tokenizer: {path: digits of its content}."""
        folder, name = self.where(shard), self.corpus.shard_path(shard).name
        pattern = re.compile(
            rf"{re.escape(name)}\.([0-9a-f]{{16}})[0-9a-f]{{16}}{re.escape(SUFFIX)}"
        )
        found = {n: pattern.fullmatch(n) for n in os.listdir(folder)}
        return {folder / n: match[1] for n, match in found.items() if match}

    def _file(self, shard, facts):
        """Path of a shard's cache."""
        rest = hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()
        name = f"{self.corpus.shard_path(shard).name}.{facts['content'][:16]}{rest[:16]}{SUFFIX}"
        return self.where(shard) / name

    def _remove_stale(self, shard, facts):
        """Remove caches of a content that the shard no longer has."""
        for path, content in self._files(shard).items():
            if content != facts["content"][:16]:
                with contextlib.suppress(OSError):
                    path.unlink()

    def open(self, shard):
        """The shard's CachedShard, or None where there is nothing that can be used."""
        if self.corpus.shard_path(shard) is None:
            return None
        try:
            if not self._files(shard):
                return None
            size, *_ = signature(self.corpus.shard_path(shard))
            if size != self.corpus.signatures[shard][0]:
                return None  # another shard, of which the corpus knows nothing
            facts = self._facts(shard)
            self._remove_stale(shard, facts)
            return CachedShard(self._file(shard, facts), facts)
        except (OSError, ValueError):
            return None

    def writer(self, shard):
        """A CacheWriter of the shard, at its first row group.

        Raises:
            OSError: the folder cannot be written to, too little of its disk is free (ENOSPC), or
                the shard is another than when the corpus was opened.
        """
        path, expected = self.corpus.shard_path(shard), self.corpus.signatures[shard]
        facts = self._facts(shard)
        if signature(path) != expected:
            raise OSError(errno.ESTALE, "has changed since the start", str(path))
        folder = self.where(shard)
        os.makedirs(folder, exist_ok=True)
        remove_leftovers(folder)
        self._remove_stale(shard, facts)
        target = self._file(shard, facts)
        size = int(BYTES_A_SHARD_BYTE * expected[0] * self.dtype.itemsize / 2)
        return CacheWriter(target, facts, path, expected, size)
