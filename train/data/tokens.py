"""Tokens of shards, kept on disk: a shard is tokenised once.

A shard's cache is an Arrow IPC file: a record batch per row group with one column of token lists,
a list per row, and the CRC-32 of its bytes. It belongs to the exact content of the shard, the
tokenizer and the text column, and may end before the shard does: then its first row groups are
there. Files are read through a memory map; they appear and go whole.
"""

import contextlib
import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from nanofuse.train.data.shards import signature
from nanofuse.train.files import portable, sha256_of, sync

FORMAT = "nanofuse-tokens-1"
FOLDER = ".tokens"
COLUMN, CHECKSUM = "tokens", "crc32"
SUFFIX, PARTIAL = ".arrow", "-partial"
MAX_TOKENS = 2**31 - 1  # of a row group: offsets in the file have 32 bits
RESERVE_BYTES = 2 << 30  # of the disk stay free, for checkpoints
BYTES_A_SHARD_BYTE = 1.25  # of a cache of 16 bits, about, for text in zstd
LEFTOVER_SECONDS = 24 * 3600  # after which nobody writes a partial file any more

_contents = {}  # path, signature -> SHA-256


class TokenGroup(NamedTuple):
    """Tokens of a row group; row i is tokens[offsets[i] : offsets[i + 1]], `<|bos|>` first.

    A null row has no token, an empty one `<|bos|>` alone.
    """

    tokens: np.ndarray  # (n,) uint16 or uint32
    offsets: np.ndarray  # (rows + 1,) int64


def content_of(path):
    """SHA-256 of a shard, hexadecimal; computed once while the file stays as it is."""
    key = str(path), signature(path)
    if key not in _contents:
        content = sha256_of(path)
        if signature(path) != key[1]:
            raise OSError(errno.EAGAIN, "is being written", str(path))
        _contents[key] = content
    return _contents[key]


def checksum(tokens, offsets):
    """CRC-32 of a row group's tokens and its int32 offsets, as text."""
    return str(zlib.crc32(offsets, zlib.crc32(tokens)))


