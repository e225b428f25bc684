"""The stream of documents that packing reads: tokens of a split's rows in order, epoch after epoch.

Tokens come from the cache where they are there. Otherwise the text is tokenised on all cores and,
where a cache can be written, kept on the way. The stream is the same either way.
"""

import contextlib
import itertools
from concurrent.futures import ThreadPoolExecutor

from nanofuse.train.data.encode import encoded_groups, num_cores
from nanofuse.train.data.packing import SLICE_DOCUMENTS, Slice
from nanofuse.train.data.shards import without_text
from nanofuse.train.errors import UserError

OTHER_DATA = "the saved state of the data loader is of other data ({})"
ROW_BITS = 32  # a document's key is its unit << ROW_BITS | its row in the row group


class Tokens:
    """Tokens of a corpus's row groups.

    Args:
        corpus, tokenizer: what is read, and by which tokenizer.
        cache: train.data.tokens.TokenCache, or None to keep nothing.
        say: called with a line for the user.
        encoders: train.data.encode.Encoders of the tokenizer; None: new ones for every shard.
    """

    def __init__(self, corpus, tokenizer, cache=None, say=print, encoders=None):
        self.corpus, self.tokenizer, self.cache, self.say = corpus, tokenizer, cache, say
        self.encoders = encoders

    def groups(self, shard, first, end):
        """Iterator of the TokenGroups of row groups first to end.

        Raises:
            UserError: a row group cannot be read.
        """
        cached = self.cache and self.cache.open(shard)
        group = first
        if cached:
            with contextlib.closing(cached), contextlib.suppress(ValueError):  # damaged, and gone
                while group < min(end, cached.num_groups):
                    yield cached.group(group)
                    group += 1
        if group == end:
            return
        encoded = encoded_groups(
            self.corpus, self.tokenizer, shard, group, end - group, encoders=self.encoders
        )
        with contextlib.closing(encoded), self._keeping(shard, group) as keep:
            for found in encoded:
                keep(found)
                yield found

    @contextlib.contextmanager
    def _keeping(self, shard, group):
        """Gives a function that takes the TokenGroups of a shard from `group` on into its cache,
        as far as that is possible."""
        writer = None

        def give_up(error):
            nonlocal writer
            if self.cache.keeps:
                path, self.cache.keeps = self.cache.where(shard), False
                reason = error.strerror or str(error)
                if error.filename == str(self.corpus.shard_path(shard)):
                    reason = f"{self.corpus.shard_path(shard).name} {reason}"
                self.say(f"tokens: not kept in {path} ({reason}); every pass tokenises anew")
            if writer:
                writer.close(keep=False)
            writer = None

        def keep(found):
            if writer:
                try:
                    writer.append(found)
                except OSError as error:
                    give_up(error)

        if self.cache and self.cache.keeps and self.corpus.shard_path(shard) is not None:
            try:
                writer = self._writer(shard, group)
            except OSError as error:
                give_up(error)
        try:
            yield keep
        finally:
            if writer:
                try:
                    writer.close()
                except OSError as error:
                    writer = None
                    give_up(error)

    def _writer(self, shard, group):
        """A CacheWriter at a shard's row group; None where those before it are not there.

        Raises:
            OSError: nothing can be written.
        """
        if not group:
            return self.cache.writer(shard)
        if (cached := self.cache.open(shard)) is None:
            return None
        with contextlib.closing(cached):
            if cached.num_groups != group:
                return None
            writer = self.cache.writer(shard)
            try:
                writer.copy_from(cached)
            except OSError:
                writer.close(keep=False)
                raise
            except ValueError:  # damaged, and gone: what lies before the damage stays
                writer.close()
                return None
        return writer

    def rows(self, shard, group, rows):
        """Tokens of some rows of a row group: a list of (n,) arrays, empty for a null row.

        Raises:
            UserError: the row group cannot be read.
        """
        found = None
        cached = self.cache and self.cache.open(shard)
        if cached and group < cached.num_groups:
            with contextlib.closing(cached), contextlib.suppress(ValueError):
                found = cached.group(group)
        texts = None if found else self.corpus.read_groups(shard, group, 1)[0]
        if rows and max(rows) >= (len(found.offsets) - 1 if found else len(texts)):
            raise UserError(OTHER_DATA.format(self.corpus.name))
        if found:
            # in memory of their own, as a view would keep the whole row group
            return [found.tokens[slice(*found.offsets[row : row + 2])].copy() for row in rows]
        tokens, offsets = self.tokenizer.encode_flat([texts[row] for row in rows])
        return [tokens[i:j] for i, j in itertools.pairwise(offsets.tolist())]


