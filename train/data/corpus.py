"""Text to train on: a folder of parquet shards, or the running Python's standard library.

A corpus has shards of row groups of documents. `units[split]` lists what belongs to a split, in
order, as (shard, row group, first row, end or None); it never changes between runs.
`read_groups(shard, first, count)` gives the rows of whole row groups, whatever their split.
"""

import hashlib
import itertools
import os
import threading
from pathlib import Path

import pyarrow as pa

from nanofuse.train.data.library import StdlibCorpus
from nanofuse.train.data.shards import (
    SPLIT_NAMES,
    SPLITS,
    choose_validation,
    damaged,
    decode_texts,
    find_shards,
    footer_of,
    listed,
    open_shard,
    signature,
)
from nanofuse.train.data.tokenizer import FILE_NAME
from nanofuse.train.errors import UserError

DATA_ENV = "NANOFUSE_DIR"
DEFAULT_DIR = Path("~/.cache/nanofuse")
STDLIB = "stdlib"
TEXT_COLUMN = "text"
FETCH_HINT = "fetch some with python -m train.data download -n 8, or name another --data"
READ_DOCUMENTS = 256  # row groups are read together up to about this many documents
READ_BYTES = 8 << 20  # and this many bytes of the file
HEAD_DOCUMENTS, STREAM_BYTES = 64, 1 << 20  # read at a time where only the first ones are wanted