def host():
    """Eight hexadecimal digits for what numbers this process: machine and container."""
    name = platform.node()
    with contextlib.suppress(OSError):  # Linux only
        name += os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(name.encode()).hexdigest()[:8]


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
    "off" or a corpus without shards."""
    if folder == "off" or corpus.shard_path(0) is None:
        return None
    return TokenCache(corpus, tokenizer, folder or None)


class TokenCache:
    """The cache of a corpus's shards for one tokenizer.

    Args:
        corpus: train.data.corpus.ParquetCorpus or StdlibCorpus, which has no shards to cache.
        tokenizer: train.data.tokenizer.Tokenizer.
        directory: folder that holds one folder per data folder; None: `.tokens` beside the shards.
    """

    def __init__(self, corpus, tokenizer, directory=None):
        self.corpus, self.dtype = corpus, tokenizer.dtype
        self.tokenizer = tokenizer.fingerprint
        self.directory = None if directory is None else Path(directory)

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
        pattern = re.compile(rf"{re.escape(name)}\.([0-9a-f]{{16}})[0-9a-f]{{16}}\.arrow")
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
        path = self.corpus.shard_path(shard)
        facts = self._facts(shard)
        if signature(path) != self.corpus.signatures[shard]:
            raise OSError(errno.ESTALE, "has changed since the start", str(path))
        folder = self.where(shard)
        os.makedirs(folder, exist_ok=True)
        remove_leftovers(folder)
        self._remove_stale(shard, facts)
        target = self._file(shard, facts)
        size = int(BYTES_A_SHARD_BYTE * path.stat().st_size * self.dtype.itemsize / 2)
        return CacheWriter(target, facts, path, size)


class CachedShard:
    """The cached row groups of a shard, of a file that is mapped.

    Args:
        path: the file.
        facts: what it must belong to.

    Attributes:
        num_groups: row groups that are there, the shard's first ones.
        complete: whether these are all.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is damaged, and was removed.
    """

    def __init__(self, path, facts):
        self.path, self.checked = path, set()
        self.file = pa.memory_map(portable(str(path)))
        self.inode = os.stat(path).st_ino
        try:
            self.reader = pa.ipc.open_file(self.file)
            kind = pa.list_(pa.from_numpy_dtype(facts["dtype"]))
            fields, metadata = self.reader.schema, self.reader.schema.metadata or {}
            self.num_groups, total = self.reader.num_record_batches, int(facts["row_groups"])
            whole = fields.names == [COLUMN] and fields.field(0).type == kind
            same = all(metadata.get(k.encode()) == v.encode() for k, v in facts.items())
            if not (whole and same and 0 < self.num_groups <= total):
                raise ValueError("its schema is another")
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._damaged(error) from None
        self.complete = self.num_groups == total

    def _damaged(self, error):
        """Remove the file, unless another has taken its place; returns the error to raise."""
        self.close()
        with contextlib.suppress(OSError):
            if os.stat(self.path).st_ino == self.inode:
                self.path.unlink()
        return ValueError(f"{self.path} is damaged ({error})")

    def group(self, index):
        """A row group's TokenGroup; its tokens lie in the mapped file, and stay there after close.

        Raises:
            ValueError: it is damaged; the file was removed.
        """
        try:
            batch, metadata = self.reader.get_batch_with_custom_metadata(index)
            batch.validate()
            column = batch.column(0)
            tokens, offsets = column.values.to_numpy(), column.offsets.to_numpy()
            if index not in self.checked:
                if (metadata or {}).get(CHECKSUM.encode()) != checksum(tokens, offsets).encode():
                    raise ValueError(f"row group {index} has another checksum")
                self.checked.add(index)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._damaged(error) from None
        return TokenGroup(tokens, offsets.astype(np.int64))

    def num_tokens(self):
        """Tokens that are there, whose checksums are not looked at.

        Raises:
            ValueError: the file is damaged, and was removed.
        """
        try:
            batches = map(self.reader.get_batch, range(self.num_groups))
            return sum(len(batch.column(0).values) for batch in batches)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._damaged(error) from None

    def close(self):
        self.file.close()


class CacheWriter:
    """Writes a shard's cache, row group by row group, into a file that appears when it is closed.

    Args:
        target: the cache's path.
        facts: what it belongs to.
        shard: path of the shard, which must stay as it is.
        size: bytes that the cache may take, about.

    Attributes:
        num_groups: row groups appended so far.

    Raises:
        OSError: as TokenCache.writer.
    """

    def __init__(self, target, facts, shard, size):
        self.target, self.facts, self.shard = target, facts, shard
        self.signature = signature(shard)
        self.num_groups, self.failed = 0, False
        self.dtype = np.dtype(facts["dtype"])
        self._check_space(size)
        unique = f"{host()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.path = target.with_name(f".{target.name}.{unique}{PARTIAL}")
        kind = pa.list_(pa.from_numpy_dtype(self.dtype))
        self.schema = pa.schema([(COLUMN, kind)], facts)
        try:
            with self._naming():
                self.file = pa.OSFile(portable(str(self.path)), "wb")
                self.writer = pa.ipc.new_file(self.file, self.schema)
        except OSError:
            self.path.unlink(missing_ok=True)
            raise

    @contextlib.contextmanager
    def _naming(self):
        """Give Arrow's errors of the system the system's words, and the file's name."""
        try:
            yield
        except OSError as error:
            if not error.errno or error.filename:
                raise
            raise OSError(error.errno, os.strerror(error.errno), str(self.target)) from None

    def _check_space(self, size):
        """Refuse to take what the disk must keep free."""
        if shutil.disk_usage(self.target.parent).free - size < RESERVE_BYTES:
            text = f"less than {RESERVE_BYTES / 2**30:.0f} GiB of its disk would stay free"
            raise OSError(errno.ENOSPC, text, str(self.target.parent))

    def append(self, group):
        """Write the next row group.

        Args:
            group: TokenGroup in the tokenizer's dtype.

        Raises:
            OSError: it cannot be written; the disk is full, or too little of it would stay free.
        """
        tokens, offsets = group
        if len(tokens) > MAX_TOKENS:
            raise OSError(errno.EFBIG, f"{len(tokens):,} tokens in a row group", str(self.target))
        self._check_space(tokens.nbytes + offsets.nbytes)
        offsets = offsets.astype(np.int32)
        tokens = np.ascontiguousarray(tokens, self.dtype)
        lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens))
        batch = pa.record_batch([lists], schema=self.schema)
        self.failed = True  # until it is written whole
        with self._naming():
            self.writer.write_batch(batch, {CHECKSUM: checksum(tokens, offsets)})
        self.failed = False
        self.num_groups += 1

    def copy_from(self, cached):
        """Append all row groups of a CachedShard.

        Raises:
            OSError: as append.
            ValueError: one is damaged; those before it are there.
        """
        for index in range(cached.num_groups):
            self.append(cached.group(index))

    def close(self, keep=True):
        """End the file, and put it in its place if it holds more row groups than the one there.

        Args:
            keep: False drops what was written.

        Returns:
            whether it is in its place.

        Raises:
            OSError: it cannot be written.
        """
        if self.file.closed:
            return False
        try:
            keep = keep and not self.failed and self._is_longer()
            if keep:
                with self._naming():
                    self.writer.close()
                    self.file.close()
                _fsync(self.path)
                keep = signature(self.shard) == self.signature
            if keep:
                os.replace(self.path, self.target)
                sync(self.target.parent)
            return keep
        finally:
            with contextlib.suppress(OSError):
                self.file.close()
            self.path.unlink(missing_ok=True)

    def _is_longer(self):
        try:
            there = CachedShard(self.target, self.facts)
        except (OSError, ValueError):
            return self.num_groups > 0
        there.close()
        return self.num_groups > there.num_groups


def _fsync(path):
    """Have the system write a file out.

    Raises:
        OSError: it cannot.
    """
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
