"""Best-fit packing of documents into rows of exactly row_len tokens, without padding.

A row is filled with the longest buffered document that still fits, the oldest of equals. When none
fits, the shortest one, the oldest of equals, is cropped to fill the row. Under "crop" (nanochat's
scheme, docs/recipe.md) its rest is dropped, under "split" it goes back into the buffer behind a
`<|bos|>`. Every document starts with `<|bos|>`, hence so does every row. Whenever the buffer holds
fewer than 1,000 documents before a pick, the next slice of documents joins it.

Picks depend on lengths alone: a row that nobody asks for costs no copy.
"""

from array import array
from bisect import bisect_left, bisect_right
from typing import NamedTuple

import numpy as np

BUFFER_DOCUMENTS = 1000
SLICE_DOCUMENTS = 128  # that join the buffer together, at most


class Slice(NamedTuple):
    """Documents that join the buffer together."""

    keys: list  # of every document: a number that names it
    starts: list  # of every document: its first token that counts; the rest before it is in rows
    lengths: list  # of every document: its tokens from there on, at least 1
    sources: list  # of every document: (array of tokens, index of that token in it)


class BestFitPacker:
    """Packs documents of an iterator into rows.

    `keys`, `starts`, `lengths` and `sources` are the buffer, by length, equal lengths in order of
    arrival. Sources are read up to row_len tokens; the first one is written as `<|bos|>`.

    Args:
        slices: iterator of Slice; it may end in an error, but has no end.
        row_len: tokens per row.
        bos: the token id.
        split: keep the rest of a document that is cropped.
        buffer: a Slice to begin with, in a saved buffer's order.
    """

    def __init__(self, slices, row_len, bos, split=False, buffer=None):
        self.slices, self.row_len, self.bos, self.split = iter(slices), row_len, bos, split
        self.keys, self.starts, self.lengths, self.sources = map(list, buffer or Slice(*[[]] * 4))
        self.dropped_tokens = 0

    def _add(self, key, start, length, source):
        index = bisect_right(self.lengths, length)
        self.keys.insert(index, key)
        self.starts.insert(index, start)
        self.lengths.insert(index, length)
        self.sources.insert(index, source)

    def next_row(self, row=None):
        """Pack the next row.

        Args:
            row: (row_len,) int32 array to write it into; None: nobody asks for it.
        """
        lengths, filled = self.lengths, 0
        while filled < self.row_len:
            while len(lengths) < BUFFER_DOCUMENTS:
                for document in zip(*next(self.slices), strict=True):
                    self._add(*document)
            space = self.row_len - filled
            index = bisect_right(lengths, space) - 1
            # the oldest of the longest that fit, or the shortest
            index = bisect_left(lengths, lengths[index], 0, index) if index > 0 else 0
            key, start, length = self.keys.pop(index), self.starts.pop(index), lengths.pop(index)
            source = tokens, begin = self.sources.pop(index)
            taken = min(length, space)
            if row is not None:
                row[filled] = self.bos
                row[filled + 1 : filled + taken] = tokens[begin + 1 : begin + taken]
            filled += taken
            if length > space:
                if self.split:  # its last token that is in the row makes place for <|bos|>
                    used = taken - 1
                    source = tokens, begin + used
                    self._add(key, start + used, length - used, source)
                else:
                    self.dropped_tokens += length - space

    def snapshot(self):
        """Keys, starts and lengths of the buffer, (3, documents) int64."""
        return np.frombuffer(array("q", self.keys + self.starts + self.lengths), np.int64).reshape(
            3, -1
        )
