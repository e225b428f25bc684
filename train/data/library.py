"""The running Python's standard library as a corpus: text to train on where no data is."""

import hashlib
import os
import re
import sysconfig
from pathlib import Path

from nanofuse.train.data.shards import SPLITS
from nanofuse.train.errors import UserError


class StdlibCorpus:
    """Source and documentation files of the running Python's standard library, tests excluded.

    Files come in the order of their paths' hashes, the first 2 % validate. Training files are shard
    0, the others shard 1, and a row group is 16 files. What cannot be read, such as a dangling
    link, is left out. A document is a run of paragraphs of one file, about 1,000 characters long:
    packing crops what does not fit a row, and whole files would lose most of their text in short
    rows.
    """

    SUFFIXES = (".py", ".txt", ".rst", ".md")
    EXCLUDED = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")
    VAL_FRACTION = 0.02
    GROUP_FILES = 16
    DOCUMENT_CHARS = 1000

    directory = tokenizer_path = None
    hints = ()

    def __init__(self):
        root = Path(sysconfig.get_path("stdlib"))
        files = []
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in self.EXCLUDED]
            paths = [Path(folder, name) for name in names if name.endswith(self.SUFFIXES)]
            files += [path for path in paths if path.is_file() and os.access(path, os.R_OK)]
        files.sort(
            key=lambda p: hashlib.sha256(os.fsencode(p.relative_to(root).as_posix())).digest()
        )
        if len(files) < 2:
            raise UserError(f"no standard library source under {root}; name a --data directory")
        num_val = max(1, round(len(files) * self.VAL_FRACTION))
        self.root = root
        self.files = {"val": files[:num_val], "train": files[num_val:]}
        self.units = {  # as those of ParquetCorpus
            split: [(shard, group, 0, None) for group in range(self.num_groups(shard))]
            for shard, split in enumerate(SPLITS)
        }
        facts = [(p.name, p.stat().st_size) for split in SPLITS for p in self.files[split]]
        self.fingerprint = hashlib.sha256(repr(facts).encode()).hexdigest()  # of names and sizes
        self.content = None  # not looked at: fingerprint changes with every release of Python

    @property
    def name(self):
        count = sum(len(files) for files in self.files.values())
        return f"{count} files of Python's standard library in {self.root}"

    @property
    def validation(self):
        """What validates."""
        return f"{len(self.files['val'])} of them validate"

    def num_units(self, split):
        return len(self.units[split])

    def num_groups(self, shard):
        return -(-len(self.files[SPLITS[shard]]) // self.GROUP_FILES)

    def groups_a_read(self, shard):
        return 1

    def shard_path(self, shard):
        """None: no file is a shard."""

    def describe(self, split, unit):
        return {"file": self.files[split][unit * self.GROUP_FILES].name}

    def read_groups(self, shard, first, count):
        """Documents of `count` groups from `first`: a list of str for each."""
        files, size = self.files[SPLITS[shard]], self.GROUP_FILES
        starts = range(first * size, (first + count) * size, size)
        return [list(self._documents(files[start : start + size])) for start in starts]

    def _documents(self, files):
        """Documents of files; bytes that are not UTF-8 become U+FFFD."""
        for path in files:
            try:
                text = path.read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue
            yield from split_text(text, self.DOCUMENT_CHARS)

    def head(self):
        """Iterator of the training documents."""
        return self._documents(self.files["train"])

    def tell_replaced(self):
        """None: nothing is said of the library's files in other encodings."""


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
