"""Best-fit packing of documents into rows of exactly row_len tokens, without padding.

A row is filled with the longest buffered document that still fits; when none fits, the shortest
one is cropped to fill the row exactly and its rest is dropped (nanochat's scheme, docs/recipe.md).
Every document starts with `<|bos|>`, hence so does every row. What lies beyond row_len tokens of a
document can be in no row: only its length counts, and it is not kept.
"""

from bisect import bisect_left, bisect_right

import numpy as np


class BestFitPacker:
    """Packs documents from an iterator; `buffer` and `lengths` are the state to save.

    Args:
        documents: iterator of (n,) int32 arrays, n >= 1; None forever is not needed: when it
            ends, the buffer is drained.
        row_len: tokens per row.
        buffer_size: documents to choose from.
        buffer: documents of a saved state, in their saved order.
        lengths: their whole lengths, where the buffer holds their first row_len tokens only.
    """

    def __init__(self, documents, row_len, buffer_size=1000, buffer=(), lengths=None):
        self.documents = iter(documents)
        self.row_len, self.buffer_size = row_len, buffer_size
        # by whole length, equal lengths in order of arrival
        self.lengths = [len(document) for document in buffer] if lengths is None else list(lengths)
        self.buffer = [self._head(document) for document in buffer]
        self.dropped_tokens = 0

    def _head(self, document):
        """The first row_len tokens, in memory of their own where there are more."""
        return document if len(document) <= self.row_len else document[: self.row_len].copy()

    def _refill(self):
        while len(self.buffer) < self.buffer_size:
            document = next(self.documents, None)
            if document is None:
                return
            index = bisect_right(self.lengths, len(document))
            self.lengths.insert(index, len(document))
            self.buffer.insert(index, self._head(document))

    def next_row(self):
        """The next row, (row_len,) int32, or None when the documents left cannot fill one."""
        row = np.empty(self.row_len, dtype=np.int32)
        filled = 0
        while filled < self.row_len:
            self._refill()
            if not self.buffer:
                return None
            space = self.row_len - filled
            index = bisect_right(self.lengths, space) - 1
            if index >= 0:  # the oldest of the longest that fit
                index = bisect_left(self.lengths, self.lengths[index])
            index = max(index, 0)
            document, length = self.buffer.pop(index), self.lengths.pop(index)
            self.dropped_tokens += max(length - space, 0)
            taken = document[:space]
            row[filled : filled + len(taken)] = taken
            filled += len(taken)
        return row
