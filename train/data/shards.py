"""Parquet shards: which files of a folder they are, their order, which validate, their text."""

import hashlib
import os
import re
import stat

import pyarrow as pa
import pyarrow.parquet as pq

from nanofuse.train.errors import UserError
from nanofuse.train.files import portable

SPLITS = ("train", "val")
SPLIT_NAMES = {"train": "training", "val": "validation"}
SUFFIX = ".parquet"
MAGIC, ENCRYPTED_MAGIC = b"PAR1", b"PARE"
HINT = "copy it anew from where it came, or name another --data"
TEXT_HINT = "name one as --data; docs/quickstart.md says how to make one"
VIEWED = 5  # names listed in a message


def first_line(error):
    """First line of an error's message, or its type's name."""
    return (str(error) or type(error).__name__).splitlines()[0]


def listed(names):
    """Names for a message, the first ones of many."""
    names = list(names)
    more = f" and {len(names) - VIEWED} more" if len(names) > VIEWED else ""
    return ", ".join(names[:VIEWED]) + more


def damaged(what, error, hint=HINT):
    """The UserError for a shard, or a part of it, that pyarrow does not read.

    Raises:
        MemoryError: there is no memory for it.
    """
    if isinstance(error, MemoryError):
        raise error
    if "decrypt" in str(error).lower():
        return UserError(f"{what} is encrypted; name another --data")
    return UserError(f"{what} is damaged ({first_line(error)}); {hint}")


def without_text(corpus, split):
    """The UserError for data of which no document of a split holds text."""
    found = f"{corpus.name}: no {SPLIT_NAMES[split]} document holds text; name another "
    if split == "val" and (names := getattr(corpus, "val_shards", [])):
        return UserError(f"{found}--val-shard than {listed(names)}, --data or --text-column")
    return UserError(f"{found}--data or --text-column")


def natural_key(name):
    """Sort key in which numbers count as such: shard_2 before shard_10."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def find_shards(directory):
    """Paths of a folder's `*.parquet` entries in natural order, dot files left out.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        names = [name for name in os.listdir(directory) if name.endswith(SUFFIX)]
    except OSError as error:
        raise UserError(
            f"data directory {directory} cannot be read ({error.strerror}); name another --data"
        ) from None
    names = [name for name in names if not name.startswith(".")]
    return [directory / name for name in sorted(names, key=natural_key)]


def choose_validation(names, val_shard, directory):
    """Which shards validate and which are left out of training and validation.

    `val_shard` if it is given. Otherwise `val*`, or `test*` where no `val*` is; a `test*` beside a
    `val*` is left out. Otherwise the last one.

    Args:
        names: file names in order.
        val_shard: a file name, with or without its suffix; '' for none.

    Returns:
        (names that validate, names left out, whether that is by their names)

    Raises:
        UserError: val_shard is none of them.
    """
    if val_shard:
        for name in names:
            if val_shard in (name, name.removesuffix(SUFFIX)):
                return [name], [], False
        raise UserError(f"--val-shard {val_shard}: {directory} has {listed(names)}")
    val, test = ([n for n in names if n.casefold().startswith(word)] for word in ("val", "test"))
    if (val or test) and len(val) + len(test) < len(names):
        return (val, test, True) if val else (test, [], True)
    return names[-1:], [], False


def is_text(kind):
    """Whether an Arrow type holds text, or bytes that may be text, or nothing but nulls."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = (
        "string",
        "large_string",
        "string_view",
        "binary",
        "large_binary",
        "binary_view",
        "null",
    )
    return any(getattr(pa.types, f"is_{test}")(kind) for test in tests)


def footer_of(path):
    """SHA-256 of a parquet file's footer, hexadecimal. It has places, sizes and statistics of all
    pages: other text has another one, but for what takes as many bytes and has no statistics.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 8, 0))  # its length, little-endian, and MAGIC
        length = min(int.from_bytes(file.read(4), "little"), size - 8)
        file.seek(size - 8 - length)
        return hashlib.sha256(file.read(length)).hexdigest()


def signature(path):
    """(bytes, times of change in ns, inode): another one where the file was written or replaced.

    Raises:
        OSError: it is not there.
    """
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def open_shard(path, column, buffer_size=0):
    """The ParquetFile of a shard whose text column can be read; pages' checksums are verified.

    Args:
        buffer_size: bytes of a column to read at a time; 0: those of a row group.

    Raises:
        UserError: what is wrong with it, with its name.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise UserError(f"shard {path} is a folder; move it away, or name another --data")
        if not stat.S_ISREG(mode):
            raise UserError(f"shard {path} is not a regular file; name another --data")
        with open(path, "rb") as file:
            head = file.read(len(MAGIC))
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - len(MAGIC), 0))
            tail = file.read(len(MAGIC))
    except FileNotFoundError:
        what = "is a link to a file that does not exist" if path.is_symlink() else "is gone"
        raise UserError(f"shard {path} {what}; {HINT}") from None
    except PermissionError:
        way_out = "give yourself the right to read it, or name another --data"
        raise UserError(f"shard {path} cannot be read (Permission denied); {way_out}") from None
    except OSError as error:
        raise UserError(f"shard {path} cannot be read ({error.strerror}); {HINT}") from None
    if not size:
        raise UserError(f"shard {path} is empty (0 bytes); {HINT}")
    if head == ENCRYPTED_MAGIC:
        raise UserError(f"shard {path} is encrypted; name another --data")
    if head != MAGIC:
        way_out = HINT if path.name.endswith(SUFFIX) else TEXT_HINT
        raise UserError(f"shard {path} is not a parquet file (it begins with {head!r}); {way_out}")
    if tail != MAGIC or size < 3 * len(MAGIC):
        raise UserError(f"shard {path} is truncated or damaged (its end is missing); {HINT}")
    name = portable(str(path))  # pyarrow takes it in UTF-8 whatever the locale
    if name.encode() != os.fsencode(path):
        raise UserError(f"shard {path}: its name is not UTF-8; rename the file or its folder")
    try:
        file = pq.ParquetFile(name, page_checksum_verification=True, buffer_size=buffer_size)
        fields = file.schema_arrow
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(f"shard {path}", error) from None
    check_column(path, fields, column)
    return file


def check_column(path, fields, column):
    """Refuse an Arrow schema whose text column is missing, doubled or no text.

    Raises:
        UserError: with the file's name.
    """
    count = fields.names.count(column)
    if not count:
        columns = listed(fields.names) or "none"
        raise UserError(
            f"shard {path} has no column {column!r} (its columns: {columns}); name the one that "
            "holds the text with --text-column"
        )
    if count > 1:
        raise UserError(
            f"shard {path} has more than one column {column!r} ({count} of them); name another "
            "with --text-column, or rename them"
        )
    kind = fields.field(column).type
    if not is_text(kind):
        raise UserError(
            f"column {column!r} of shard {path} is of type {kind}, not text; name another with "
            "--text-column"
        )


def decode_texts(column):
    """Texts of an Arrow column of a type that `is_text` accepts.

    Returns:
        (list of str or None, indices of texts with bytes that are not UTF-8, now U+FFFD)
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:  # a writer that did not check
        values = column.cast(pa.large_binary()).to_pylist()
    texts, replaced = values, []
    if any(isinstance(value, bytes) for value in values):
        texts = []
        for index, value in enumerate(values):
            try:
                texts.append(None if value is None else value.decode())
            except UnicodeDecodeError:
                texts.append(value.decode(errors="replace"))
                replaced.append(index)
    return texts, replaced
