from bisect import bisect_left, bisect_right, insort_right

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nanofuse.train.data.packing import BestFitPacker

BOS = 0


def make_documents(lengths):
    """Documents of BOS and distinct positive numbers, so that every token can be traced."""
    counter = iter(range(1, 10**9))
    return [
        np.array([BOS] + [next(counter) for _ in range(n - 1)], dtype=np.int32) for n in lengths
    ]


def pack(lengths, row_len, buffer_size):
    packer = BestFitPacker(make_documents(lengths), row_len, buffer_size)
    rows = []
    while (row := packer.next_row()) is not None:
        rows.append(row)
    return rows, packer


lengths_strategy = st.lists(st.integers(1, 30), max_size=60)


@settings(max_examples=200, deadline=None)
@given(lengths_strategy, st.integers(2, 20), st.integers(1, 12))
def test_rows_are_full_start_with_bos_and_lose_only_crops(lengths, row_len, buffer_size):
    documents = make_documents(lengths)
    rows, packer = pack(lengths, row_len, buffer_size)
    assert all(row.shape == (row_len,) and row[0] == BOS for row in rows)
    kept = 0
    by_first = {doc[1] if len(doc) > 1 else None: doc for doc in documents}
    for row in rows:
        starts = [*np.flatnonzero(row == BOS), row_len]
        for index, (low, high) in enumerate(zip(starts, starts[1:], strict=False)):
            piece = row[low:high]
            kept += len(piece)
            if len(piece) == 1:
                continue
            document = by_first[piece[1]]  # a piece is a whole document, or a prefix at the end
            assert np.array_equal(piece, document[: len(piece)])
            assert len(piece) == len(document) or index == len(starts) - 2
    left = sum(packer.lengths)
    total = sum(lengths)
    unfinished = total - kept - packer.dropped_tokens - left
    assert 0 <= unfinished < row_len  # tokens of the last row, which stayed incomplete


@settings(max_examples=100, deadline=None)
@given(lengths_strategy, st.integers(2, 20))
def test_a_document_is_cropped_only_when_none_fits(lengths, row_len):
    """With every document in the buffer, check each choice against its definition."""
    packer = BestFitPacker(make_documents(lengths), row_len, buffer_size=1000)
    packer._refill()
    while True:
        buffer = list(packer.lengths)
        row = packer.next_row()
        if row is None:
            return
        starts = [*np.flatnonzero(row == BOS), row_len]
        for low, high in zip(starts, starts[1:], strict=False):
            space = row_len - low
            fitting = [n for n in buffer if n <= space]
            chosen = max(fitting) if fitting else min(buffer)
            assert high - low == min(chosen, space)
            buffer.remove(chosen)


def test_equal_lengths_leave_in_order_of_arrival():
    rows, _ = pack([3, 3, 3], 3, 10)
    assert [row[1] for row in rows] == [1, 3, 5]


def test_saved_buffer_continues_exactly():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 50, size=400).tolist()
    whole, _ = pack(lengths, 32, 20)
    documents = iter(make_documents(lengths))
    first = BestFitPacker(documents, 32, 20)
    head = [first.next_row() for _ in range(60)]
    rest = BestFitPacker(documents, 32, 20, buffer=list(first.buffer), lengths=first.lengths)
    tail = [rest.next_row() for _ in range(len(whole) - 60)]
    assert np.array_equal(np.stack(whole), np.stack(head + tail))


def old_rows(lengths, row_len, buffer_size):
    """Rows of the scheme where the buffer holds whole documents, as up to version 0.1."""
    documents, buffer, rows = iter(make_documents(lengths)), [], []
    while True:
        row, filled = np.empty(row_len, np.int32), 0
        while filled < row_len:
            while len(buffer) < buffer_size and (document := next(documents, None)) is not None:
                insort_right(buffer, document, key=len)
            if not buffer:
                return rows
            space = row_len - filled
            index = bisect_right(buffer, space, key=len) - 1
            if index >= 0:
                index = bisect_left(buffer, len(buffer[index]), key=len)
            taken = buffer.pop(max(index, 0))[:space]
            row[filled : filled + len(taken)] = taken
            filled += len(taken)
        rows.append(row)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 90), max_size=80), st.integers(2, 20), st.integers(1, 12),
    st.integers(0, 30),
)  # fmt: skip
def test_a_row_of_each_document_gives_the_rows_of_whole_ones(lengths, row_len, buffer_size, cut):
    """Documents of many rows among them, and with a state saved and restored on the way."""
    expected = old_rows(lengths, row_len, buffer_size)
    documents = iter(make_documents(lengths))
    packer, rows = BestFitPacker(documents, row_len, buffer_size), []
    while (row := packer.next_row()) is not None:
        rows.append(row)
        assert all(len(document) <= row_len for document in packer.buffer)
        if len(rows) == cut:
            packer = BestFitPacker(documents, row_len, buffer_size, packer.buffer, packer.lengths)
    assert len(rows) == len(expected)
    assert all(np.array_equal(a, b) for a, b in zip(rows, expected, strict=True))


def test_what_is_beyond_a_row_is_not_kept_in_memory():
    packer = BestFitPacker([np.zeros(10**6, np.int32) for _ in range(3)], 8, 3)
    packer._refill()
    assert packer.lengths == [10**6] * 3
    assert all(len(d) == 8 and d.base is None for d in packer.buffer)
    whole = BestFitPacker([], 8, 3, [np.zeros(100, np.int32)])  # a state of version 0.1
    assert whole.lengths == [100] and len(whole.buffer[0]) == 8


def test_a_long_document_fills_a_row():
    rows, packer = pack([100], 8, 4)
    assert len(rows) == 1 and packer.dropped_tokens == 92