class DocumentStream:
    """Slices of the documents of a split, without end.

    A slice is up to SLICE_DOCUMENTS rows of a unit, null rows left out; slices begin anew at each
    unit, as nanochat's do at each row group.

    Args:
        tokens: Tokens.
        split: "train" or "val".
        row_len: of a document no more tokens are kept.
        whole: keep all of them.
        epoch, unit, row: the first row to read.
        num_read, epoch_size: of the state that is continued; see LoaderState.

    Attributes:
        epoch, unit, row: the next row to read, unless that is the next unit's first.
        num_read: documents of the slices so far; None: not known.
        epoch_size: documents of an epoch; 0: the first one is not over.
    """

    def __init__(
        self, tokens, split, row_len, whole=False, epoch=0, unit=0, row=0, num_read=0, epoch_size=0
    ):
        self.tokens, self.units = tokens, tokens.corpus.units[split]
        self.split, self.most = split, None if whole else row_len
        self.epoch, self.unit, self.row = epoch, unit, row
        self.num_read, self.epoch_size = num_read, epoch_size

    def __iter__(self):
        first, row, text = self.unit, self.row, False
        whole = not first and not row  # whether the epoch is read from its start
        for epoch in itertools.count(self.epoch):
            if epoch and not self.epoch_size and self.num_read is not None:
                self.epoch_size = self.num_read
            with contextlib.closing(self._groups(first)) as groups:
                for unit, group in groups:
                    for piece, end in self._slices(unit, group, row):
                        text = text or max(piece.lengths) > 1
                        self.epoch, self.unit, self.row = epoch, unit, end
                        if self.num_read is not None:
                            self.num_read += len(piece.keys)
                        yield piece
                    row = 0
            if whole and not text:
                raise without_text(self.tokens.corpus, self.split)
            first, whole = 0, True

    def _groups(self, first):
        """(unit, TokenGroup) of the units from `first` to the end of the epoch."""
        while first < len(self.units):
            shard, group, _, _ = self.units[first]
            count = 1
            while first + count < len(self.units):
                if self.units[first + count][:2] != (shard, group + count):
                    break
                count += 1
            found = self.tokens.groups(shard, group, group + count)
            with contextlib.closing(found):
                yield from enumerate(found, first)
            first += count

    def _slices(self, unit, group, first):
        """(Slice, row after it) of a unit's rows from row `first`."""
        _, _, low, high = self.units[unit]
        tokens, offsets = group
        bounds, first = offsets.tolist(), max(first, low)
        end, most = len(bounds) - 1 if high is None else high, self.most or len(tokens)
        for start in range(first, end, SLICE_DOCUMENTS):
            stop = min(start + SLICE_DOCUMENTS, end)
            rows = [row for row in range(start, stop) if bounds[row] < bounds[row + 1]]
            if not rows:
                continue
            keys = [unit << ROW_BITS | row for row in rows]
            lengths = [bounds[row + 1] - bounds[row] for row in rows]
            ends = [min(bounds[row] + most, bounds[row + 1]) for row in rows]
            sources = [  # in memory of their own, as a view would keep the whole row group
                (tokens[bounds[row] : stop_at].copy(), 0)
                for row, stop_at in zip(rows, ends, strict=True)
            ]
            yield Slice(keys, [0] * len(rows), lengths, sources), stop


def fetch_documents(tokens, split, documents, kept, most=None):
    """The Slice of documents of a saved buffer, read again.

    Args:
        documents: (3, n) int64: keys, starts and lengths; the key of kept[i] is -1 - i.
        kept: list of (n,) arrays of tokens that were saved themselves.
        most: tokens of each to keep; None: all.

    Raises:
        UserError: they are not those that were saved, or cannot be read.
    """
    keys, starts, lengths = (row.tolist() for row in documents)
    units = tokens.corpus.units[split]
    wanted = {}  # unit -> rows
    for key in keys:
        if key >= 0:
            wanted.setdefault(key >> ROW_BITS, set()).add(key & (1 << ROW_BITS) - 1)
    if any(unit >= len(units) for unit in wanted):
        raise UserError(OTHER_DATA.format(tokens.corpus.name))

    def fetch(unit):
        shard, group, _, _ = units[unit]
        rows = sorted(wanted[unit])
        return unit, dict(zip(rows, tokens.rows(shard, group, rows), strict=True))

    with ThreadPoolExecutor(num_cores()) as pool:
        found = dict(pool.map(fetch, sorted(wanted)))
    sources = []
    for key, start, length in zip(keys, starts, lengths, strict=True):
        if key < 0:
            document = kept[-1 - key]
        else:
            document = found[key >> ROW_BITS][key & (1 << ROW_BITS) - 1]
            if len(document) != start + length:
                raise UserError(
                    f"the saved state of the data loader is not of {tokens.corpus.name}, or of "
                    "another tokenizer; put back what the run began with"
                )
        end = None if most is None else start + most
        sources.append((document[start:end].copy(), 0))
    return Slice(keys, starts, lengths, sources)
