from itertools import count, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanofuse.train.data import packing
from nanofuse.train.data.packing import BestFitPacker, Slice

BOS = 0


def endless(lengths, size):
    """Lists of up to `size` documents of these lengths, again and again: BOS and distinct positive
    numbers, so that every token can be traced."""
    counter = count(1)
    while True:
        for i in range(0, len(lengths), size):
            part = lengths[i : i + size]
            yield [[BOS, *islice(counter, length - 1)] for length in part]


def slices(lists):
    """As a packer takes them; a document's tokens lie among others."""
    number = count()
    for documents in lists:
        flat = np.array([7, *sum(documents, [])], np.uint16 if len(documents) % 2 else np.uint32)
        begins = np.cumsum([1, *map(len, documents)]).tolist()[:-1]
        keys = [next(number) for _ in documents]
        yield Slice(keys, [0] * len(keys), [*map(len, documents)], [(flat, i) for i in begins])


def reference(lists, row_len, least):
    """The scheme by its definition: the buffer is a list in order of arrival."""
    buffer = []
    while True:
        row = []
        while len(row) < row_len:
            while len(buffer) < least:
                buffer += next(lists)
            space = row_len - len(row)
            fitting = [document for document in buffer if len(document) <= space]
            best = max(fitting, key=len) if fitting else min(buffer, key=len)
            at = next(i for i, document in enumerate(buffer) if document is best)
            row += buffer.pop(at)[:space]
        yield row


def packed(packer, rows):
    row = np.empty(packer.row_len, np.int32)
    for _ in range(rows):
        packer.next_row(row)
        yield row.tolist()


lengths_strategy = st.lists(st.integers(1, 30), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(lengths_strategy, st.integers(1, 20), st.integers(1, 9), st.integers(1, 12))
def test_rows_are_those_of_the_definition(lengths, row_len, size, least):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BUFFER_DOCUMENTS", least)
        packer = BestFitPacker(slices(endless(lengths, size)), row_len, BOS)
        expected = list(islice(reference(endless(lengths, size), row_len, least), 40))
        assert list(packed(packer, 40)) == expected


def test_a_thousand_documents_are_there_before_each_pick():
    """Slices of 128: the buffer holds 1,024 before the first pick, and 999 do not suffice."""
    read = []

    def counted():
        for piece in slices(endless([5] * 128, 128)):
            read.append(piece)
            yield piece

    packer = BestFitPacker(counted(), 4, BOS)
    packer.next_row()
    assert len(read) == 8 and len(packer.keys) == 1023
    for _ in range(24):
        packer.next_row()
    assert len(read) == 8 and len(packer.keys) == 999
    packer.next_row()
    assert len(read) == 9 and len(packer.keys) == 999 + 128 - 1


@settings(max_examples=150, deadline=None)
@given(lengths_strategy, st.integers(2, 20), st.integers(1, 9), st.integers(1, 12))
def test_a_split_drops_no_token_and_keeps_their_order(lengths, row_len, size, least):
    lists = endless(lengths, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BUFFER_DOCUMENTS", least)
        given_out = []

        def recorded():
            for documents in lists:
                given_out.extend(documents)
                yield documents

        packer = BestFitPacker(slices(recorded()), row_len, BOS, split=True)
        rows = list(packed(packer, 30))
        buffer = packer.keys, packer.starts, packer.lengths, packer.sources
        left = [
            source[0][source[1] + 1 : source[1] + length].tolist()
            for *_, length, source in zip(*buffer, strict=True)
        ]
    assert all(row[0] == BOS for row in rows) and not packer.dropped_tokens
    tokens = [token for row in rows for token in row if token != BOS]
    expected = sorted(token for document in given_out for token in document[1:])
    assert sorted([*tokens, *sum(left, [])]) == expected
    place = {token: i for i, token in enumerate(tokens)}
    for document in given_out:
        places = [place[token] for token in document[1:] if token in place]
        assert places == sorted(places)
        assert [place[token] for token in document[1 : 1 + len(places)]] == places


@pytest.mark.parametrize("split", [False, True])
def test_rows_that_nobody_asks_for_change_nothing(split):
    lengths = [13, 17, 40, 9, 25, 130]
    whole, part = (BestFitPacker(slices(endless(lengths, 3)), 32, BOS, split) for _ in range(2))
    expected = list(packed(whole, 90))
    row = np.empty(32, np.int32)
    for number in range(90):
        part.next_row(row if number % 3 else None)
        assert not number % 3 or row.tolist() == expected[number]
    assert whole.dropped_tokens == part.dropped_tokens and split == (not whole.dropped_tokens)


@pytest.mark.parametrize("split", [False, True])
def test_a_saved_buffer_continues_exactly(split):
    source = slices(endless([3, 17, 40, 9, 1, 1, 25, 130], 3))
    packer = BestFitPacker(source, 32, BOS, split)
    for _ in range(50):
        packer.next_row()
    buffer = Slice(packer.keys, packer.starts, packer.lengths, packer.sources)
    copy = Slice(*map(list, buffer))
    assert packer.snapshot().tolist() == [copy.keys, copy.starts, copy.lengths]
    ahead = [next(source) for _ in range(200)]
    packer.slices = iter(ahead)
    again = BestFitPacker(iter(ahead), 32, BOS, split, copy)
    assert list(packed(packer, 60)) == list(packed(again, 60))


def test_dropped_tokens_are_counted():
    packer = BestFitPacker(slices(endless([10], 128)), 4, BOS)
    for _ in range(5):
        packer.next_row()
    assert packer.dropped_tokens == 5 * 6
