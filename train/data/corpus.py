"""Text to train on: a folder of parquet shards, or the running Python's standard library.

A corpus gives its documents in numbered units per split: `num_units(split)` and
`read(split, unit)` -> list of str. Units and their order never change between runs.
"""

import hashlib
import os
import re
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanofuse.train.errors import UserError

DATA_ENV = "NANOFUSE_DIR"
DEFAULT_DIR = Path("~/.cache/nanofuse")
STDLIB = "stdlib"
TEXT_COLUMN = "text"
SPLITS = ("train", "val")


class ParquetCorpus:
    """A folder of `*.parquet` shards with a text column; the last shard in name order validates.

    A unit is one row group. Footers of all shards are read at once, so that a truncated one is
    found before training.

    Raises:
        UserError: missing folder, fewer than two shards, a shard that is truncated or has no
            text column, no documents to train on or to validate.
    """

    def __init__(self, directory):
        self.directory = Path(directory).expanduser()
        hint = "fetch some with python -m train.data download -n 8, or name another --data"
        if not self.directory.is_dir():
            raise UserError(f"data directory {self.directory} does not exist; {hint}")
        self.shards = sorted(self.directory.glob("*.parquet"))
        if len(self.shards) < 2:
            raise UserError(
                f"data directory {self.directory} holds {len(self.shards)} parquet shards, "
                f"at least 2 are needed (the last one validates); {hint}"
            )
        self.documents = []  # per shard
        self.units = {split: [] for split in SPLITS}  # (shard index, row group)
        for index, path in enumerate(self.shards):
            metadata = self._open(path).metadata
            self.documents.append(metadata.num_rows)
            split = "val" if index == len(self.shards) - 1 else "train"
            self.units[split] += [(index, group) for group in range(metadata.num_row_groups)]
        for split, units in self.units.items():
            if not units:
                raise UserError(
                    f"data directory {self.directory}: {split} shards are empty; {hint}"
                )

    @staticmethod
    def _open(path):
        hint = "delete it and fetch it again"
        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"shard {path} is truncated or damaged ({reason}); {hint}") from None
        if TEXT_COLUMN not in file.schema_arrow.names:
            raise UserError(f"shard {path} has no column {TEXT_COLUMN!r}; {hint}")
        return file

    @property
    def name(self):
        return f"{len(self.shards)} parquet shards in {self.directory}"

    @property
    def fingerprint(self):
        """Changes when shards are added, removed or replaced by others of another size."""
        facts = [(path.name, path.stat().st_size) for path in self.shards]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def num_units(self, split):
        return len(self.units[split])

    def describe(self, split, unit):
        """Where a unit lies, for people: {"shard": name, "row_group": n}."""
        index, group = self.units[split][unit]
        return {"shard": self.shards[index].name, "row_group": group}

    def read(self, split, unit):
        """Documents of one row group.

        Raises:
            UserError: the row group cannot be read.
        """
        index, group = self.units[split][unit]
        path = self.shards[index]
        try:
            table = self._open(path).read_row_group(group, columns=[TEXT_COLUMN])
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"row group {group} of shard {path} is damaged ({reason}); "
                "delete the shard and fetch it again"
            ) from None
        return [text for text in table.column(TEXT_COLUMN).to_pylist() if text]


class StdlibCorpus:
    """Source and documentation files of the running Python's standard library, tests excluded.

    Files come in the order of their paths' hashes, the first 2 % validate. A unit is 16 files. A
    document is a run of paragraphs of one file, about 1,000 characters long: packing crops what
    does not fit a row, and whole files would lose most of their text in short rows.
    """

    SUFFIXES = (".py", ".txt", ".rst", ".md")
    EXCLUDED = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")
    VAL_FRACTION = 0.02
    UNIT_FILES = 16
    DOCUMENT_CHARS = 1000

    directory = None

    def __init__(self):
        root = Path(sysconfig.get_path("stdlib"))
        files = []
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in self.EXCLUDED]
            files += [Path(folder, name) for name in names if name.endswith(self.SUFFIXES)]
        files.sort(key=lambda p: hashlib.sha256(p.relative_to(root).as_posix().encode()).digest())
        if len(files) < 2:
            raise UserError(f"no standard library source under {root}; name a --data directory")
        num_val = max(1, round(len(files) * self.VAL_FRACTION))
        self.root = root
        self.files = {"val": files[:num_val], "train": files[num_val:]}

    @property
    def name(self):
        count = sum(len(files) for files in self.files.values())
        return f"{count} files of Python's standard library in {self.root}"

    @property
    def fingerprint(self):
        """Changes with the files' names and sizes."""
        facts = [(p.name, p.stat().st_size) for split in SPLITS for p in self.files[split]]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def num_units(self, split):
        return -(-len(self.files[split]) // self.UNIT_FILES)

    def describe(self, split, unit):
        return {"file": self.files[split][unit * self.UNIT_FILES].name}

    def read(self, split, unit):
        """Documents of one unit; bytes that are not UTF-8 become U+FFFD."""
        files = self.files[split][unit * self.UNIT_FILES : (unit + 1) * self.UNIT_FILES]
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
        return [piece for text in texts for piece in split_text(text, self.DOCUMENT_CHARS)]


def split_text(text, size):
    """Cut a text into pieces of at most `size` characters, at blank lines or else at line ends.

    The pieces joined give the text again; none is empty, and only a single line may be longer.
    """
    units = []
    for paragraph in re.split(r"(?<=\n\n)(?=[^\n])", text):
        units += [paragraph] if len(paragraph) <= size else paragraph.splitlines(keepends=True)
    pieces = []
    for unit in units:
        if pieces and len(pieces[-1]) + len(unit) <= size:
            pieces[-1] += unit
        elif unit:
            pieces.append(unit)
    return pieces


def data_directory(flag=None):
    """The data directory: the flag, or $NANOFUSE_DIR, or ~/.cache/nanofuse."""
    return Path(flag or os.environ.get(DATA_ENV) or DEFAULT_DIR).expanduser()


def open_corpus(flag=None):
    """The corpus that --data, $NANOFUSE_DIR or the default folder names, in that order.

    Where neither names a folder and ~/.cache/nanofuse holds no shard, the standard library
    serves; `--data stdlib` asks for it.

    Raises:
        UserError: a folder that was named holds no usable shards.
    """
    if flag == STDLIB:
        return StdlibCorpus()
    directory = data_directory(flag)
    named = flag or os.environ.get(DATA_ENV)
    if not named and not any(directory.glob("*.parquet")):
        return StdlibCorpus()
    return ParquetCorpus(directory)
