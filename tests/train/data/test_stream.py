"""The stream of documents against the shards read and tokenised directly."""

import contextlib
import itertools
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanofuse.train.data import stream as module
from nanofuse.train.data.corpus import ParquetCorpus, StdlibCorpus
from nanofuse.train.data.packing import SLICE_DOCUMENTS
from nanofuse.train.data.stream import DocumentStream, Tokens, fetch_documents
from nanofuse.train.data.tokens import TokenCache
from nanofuse.train.errors import UserError
from tests.helpers import documents

ROW = 65


def write(path, texts, **options):
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, **options)


@pytest.fixture
def folder(tmp_path):
    """Two training shards and one that validates; null, empty and long documents among them."""
    texts = documents(700, seed=3)
    texts[5], texts[140], texts[141], texts[300] = None, "", None, "birds sang " * 90
    path = tmp_path / "shards"
    path.mkdir()
    write(path / "a.parquet", texts[:450], row_group_size=200)
    write(path / "b.parquet", texts[450:], row_group_size=130)
    write(path / "c.parquet", documents(40, seed=5), row_group_size=40)
    return path


def reference(folder, tokenizer, names=("a", "b")):
    """Slices of one epoch: lists of documents, by the scheme's definition."""
    for name in names:
        file = pq.ParquetFile(folder / f"{name}.parquet")
        for group in range(file.num_row_groups):
            texts = file.read_row_group(group).column("text").to_pylist()
            for start in range(0, len(texts), 128):
                part = [text for text in texts[start : start + 128] if text is not None]
                yield [[tokenizer.bos, *tokenizer.encode(text)] for text in part]


def tokens_of(piece):
    return [
        [int(token) for token in source[begin : begin + length]]
        for length, (source, begin) in zip(piece.lengths, piece.sources, strict=True)
    ]


def streamed(folder, tokenizer, count, cache=None, whole=True, say=print, **at):
    corpus = ParquetCorpus(folder)
    tokens = Tokens(corpus, tokenizer, TokenCache(corpus, tokenizer) if cache else None, say)
    stream = DocumentStream(tokens, "train", ROW, whole, **at)
    with contextlib.closing(iter(stream)) as pieces:
        for piece in itertools.islice(pieces, count):
            yield piece, (stream.epoch, stream.unit, stream.row, stream.num_read, stream.epoch_size)


@pytest.mark.parametrize("cache", ["no cache", "first pass", "cached", "a part cached"])
def test_it_is_that_of_the_shards_again_and_again(folder, tokenizer, cache):
    one = list(reference(folder, tokenizer))
    if cache == "cached":
        list(streamed(folder, tokenizer, len(one), cache=True))
        list(streamed(folder, tokenizer, len(one) + 1, cache=True))
        assert len(list((folder / ".tokens").iterdir())) == 2
    if cache == "a part cached":
        list(streamed(folder, tokenizer, 4, cache=True))
    found = list(streamed(folder, tokenizer, 2 * len(one) + 3, cache=cache != "no cache"))
    assert [tokens_of(piece) for piece, _ in found] == one + one + one[:3]
    count = sum(map(len, one))
    assert found[len(one) - 1][1] == (0, 4, 120, count, 0)
    assert found[len(one)][1][3:] == (count + len(one[0]), count) and found[len(one)][1][0] == 1
    assert (folder / ".tokens").exists() == (cache != "no cache")


@pytest.mark.parametrize("cache", [False, True])
def test_documents_in_memory_keep_a_row_of_tokens_at_most(folder, tokenizer, cache):
    """And nothing else: not the row group that they came with."""
    if cache:
        list(streamed(folder, tokenizer, 7, cache=True))
    for piece, _ in streamed(folder, tokenizer, 6, cache=cache, whole=False):
        for length, (source, begin) in zip(piece.lengths, piece.sources, strict=True):
            assert begin == 0 and len(source) == min(length, ROW) and source.base is None


@pytest.mark.parametrize("cut", [1, 3, 4, 7])
def test_it_continues_where_it_stood(folder, tokenizer, cut):
    whole = list(streamed(folder, tokenizer, 14))
    epoch, unit, row, num_read, size = whole[cut - 1][1]
    at = {"epoch": epoch, "unit": unit, "row": row, "num_read": num_read, "epoch_size": size}
    rest = list(streamed(folder, tokenizer, 14 - cut, **at))
    for (a, at_a), (b, at_b) in zip(whole[cut:], rest, strict=True):
        assert tokens_of(a) == tokens_of(b) and at_a == at_b and a.keys == b.keys