class ParquetCorpus:
    """Parquet shards with a text column: a folder of them, or one file.

    Of a folder one or more shards validate (train.data.shards.choose_validation). Of one file the
    last VAL_FRACTION of its row groups does, or of its rows where it has a single row group, which
    then is a unit of either split. Footers of all shards are read at once, so that a damaged one is
    found before training.

    Args:
        path: folder or file.
        text_column: name of the column.
        val_shard: file name of the shard that validates; '': chosen as above.

    Raises:
        UserError: nothing there, fewer than two shards in a folder, a shard that cannot be used,
            no documents to train on or to validate.
    """

    VAL_FRACTION = 0.05  # of one file

    def __init__(self, path, text_column=TEXT_COLUMN, val_shard=""):
        path = Path(path)
        self.path, self.text_column = path, text_column
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"data directory {path} does not exist; {FETCH_HINT}") from None
        except OSError as error:
            raise UserError(
                f"--data {path} cannot be read ({error.strerror}); name another"
            ) from None
        self.one_file = not os.path.isdir(path)
        self.directory = path.parent if self.one_file else path
        if self.one_file and val_shard:
            raise UserError(f"--val-shard needs a folder of shards, and --data {path} is one file")
        self.shards = [path] if self.one_file else find_shards(path)
        if not self.one_file and len(self.shards) < 2:
            found, way_out = "0 parquet shards", f"{FETCH_HINT} (sub-folders are not looked at)"
            if self.shards:
                found, way_out = "1 parquet shard", f"name it as --data {self.shards[0]}"
            raise UserError(
                f"data directory {path} holds {found}, at least 2 are needed (one validates); "
                f"{way_out}"
            )
        names = [shard.name for shard in self.shards]
        self.reordered = names != sorted(names)
        self.val_shards, self.left_out, self.by_name = choose_validation(names, val_shard, path)
        self.documents, self.row_groups = [], []  # per shard
        self.signatures, self.footers = [], []  # as they were at the start
        self.units = {split: [] for split in SPLITS}  # (shard, row group, first row, end or None)
        for index, shard in enumerate(self.shards):
            self._add(index, shard)
        for split, units in self.units.items():
            if not units:
                raise UserError(f"{self.path}: {split} shards are empty; {FETCH_HINT}")
        self.fingerprint = self._fingerprint()
        self.parts = {}  # (shard, row group) -> (split, first row, end or None) of its rows
        for split, units in self.units.items():
            for shard, group, *rows in units:
                self.parts.setdefault((shard, group), []).append((split, *rows))
        self.lock = threading.Lock()  # of the file that is open; splits are read side by side
        self.opened = None, None  # shard and its ParquetFile
        # (shard, row group) -> documents that were not UTF-8
        self.replaced = {split: {} for split in SPLITS}
        self.told = set()  # splits of which that was said

    def __getstate__(self):
        """For another process, which opens files of its own."""
        return {**vars(self), "lock": None, "opened": (None, None)}

    def __setstate__(self, state):
        vars(self).update(state, lock=threading.Lock())

    def _add(self, index, path):
        """Take up one shard."""
        metadata = open_shard(path, self.text_column).metadata
        self.signatures.append(signature(path))
        self.footers.append(footer_of(path))
        rows, groups = metadata.num_rows, metadata.num_row_groups
        self.documents.append(rows)
        self.row_groups.append(groups)
        units = [(index, group, 0, None) for group in range(groups)]
        if self.one_file:
            self._split_file(units, rows)
        elif path.name not in self.left_out:
            self.units["val" if path.name in self.val_shards else "train"] += units

    def _split_file(self, units, rows):
        """Share the units of the only file out among the splits."""
        if rows < 2:
            found = f"{rows} document{'s' * (rows != 1)}"
            raise UserError(
                f"--data {self.path} holds {found}, at least 2 are needed (one validates); "
                "name another --data"
            )
        if len(units) == 1:
            cut = rows - max(1, round(self.VAL_FRACTION * rows))
            units = [(0, 0, 0, cut), (0, 0, cut, None)]
        num_val = max(1, round(self.VAL_FRACTION * len(units)))
        self.units = {"train": units[:-num_val], "val": units[-num_val:]}

    def _fingerprint(self):
        """Changes when shards are added, removed or replaced by others of another size, or when
        another column, shard or part is trained on."""
        sizes = [size for size, *_ in self.signatures]
        facts = [(shard.name, size) for shard, size in zip(self.shards, sizes, strict=True)]
        if self.one_file or self.left_out or self.val_shards != [self.shards[-1].name]:
            facts = [*facts, ("val", len(self.units["val"]), *self.val_shards, *self.left_out)]
        if self.text_column != TEXT_COLUMN:
            facts = [*facts, ("column", self.text_column)]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    @property
    def content(self):
        """Changes when the text of a shard does, as far as its footer shows."""
        return hashlib.sha256(repr(self.footers).encode()).hexdigest()

    @property
    def tokenizer_path(self):
        """Where the tokenizer of this data is kept."""
        if self.one_file:
            return self.path.with_name(f"{self.path.name}.{FILE_NAME}")
        return self.path / FILE_NAME

    @property
    def name(self):
        if self.one_file:
            return f"{self.documents[0]:,} documents of {self.path}"
        return f"{len(self.shards)} parquet shards in {self.directory}"

    @property
    def validation(self):
        """What validates, and why where that is by its name."""
        if self.one_file:
            index, group, row, _ = self.units["val"][0]
            if row:
                return f"its last {self.documents[0] - row:,} documents validate"
            return f"its last {len(self.units['val'])} of {self.row_groups[0]} row groups validate"
        verb = "validates" if len(self.val_shards) == 1 else "validate"
        text = f"{listed(self.val_shards)} {verb}"
        if self.by_name:
            text += " by name (--val-shard chooses another)"
        if self.left_out:
            text += f", {listed(self.left_out)} left out"
        return text

    @property
    def hints(self):
        """Lines on what is other than one may expect."""
        if not self.reordered:
            return []
        return [
            "shards are in the order of their numbers (2 before 10); up to version 0.1 they were "
            "in that of their names, so that other shards came first and may have validated"
        ]

    def num_units(self, split):
        return len(self.units[split])

    def num_groups(self, shard):
        return self.row_groups[shard]

    def shard_path(self, shard):
        """The file whose content a shard is."""
        return self.shards[shard]

    def groups_a_read(self, shard):
        """Row groups to read at a time: small ones together."""
        groups, rows = self.row_groups[shard], self.documents[shard]
        size, *_ = self.signatures[shard]
        together = min(READ_DOCUMENTS * groups // max(rows, 1), READ_BYTES * groups // size)
        return max(together, 1)

    def describe(self, split, unit):
        """Where a unit lies, for people: {"shard": name, "row_group": n}."""
        index, group, _, _ = self.units[split][unit]
        return {"shard": self.shards[index].name, "row_group": group}

    def _open(self, index):
        """The ParquetFile of a shard, kept until another shard is asked for."""
        if self.opened[0] != index:
            file = open_shard(self.shards[index], self.text_column)
            path = self.shards[index]
            found = signature(path)[0], footer_of(path)
            if found != (self.signatures[index][0], self.footers[index]):
                raise UserError(
                    f"shard {self.shards[index]} has changed since the start; put the old one "
                    "back, or start a new run"
                )
            self.opened = index, file
        return self.opened[1]

    def _read(self, shard, first, count):
        """As read_groups, but a damaged row group is not named."""
        groups = range(first, first + count)
        with self.lock:
            file = self._open(shard)
            table = file.read_row_groups(list(groups), columns=[self.text_column])
            sizes = [file.metadata.row_group(group).num_rows for group in groups]
        texts, replaced = decode_texts(table.column(self.text_column))
        documents, start = [], 0
        for group, size in zip(groups, sizes, strict=True):
            documents.append(texts[start : start + size])
            if replaced:
                rows = [row - start for row in replaced if start <= row < start + size]
                self._count_replaced(shard, group, rows)
            start += size
        return documents

    def _count_replaced(self, shard, group, rows):
        """Take down which rows of a row group were not UTF-8."""
        for split, low, high in self.parts.get((shard, group), ()):
            if count := sum(low <= row and (high is None or row < high) for row in rows):
                self.replaced[split][shard, group] = count

    def read_groups(self, shard, first, count):
        """Rows of `count` row groups from `first`: a list of str or None (null) for each.

        Raises:
            UserError: names the row group that cannot be read.
        """
        try:
            return self._read(shard, first, count)
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            if count > 1:
                groups = range(first, first + count)
                return [self.read_groups(shard, group, 1)[0] for group in groups]
            what = f"row group {first} of shard {self.shards[shard]}"
            raise damaged(what, error, "copy the shard anew from where it came") from None

    def head(self):
        """Iterator of the training documents, read HEAD_DOCUMENTS at a time, whatever the size of
        row groups: for those who want the first ones only.

        Raises:
            UserError: they cannot be read.
        """
        for index, units in itertools.groupby(self.units["train"], lambda unit: unit[0]):
            _, groups, _, (high, *_) = zip(*units, strict=True)
            file = open_shard(self.shards[index], self.text_column, STREAM_BYTES)
            batches = file.iter_batches(
                HEAD_DOCUMENTS, row_groups=list(groups), columns=[self.text_column]
            )
            rows = replaced = 0
            try:
                for batch in batches:
                    left = batch.num_rows if high is None else min(batch.num_rows, high - rows)
                    found, places = decode_texts(batch.column(0).slice(0, left))
                    rows, replaced = rows + left, replaced + len(places)
                    if replaced:
                        self.replaced["train"][index, groups[0]] = replaced
                    yield from (text for text in found if text is not None)
                    if rows == high:
                        break
            except (pa.ArrowException, OSError) as error:
                raise damaged(f"shard {self.shards[index]}", error) from None

    def tell_replaced(self):
        """A line on documents that were not UTF-8 where a split's have not been told of, or None.

        They are told of once a split, with the number seen until then.
        """
        new = [s for s in SPLITS if self.replaced[s] and s not in self.told]
        self.told.update(new)
        if not new:
            return None
        counts = [f"{sum(self.replaced[s].values()):,} {SPLIT_NAMES[s]} documents" for s in new]
        return (
            f"data: {' and '.join(counts)} read so far hold bytes that are not UTF-8; each such "
            "byte becomes U+FFFD"
        )


def data_directory(flag=None):
    """The data directory: the flag, or $NANOFUSE_DIR, or ~/.cache/nanofuse.

    Raises:
        UserError: `~` stands for no folder that the system knows.
    """
    path = Path(flag or os.environ.get(DATA_ENV) or DEFAULT_DIR)
    try:
        return path.expanduser()
    except RuntimeError:
        raise UserError(f"{path}: no home folder is known for it; name one with --data") from None


def open_corpus(flag=None, text_column=TEXT_COLUMN, val_shard=""):
    """The corpus that --data, $NANOFUSE_DIR or the default folder names, in that order.

    Where neither names anything and ~/.cache/nanofuse holds no shard, the standard library
    serves; `--data stdlib` asks for it.

    Args:
        text_column, val_shard: as ParquetCorpus has them; the standard library has neither.

    Raises:
        UserError: what was named holds no usable shards.
    """
    named = flag or os.environ.get(DATA_ENV)
    if flag != STDLIB and (named or default_has_shards()):
        try:
            return ParquetCorpus(data_directory(flag), text_column, val_shard)
        except UserError as error:
            if flag or not named:
                raise
            raise UserError(f"${DATA_ENV}: {error}") from None  # nobody has said --data
    for name, value, default in (
        ("--val-shard", val_shard, ""),
        ("--text-column", text_column, TEXT_COLUMN),
    ):
        if value != default:
            raise UserError(f"{name} {value} needs parquet shards; name them with --data")
    return StdlibCorpus()


def default_has_shards():
    """Whether ~/.cache/nanofuse is there and holds a shard."""
    try:
        directory = DEFAULT_DIR.expanduser()
    except RuntimeError:  # no home
        return False
    return directory.is_dir() and bool(find_shards(directory))
