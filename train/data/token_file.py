"""The file that keeps a shard's tokens: written and read row group by row group.

An Arrow IPC file: a record batch per row group with one column of token lists, a list per row, and
the CRC-32 of its bytes. It says in its schema what it belongs to, and may hold the first row groups
only. It is read, not mapped: where a disk fails, or the file is cut short in place, a read raises
an error, and a mapped page would end the process by SIGBUS.
"""

import contextlib
import errno
import hashlib
import os
import platform
import secrets
import shutil
import zlib
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from nanofuse.train.data.shards import signature
from nanofuse.train.files import portable, sync

COLUMN, CHECKSUM = "tokens", "crc32"
PARTIAL = "-partial"  # ends the name of a file that is being written
MAX_TOKENS = 2**31 - 1  # of a row group: offsets in the file have 32 bits
RESERVE_BYTES = 2 << 30  # of the disk stay free, for checkpoints


class TokenGroup(NamedTuple):
    """Tokens of a row group; row i is tokens[offsets[i] : offsets[i + 1]], `<|bos|>` first.

    A null row has no token, an empty one `<|bos|>` alone.
    """

    tokens: np.ndarray  # (n,) uint16 or uint32
    offsets: np.ndarray  # (rows + 1,) int64


def checksum(tokens, offsets):
    """CRC-32 of a row group's tokens and its int32 offsets, as text."""
    return str(zlib.crc32(offsets, zlib.crc32(tokens)))


def host():
    """Eight hexadecimal digits for what numbers this process: machine and container."""
    name = platform.node()
    with contextlib.suppress(OSError):  # Linux only
        name += os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(name.encode()).hexdigest()[:8]


class CachedShard:
    """The cached row groups of a shard.

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
        self.file = pa.OSFile(portable(str(path)), "rb")
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
        """A row group's TokenGroup, in memory of its own.

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
        """Tokens that are there, whose checksums are not looked at: only metadata is read, of the
        file as it is mapped.

        Raises:
            ValueError: the file is damaged, and was removed.
        """
        try:
            with pa.memory_map(portable(str(self.path))) as file:
                batches = map(pa.ipc.open_file(file).get_batch, range(self.num_groups))
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
        shard: path of the shard.
        expected: its signature, which it must keep.
        size: bytes that the cache may take, about.

    Attributes:
        num_groups: row groups appended so far.

    Raises:
        OSError: as TokenCache.writer.
    """

    def __init__(self, target, facts, shard, expected, size):
        self.target, self.facts, self.shard, self.signature = target, facts, shard, expected
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