@pytest.mark.parametrize("cache", [False, True])
def test_documents_of_a_buffer_are_read_again(folder, tokenizer, cache):
    corpus = ParquetCorpus(folder)
    tokens = Tokens(corpus, tokenizer, TokenCache(corpus, tokenizer) if cache else None)
    pieces = [piece for piece, _ in streamed(folder, tokenizer, 6, cache=cache)]
    keys, _, lengths, _ = (sum(lists, []) for lists in zip(*pieces, strict=True))
    wanted = [i for i in range(0, len(keys), 7) if lengths[i] > 3]
    starts = [i % 3 for i in wanted]
    saved = np.array(
        [
            [keys[i] for i in wanted] + [-1],
            [*starts, 2],
            [lengths[i] - start for i, start in zip(wanted, starts, strict=True)] + [8],
        ]
    )
    kept = [np.arange(10, dtype=np.int32)]
    again = fetch_documents(tokens, "train", saved, kept)
    whole = sum(map(tokens_of, pieces), [])
    expected = [whole[i][start:] for i, start in zip(wanted, starts, strict=True)]
    assert tokens_of(again) == [*expected, list(range(2, 10))]
    heads = fetch_documents(tokens, "train", saved, kept, most=5)
    assert [source.tolist() for source, _ in heads.sources] == [
        document[:5] for document in [*expected, list(range(2, 10))]
    ]


def test_rows_of_a_cached_group_do_not_keep_it(folder, tokenizer):
    list(streamed(folder, tokenizer, 7, cache=True))
    corpus = ParquetCorpus(folder)
    found = Tokens(corpus, tokenizer, TokenCache(corpus, tokenizer)).rows(0, 0, [0, 5, 7])
    expected = Tokens(corpus, tokenizer).rows(0, 0, [0, 5, 7])
    assert [x.tolist() for x in found] == [x.tolist() for x in expected]
    assert all(x.base is None for x in found)


def test_documents_that_are_others_are_refused(folder, tokenizer):
    tokens = Tokens(ParquetCorpus(folder), tokenizer)

    def fetch(key, length):
        fetch_documents(tokens, "train", np.array([[key], [0], [length]]), [])

    for key in (99 << 32, 199 << 32, 1 << 32 | 200):
        with pytest.raises(UserError, match="is of other data"):
            fetch(key, 3)
    with pytest.raises(UserError, match="or of another tokenizer; put back"):
        fetch(2, 3000)
    cached = ParquetCorpus(folder)
    list(streamed(folder, tokenizer, 9, cache=True))
    tokens = Tokens(cached, tokenizer, TokenCache(cached, tokenizer))
    with pytest.raises(UserError, match="is of other data"):
        fetch(200, 3)


def test_what_cannot_be_cached_is_said_once(folder, tokenizer, monkeypatch):
    def refuse(self, group):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nanofuse.train.data.tokens.CacheWriter.append", refuse)
    said = []
    one = list(reference(folder, tokenizer))
    found = list(streamed(folder, tokenizer, 2 * len(one), cache=True, say=said.append))
    assert [tokens_of(piece) for piece, _ in found] == one + one
    assert len(said) == 1 and "(No space left on device); every pass" in said[0]
    assert f"not kept in {folder / '.tokens'}" in said[0]
    assert not list((folder / ".tokens").iterdir())
    corpus = ParquetCorpus(folder)
    cache = TokenCache(corpus, tokenizer)
    for split in ("train", "val", "val"):  # as of a run and its evaluations
        stream = DocumentStream(Tokens(corpus, tokenizer, cache, said.append), split, ROW)
        with contextlib.closing(iter(stream)) as pieces:
            next(pieces)
    assert len(said) == 2 and not cache.keeps


def test_a_damaged_cache_is_made_anew(folder, tokenizer):
    one = list(reference(folder, tokenizer))
    list(streamed(folder, tokenizer, len(one) + 1, cache=True))
    for path in (folder / ".tokens").iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    found = list(streamed(folder, tokenizer, len(one), cache=True))
    assert [tokens_of(piece) for piece, _ in found] == one


def test_a_cache_that_is_cut_short_while_it_is_read(folder, tokenizer):
    """In place, where a mapped file would end the process."""
    one = list(reference(folder, tokenizer))
    list(streamed(folder, tokenizer, len(one) + 1, cache=True))
    pieces = streamed(folder, tokenizer, len(one), cache=True)
    found = [tokens_of(next(pieces)[0])]
    for path in (folder / ".tokens").iterdir():
        os.truncate(path, 300)
    assert found + [tokens_of(piece) for piece, _ in pieces] == one


