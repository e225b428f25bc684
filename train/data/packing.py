"""Best-fit packing of documents into rows of exactly row_len tokens, without padding.

A row is filled with the longest buffered document that still fits; when none fits, the shortest
one is cropped to fill the row exactly and its rest is dropped (nanochat's scheme, docs/recipe.md).
Every document starts with `<|bos|>`, hence so does every row.
"""

from bisect import bisect_left, bisect_right, insort_right

import numpy as np


class BestFitPacker:
    """Packs documents from an iterator; `buffer` is the state to save.

    Args:
        documents: iterator of (n,) int32 arrays, n >= 1; None forever is not needed: when it
            ends, the buffer is drained.
        row_len: tokens per row.
        buffer_size: documents to choose from.
        buffer: documents of a saved state, in their saved order.
    """

    def __init__(self, documents, row_len, buffer_size=1000, buffer=()):
        self.documents = iter(documents)
        self.row_len, self.buffer_size = row_len, buffer_size
        self.buffer = list(buffer)  # by length, equal lengths in order of arrival
        self.dropped_tokens = 0

    def _refill(self):
        while len(self.buffer) < self.buffer_size:
            document = next(self.documents, None)
            if document is None:
                return
            insort_right(self.buffer, document, key=len)

    def next_row(self):
        """The next row, (row_len,) int32, or None when the documents left cannot fill one."""
        row = np.empty(self.row_len, dtype=np.int32)
        filled = 0
        while filled < self.row_len:
            self._refill()
            if not self.buffer:
                return None
            space = self.row_len - filled
            index = bisect_right(self.buffer, space, key=len) - 1
            if index >= 0:  # the oldest of the longest that fit
                index = bisect_left(self.buffer, len(self.buffer[index]), key=len)
            document = self.buffer.pop(max(index, 0))
            self.dropped_tokens += max(len(document) - space, 0)
            taken = document[:space]
            row[filled : filled + len(taken)] = taken
            filled += len(taken)
        return row
