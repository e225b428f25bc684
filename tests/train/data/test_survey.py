"""What the start of a run says of its data."""

import contextlib
import itertools
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanofuse.train.data.corpus import ParquetCorpus, StdlibCorpus
from nanofuse.train.data.loader import Packing, packed_batches
from nanofuse.train.data.packing import BestFitPacker
from nanofuse.train.data.survey import describe_data, document_lengths, dropped_share
from nanofuse.train.data.tokens import TokenCache
from tests.helpers import WORDS, documents


def corpus_of(folder, texts, **options):
    for name in "ab":
        pq.write_table(pa.table({"text": texts}), folder / f"{name}.parquet", **options)
    return ParquetCorpus(folder)


def shares(lines):
    return [float(x) for x in re.findall(r"drops ([\d.]+) % of the tokens", "\n".join(lines))]


def test_the_data_line_names_what_validates(data_dir, tokenizer):
    line = describe_data(Packing(ParquetCorpus(data_dir), "train", tokenizer, 1, 64), 500)[0]
    assert line.startswith("data: 3 parquet shards in ") and line.endswith(
        "; shard_00002.parquet validates; tokenizer of 320 tokens"
    )
    assert (
        "of them validate"
        in describe_data(Packing(StdlibCorpus(), "train", tokenizer, 1, 64), 500)[0]
    )


def test_an_order_other_than_before_is_said(data_dir, tokenizer):
    for old, new in (("00000", "9"), ("00001", "10")):
        (data_dir / f"shard_{old}.parquet").rename(data_dir / f"shard_{new}.parquet")
    lines = describe_data(Packing(ParquetCorpus(data_dir), "train", tokenizer, 1, 64), 500)
    assert "2 before 10" in lines[1]


@pytest.mark.parametrize(
    ("words", "seq_len", "low", "high"), [(1200, 64, 90, 100), (20, 256, 0, 10)]
)
def test_the_share_that_packing_drops(tmp_path, tokenizer, words, seq_len, low, high):
    texts = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(words)) for i in range(300)]
    packing = Packing(corpus_of(tmp_path, texts), "train", tokenizer, 1, seq_len)
    lines = describe_data(packing, 500)
    assert len(shares(lines)) == 1 and low <= shares(lines)[0] <= high
    assert ("--long-documents split drops none" in lines[-1]) == (low >= 20)


def test_a_split_drops_none(tmp_path, tokenizer):
    texts = [" ".join(WORDS * 50) for _ in range(300)]
    packing = Packing(corpus_of(tmp_path, texts), "train", tokenizer, 1, 64, "split")
    assert "drops no token (100 % of" in describe_data(packing, 500)[-1]


def test_where_tokens_are_kept_is_said(data_dir, tokenizer):
    corpus = ParquetCorpus(data_dir)
    packing = Packing(corpus, "train", tokenizer, 1, 64, "crop", TokenCache(corpus, tokenizer))
    assert describe_data(packing, 500)[1].startswith(f"tokens: kept in {data_dir}/.tokens")


@pytest.mark.parametrize("seq_len", [32, 64, 200])
def test_it_is_about_what_packing_drops_later(tmp_path, tokenizer, seq_len, monkeypatch):
    corpus = corpus_of(tmp_path, documents(1500, longest=150), row_group_size=100)
    count = 8 * (50_000 // seq_len)
    share, packed = dropped_share(document_lengths(corpus, tokenizer), seq_len + 1, count)
    packers = []
    monkeypatch.setattr(
        "nanofuse.train.data.loader.BestFitPacker",
        lambda *args: packers.append(BestFitPacker(*args)) or packers[-1],
    )
    packing = Packing(corpus, "train", tokenizer, 8, seq_len)
    with contextlib.closing(packed_batches(packing)) as batches:
        rows = sum(len(rows) for rows, _ in itertools.islice(batches, 50_000 // seq_len))
    dropped = packers[0].dropped_tokens
    assert packed == rows == count
    assert share == pytest.approx(dropped / (dropped + rows * (seq_len + 1)), abs=0.05)


def test_the_share_is_that_of_the_rows_of_the_run():
    """Documents longer than a row pile up in the buffer, and crowd the short ones out."""
    lengths = [100] * 3 + [1000] + [30, 70]
    early, late = (dropped_share(lengths, 65, rows) for rows in (500, 10**6))
    assert early[1] == 500 < late[1] < 10**6 and early[0] < late[0] - 0.05


def test_a_document_of_many_megabytes_is_measured_by_its_beginning(tmp_path, tokenizer):
    corpus = corpus_of(tmp_path, ["birds sang " * 1_000_000, *documents(9)])
    lengths = document_lengths(corpus, tokenizer)
    ids = tokenizer.encode_documents(["birds sang " * 1000])[0]
    assert lengths == [pytest.approx(1000 * len(ids), rel=0.01)]


def test_a_long_row_group_is_not_read_whole(tmp_path, tokenizer, monkeypatch):
    corpus = corpus_of(tmp_path, documents(5000))
    monkeypatch.setattr(corpus, "_read", None)
    lengths = document_lengths(corpus, tokenizer)
    assert lengths == [len(d) for d in tokenizer.encode_documents(documents(5000)[:1000])]


def test_data_that_holds_no_text_or_is_damaged_is_left_to_the_loader(tmp_path, tokenizer):
    corpus = corpus_of(tmp_path, ["", ""])
    assert len(describe_data(Packing(corpus, "train", tokenizer, 1, 64), 500)) == 1
    path = tmp_path / "a.parquet"
    path.write_bytes(path.read_bytes()[:20])
    assert len(describe_data(Packing(corpus, "train", tokenizer, 1, 64), 500)) == 1


def test_documents_that_are_not_utf8_are_counted(tmp_path, tokenizer):
    raw = pa.array([b"caf\xe9", b"fine", b"\xff"] * 20, pa.binary())
    corpus = corpus_of(tmp_path, raw, row_group_size=7)
    assert (
        "40 training documents"
        in describe_data(Packing(corpus, "train", tokenizer, 1, 64), 500)[-1]
    )