def test_damage_before_the_first_unit_ends_nothing(folder, tokenizer):
    """What lies there is copied into a longer cache, though nobody reads it."""
    at = {"unit": 1, "row": 0}
    expected = list(map(tokens_of, next(zip(*streamed(folder, tokenizer, 3, **at), strict=True))))
    list(streamed(folder, tokenizer, 3, cache=True))  # two row groups of three
    (path,) = (folder / ".tokens").iterdir()
    cached = TokenCache(ParquetCorpus(folder), tokenizer).open(0)
    first, content = cached.group(0).tokens.tobytes(), bytearray(path.read_bytes())
    assert cached.num_groups == 2
    content[content.index(first)] ^= 1
    path.write_bytes(content)
    found = streamed(folder, tokenizer, 3, cache=True, say=pytest.fail, **at)
    assert [tokens_of(piece) for piece, _ in found] == expected
    assert not list((folder / ".tokens").iterdir())


def test_damage_comes_after_what_lies_before_it(tmp_path, tokenizer):
    texts = [f"{i} " + "birds sang loudly over hills " * 9 for i in range(40)]
    for name in "ab":
        write(tmp_path / f"{name}.parquet", texts, row_group_size=10, compression="none",
              use_dictionary=False, write_page_checksum=True)  # fmt: skip
    path = tmp_path / "a.parquet"
    content = bytearray(path.read_bytes())
    content[content.index(b"25 birds") + 4] ^= 1
    path.write_bytes(content)
    for cache in (False, True, True):
        pieces = streamed(tmp_path, tokenizer, 9, cache=cache)
        assert [next(pieces)[1][:3] for _ in range(2)] == [(0, 0, 10), (0, 1, 10)]
        with pytest.raises(UserError, match=r"row group 2 of shard .*a\.parquet is damaged"):
            next(pieces)


def test_a_split_without_text_is_refused(tmp_path, tokenizer):
    for name in "ab":
        write(tmp_path / f"{name}.parquet", ["", None] * 9)
    with pytest.raises(UserError, match="no training document holds text"):
        list(streamed(tmp_path, tokenizer, 3))


def test_a_token_is_text(tmp_path, tokenizer):
    for name in "ab":
        write(tmp_path / f"{name}.parquet", ["a", ""] * 9)
    assert tokenizer.encode("a") == [97]
    assert len(list(streamed(tmp_path, tokenizer, 3))) == 3


@pytest.mark.parametrize("row", [40, 95])
def test_text_before_the_first_row_counts(tmp_path, tokenizer, row):
    """All that is left of the epoch is empty, or nothing is; the unit is the only one."""
    write(tmp_path / "a.parquet", ["birds sang"] * 40 + [""] * 60)
    corpus = ParquetCorpus(tmp_path / "a.parquet")
    stream = DocumentStream(Tokens(corpus, tokenizer), "train", ROW, row=row)
    with contextlib.closing(iter(stream)) as pieces:
        assert any(max(piece.lengths) > 1 for piece in itertools.islice(pieces, 2))


def test_one_file_gives_its_part_only(tmp_path, tokenizer):
    texts = documents(100)
    write(tmp_path / "a.parquet", texts)
    path = tmp_path / "a.parquet"
    for cache in (False, True, True):
        corpus = ParquetCorpus(path)
        tokens = Tokens(corpus, tokenizer, TokenCache(corpus, tokenizer) if cache else None)
        for split, part in (("train", texts[:95]), ("val", texts[95:])):
            with contextlib.closing(iter(DocumentStream(tokens, split, 10**6))) as pieces:
                assert tokens_of(next(pieces)) == [
                    [tokenizer.bos, *tokenizer.encode(text)] for text in part
                ]


def test_the_standard_library_has_no_cache(tokenizer, monkeypatch):
    corpus = StdlibCorpus()
    tokens = Tokens(corpus, tokenizer, TokenCache(corpus, tokenizer))
    assert corpus.shard_path(0) is None and module.ROW_BITS == 32
    with contextlib.closing(iter(DocumentStream(tokens, "val", ROW))) as pieces:
        piece = next(pieces)
    texts = corpus.read_groups(1, 0, 1)[0][:SLICE_DOCUMENTS]
    assert piece.lengths == [len(tokenizer.encode(text)) + 1 for text in texts]
