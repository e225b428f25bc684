import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanofuse.train.data.corpus import ParquetCorpus, StdlibCorpus, open_corpus, split_text
from nanofuse.train.errors import UserError
from tests.helpers import documents


def all_texts(corpus, split):
    return [t for unit in range(corpus.num_units(split)) for t in corpus.read(split, unit)]


def test_last_shard_validates(data_dir):
    corpus = ParquetCorpus(data_dir)
    assert all_texts(corpus, "train") == documents(90, seed=1) + documents(70, seed=2)
    assert all_texts(corpus, "val") == documents(60, seed=3)
    assert corpus.num_units("train") == 4 + 3 and corpus.documents == [90, 70, 60]
    assert corpus.describe("train", 4) == {"shard": "shard_00001.parquet", "row_group": 0}


def test_fingerprint_follows_the_files(data_dir):
    before = ParquetCorpus(data_dir).fingerprint
    assert ParquetCorpus(data_dir).fingerprint == before
    (data_dir / "shard_00000.parquet").rename(data_dir / "shard_00009.parquet")
    assert ParquetCorpus(data_dir).fingerprint != before


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.999])
def test_a_truncated_shard_is_found_at_once(data_dir, keep):
    path = data_dir / "shard_00001.parquet"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(UserError, match=r"shard_00001\.parquet is truncated or damaged .*fetch"):
        ParquetCorpus(data_dir)


def test_a_damaged_row_group_is_named(data_dir):
    path = data_dir / "shard_00000.parquet"
    content = bytearray(path.read_bytes())
    content[4:600] = b"\xff" * 596
    path.write_bytes(bytes(content))
    corpus = ParquetCorpus(data_dir)
    with pytest.raises(UserError, match=r"row group 0 of shard .*shard_00000\.parquet is damaged"):
        corpus.read("train", 0)


def test_a_shard_without_text_is_refused(data_dir):
    pq.write_table(pa.table({"content": ["a"]}), data_dir / "shard_00001.parquet")
    with pytest.raises(UserError, match=r"shard_00001\.parquet has no column 'text'"):
        ParquetCorpus(data_dir)


def test_missing_and_empty_directories(tmp_path, data_dir):
    with pytest.raises(UserError, match="absent does not exist; fetch"):
        ParquetCorpus(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds 0 parquet shards"):
        ParquetCorpus(tmp_path / "empty")
    for index in (1, 2):
        (data_dir / f"shard_{index:05d}.parquet").unlink()
    with pytest.raises(UserError, match="holds 1 parquet shards, at least 2"):
        ParquetCorpus(data_dir)


def test_stdlib_is_split_deterministically():
    a, b = StdlibCorpus(), StdlibCorpus()
    assert a.files == b.files and a.fingerprint == b.fingerprint
    train, val = set(a.files["train"]), set(a.files["val"])
    assert not train & val
    assert len(val) == round(0.02 * (len(train) + len(val)))
    assert not any("test" in path.parts or "site-packages" in path.parts for path in train | val)
    assert {"argparse.py", "topics.py"} <= {path.name for path in train | val}
    assert sum(map(len, all_texts(a, "train"))) > 5_000_000


@pytest.mark.parametrize(
    "text", ["", "a", "a\n\n\nb\n\nc", "\n\na\n\n", "ab\n\n" * 50, "x" * 99, "a\nb\n\n\n\nc"]
)
@pytest.mark.parametrize("size", [1, 5, 20])
def test_pieces_join_to_the_text(text, size):
    pieces = split_text(text, size)
    assert "".join(pieces) == text and all(pieces)
    assert all(len(piece) <= size or len(piece.splitlines()) == 1 for piece in pieces)
    assert all(len(a) + len(b) > size for a, b in zip(pieces, pieces[1:], strict=False))


def test_text_is_cut_at_blank_lines_first():
    assert split_text("a\nb\n\nc\nd\n\ne\n", 7) == ["a\nb\n\n", "c\nd\n\ne\n"]
    assert split_text("a\nb\nc\n\nd\n", 4) == ["a\nb\n", "c\n\n", "d\n"]


def test_stdlib_documents_are_short_and_lose_nothing():
    corpus = StdlibCorpus()
    texts = corpus.read("train", 0)
    files = [p.read_text(errors="replace") for p in corpus.files["train"][:16]]
    assert "".join(texts) == "".join(files)
    assert len(texts) > len(files) and sum(map(len, texts)) / len(texts) < 2000


def test_choice_of_corpus(data_dir, work_dir, monkeypatch):
    assert isinstance(open_corpus(), StdlibCorpus)  # nothing named, no default folder
    assert isinstance(open_corpus(str(data_dir)), ParquetCorpus)
    monkeypatch.setenv("NANOFUSE_DIR", str(data_dir))
    assert open_corpus().directory == data_dir
    assert isinstance(open_corpus("stdlib"), StdlibCorpus)
    monkeypatch.setenv("NANOFUSE_DIR", str(work_dir))
    with pytest.raises(UserError, match="holds 0 parquet shards"):
        open_corpus()  # a folder that was named must serve
    monkeypatch.delenv("NANOFUSE_DIR")
    cache = work_dir.parent / ".cache"
    cache.mkdir()
    data_dir.rename(cache / "nanofuse")
    assert isinstance(open_corpus(), ParquetCorpus)
