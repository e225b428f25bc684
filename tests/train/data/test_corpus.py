import hashlib
import os
import random
import sysconfig

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanofuse.train.data.corpus import ParquetCorpus, StdlibCorpus, open_corpus
from nanofuse.train.data.library import split_text
from nanofuse.train.errors import UserError
from tests.helpers import documents, texts_of, units_of


def test_last_shard_validates(data_dir):
    corpus = ParquetCorpus(data_dir)
    assert texts_of(corpus, "train") == documents(90, seed=1) + documents(70, seed=2)
    assert texts_of(corpus, "val") == documents(60, seed=3)
    assert corpus.num_units("train") == 4 + 3 and corpus.documents == [90, 70, 60]
    assert corpus.describe("train", 4) == {"shard": "shard_00001.parquet", "row_group": 0}


def test_fingerprint_follows_the_files(data_dir):
    before = ParquetCorpus(data_dir).fingerprint
    assert ParquetCorpus(data_dir).fingerprint == before
    (data_dir / "shard_00000.parquet").rename(data_dir / "shard_00009.parquet")
    assert ParquetCorpus(data_dir).fingerprint != before


def test_a_damaged_row_group_is_named(data_dir):
    path = data_dir / "shard_00000.parquet"
    content = bytearray(path.read_bytes())
    content[4:600] = b"\xff" * 596
    path.write_bytes(bytes(content))
    corpus = ParquetCorpus(data_dir)
    with pytest.raises(UserError, match=r"row group 0 of shard .*shard_00000\.parquet is damaged"):
        corpus.read_groups(0, 0, 1)


def test_what_cannot_be_read_together_is_read_one_by_one(data_dir, monkeypatch):
    corpus, read = ParquetCorpus(data_dir), ParquetCorpus._read
    expected = corpus.read_groups(0, 1, 3)

    def one(self, shard, first, count):
        if count > 1:
            raise pa.ArrowInvalid("too much at once")
        return read(self, shard, first, count)

    monkeypatch.setattr(ParquetCorpus, "_read", one)
    assert corpus.read_groups(0, 1, 3) == expected and len(expected) == 3


def test_missing_and_empty_directories(tmp_path, data_dir):
    with pytest.raises(UserError, match="absent does not exist; fetch"):
        ParquetCorpus(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds 0 parquet shards"):
        ParquetCorpus(tmp_path / "empty")
    for index in (1, 2):
        (data_dir / f"shard_{index:05d}.parquet").unlink()
    with pytest.raises(UserError, match="holds 1 parquet shard, at least 2"):
        ParquetCorpus(data_dir)


def test_stdlib_is_split_deterministically():
    a, b = StdlibCorpus(), StdlibCorpus()
    assert a.files == b.files and a.fingerprint == b.fingerprint
    train, val = set(a.files["train"]), set(a.files["val"])
    assert not train & val
    assert len(val) == round(0.02 * (len(train) + len(val)))
    assert not any("test" in path.parts or "site-packages" in path.parts for path in train | val)
    assert {"argparse.py", "topics.py"} <= {path.name for path in train | val}
    assert sum(map(len, texts_of(a, "train"))) > 5_000_000


@pytest.mark.parametrize(
    "text", ["", "a", "a\n\n\nb\n\nc", "\n\na\n\n", "ab\n\n" * 50, "x" * 99, "a\nb\n\n\n\nc"]
)
@pytest.mark.parametrize("size", [1, 5, 20])
def test_pieces_join_to_the_text(text, size):
    pieces = split_text(text, size)
    assert "".join(pieces) == text and all(pieces)
    assert all(len(piece) <= size or len(piece.splitlines()) == 1 for piece in pieces)
    assert all(len(a) + len(b) > size for a, b in zip(pieces, pieces[1:], strict=False))


def test_groups_of_the_library_are_its_units():
    corpus = StdlibCorpus()
    for shard, split in enumerate(("train", "val")):
        count = corpus.num_groups(shard)
        assert corpus.units[split] == [(shard, group, 0, None) for group in range(count)]
        assert corpus.num_units(split) == count == -(-len(corpus.files[split]) // 16)
        assert corpus.shard_path(shard) is None
        assert corpus.read_groups(shard, 0, count) == list(units_of(corpus, split))
    assert list(corpus.head()) == texts_of(corpus, "train")


def test_text_is_cut_at_blank_lines_first():
    assert split_text("a\nb\n\nc\nd\n\ne\n", 7) == ["a\nb\n\n", "c\nd\n\ne\n"]
    assert split_text("a\nb\nc\n\nd\n", 4) == ["a\nb\n", "c\n\n", "d\n"]


def test_stdlib_documents_are_short_and_lose_nothing():
    corpus = StdlibCorpus()
    (texts,) = corpus.read_groups(0, 0, 1)
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
    with pytest.raises(UserError, match=r"^\$NANOFUSE_DIR: .* holds 0 parquet shards"):
        open_corpus()  # a folder that was named must serve
    with pytest.raises(UserError, match="^data directory .* holds 0 parquet shards"):
        open_corpus(str(work_dir))
    monkeypatch.delenv("NANOFUSE_DIR")
    cache = work_dir.parent / ".cache"
    cache.mkdir()
    data_dir.rename(cache / "nanofuse")
    assert isinstance(open_corpus(), ParquetCorpus)


def test_unreadable_files_of_the_library_are_left_out(tmp_path, monkeypatch):
    library = tmp_path / "library"
    library.mkdir()
    for i in range(40):
        (library / f"module_{i}.py").write_text(f"x = {i}\n" * 30)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(library))
    whole = StdlibCorpus()
    (library / "sitecustomize.py").symlink_to("/nowhere/sitecustomize.py")
    (library / "loop.py").symlink_to(library / "loop.py")
    os.mkfifo(library / "pipe.py")  # reading it would hang
    (library / "folder.py").mkdir()
    corpus = StdlibCorpus()
    assert corpus.fingerprint == whole.fingerprint and "40 files" in corpus.name
    texts = texts_of(corpus, "train")
    (corpus.files["train"][0]).unlink()  # later on
    assert 0 < len(texts_of(corpus, "train")) < len(texts)
    assert corpus.fingerprint == whole.fingerprint


def write(path, texts, **options):
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, **options)


def test_last_row_groups_of_one_file_validate(tmp_path):
    texts = documents(400)
    write(tmp_path / "all.parquet", texts, row_group_size=10)
    corpus = open_corpus(str(tmp_path / "all.parquet"))
    assert texts_of(corpus, "train") == texts[:380] and texts_of(corpus, "val") == texts[380:]
    assert corpus.validation == "its last 2 of 40 row groups validate"
    assert corpus.tokenizer_path == tmp_path / "all.parquet.tokenizer.json"
    assert corpus.describe("val", 0) == {"shard": "all.parquet", "row_group": 38}


@pytest.mark.parametrize("count", [2, 3, 100])
def test_last_rows_of_a_single_row_group_validate(tmp_path, count):
    texts = [f"text {i}" for i in range(count)]
    write(tmp_path / "all.parquet", texts)
    corpus = ParquetCorpus(tmp_path / "all.parquet")
    num_val = max(1, count // 20)
    assert texts_of(corpus, "train") == list(corpus.head()) == texts[:-num_val]
    assert texts_of(corpus, "val") == texts[-num_val:]
    assert corpus.validation == f"its last {num_val} documents validate"


def test_one_file_too_small_or_damaged_is_refused(tmp_path):
    write(tmp_path / "one.parquet", ["alone"])
    with pytest.raises(UserError, match=r"one\.parquet holds 1 document, at least 2"):
        ParquetCorpus(tmp_path / "one.parquet")
    (tmp_path / "texts.csv").write_text("text\na\nb\n")
    with pytest.raises(UserError, match=r"texts\.csv is not a parquet file"):
        ParquetCorpus(tmp_path / "texts.csv")
    write(tmp_path / "two.parquet", ["a", "b"])
    with pytest.raises(UserError, match="--val-shard needs a folder"):
        ParquetCorpus(tmp_path / "two.parquet", val_shard="two.parquet")


def test_fingerprint_is_that_of_0_1_where_the_data_is_read_as_then(data_dir):
    """By hand: names and sizes in order. Whatever else is trained on has another."""
    facts = [(p.name, p.stat().st_size) for p in sorted(data_dir.glob("*.parquet"))]
    before = hashlib.sha256(repr(facts).encode()).hexdigest()
    assert ParquetCorpus(data_dir).fingerprint == before
    others = [
        ParquetCorpus(data_dir, val_shard="shard_00001"),
        ParquetCorpus(data_dir, val_shard="shard_00000"),
        ParquetCorpus(data_dir / "shard_00000.parquet"),
    ]
    for path in data_dir.glob("*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.append_column("more", table["text"]), path, row_group_size=25)
    others += [ParquetCorpus(data_dir), ParquetCorpus(data_dir, "more")]
    assert len({before, *(corpus.fingerprint for corpus in others)}) == 6


def test_it_is_kept_when_a_shard_goes(data_dir):
    """Every save asks for it."""
    corpus = ParquetCorpus(data_dir)
    before = corpus.fingerprint
    (data_dir / "shard_00001.parquet").unlink()
    assert corpus.fingerprint == before


def test_flags_of_shards_need_shards(work_dir):
    with pytest.raises(UserError, match="--val-shard a needs parquet shards"):
        open_corpus("stdlib", val_shard="a")
    with pytest.raises(UserError, match="--text-column b needs parquet shards"):
        open_corpus(text_column="b")


def test_no_home(work_dir, monkeypatch):
    def unknown(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.expanduser", unknown)
    assert isinstance(open_corpus(), StdlibCorpus)
    with pytest.raises(UserError, match="~nobody/data: no home folder"):
        open_corpus("~nobody/data")


def test_the_first_documents_are_those_of_the_shards_in_order(tmp_path):
    """Row groups of all sizes, none, nulls and shards without rows among them."""
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(tmp_path / "shard_0.parquet", schema) as writer:
        for texts in (["a", None], [], [None] * 3, documents(150)):
            writer.write_table(pa.table({"text": pa.array(texts, pa.string())}))
    for index, (count, size) in enumerate([(0, 1), (200, 1), (300, 140), (9, 3)], 1):
        write(
            tmp_path / f"shard_{index}.parquet", documents(count, seed=index), row_group_size=size
        )
    corpus = ParquetCorpus(tmp_path)
    assert list(corpus.head()) == texts_of(corpus, "train")
    assert len(texts_of(corpus, "train")) == 151 + 200 + 300


def test_row_groups_are_read_whole(tmp_path):
    """Rows of both splits, nulls and empty ones, of whatever shard."""
    texts = ["a", None, "", "b", None, "c", ""]
    write(tmp_path / "one.parquet", texts)
    corpus = ParquetCorpus(tmp_path / "one.parquet")
    assert corpus.units == {"train": [(0, 0, 0, 6)], "val": [(0, 0, 6, None)]}
    assert corpus.read_groups(0, 0, 1) == [texts]
    assert texts_of(corpus, "train") == ["a", "", "b", "c"] and texts_of(corpus, "val") == [""]
    write(tmp_path / "val.parquet", texts, row_group_size=2)
    write(tmp_path / "test.parquet", texts, row_group_size=7)
    corpus = ParquetCorpus(tmp_path)
    names = [corpus.shard_path(shard).name for shard in range(3)]
    assert names == ["one.parquet", "test.parquet", "val.parquet"]
    assert [corpus.num_groups(shard) for shard in range(3)] == [1, 1, 4]
    assert corpus.units["val"] == [(2, group, 0, None) for group in range(4)]
    assert corpus.read_groups(1, 0, 1) == [texts]  # left out of both splits
    assert corpus.read_groups(2, 1, 3) == [texts[2:4], texts[4:6], texts[6:]]


def test_large_row_groups_are_read_alone(tmp_path):
    """By their bytes in the file, not only by the number of documents."""
    texts = [random.Random(i).randbytes(600_000).hex() for i in range(20)]
    for name in "ab":
        write(tmp_path / f"{name}.parquet", texts, row_group_size=1, compression="none")
    corpus = ParquetCorpus(tmp_path)
    assert corpus.groups_a_read(0) == 6  # 8 MiB of 24


def test_footers_are_parsed_once_for_neighbouring_units(tmp_path, monkeypatch):
    for name in "ab":
        write(tmp_path / f"{name}.parquet", documents(50), row_group_size=1)
    corpus = ParquetCorpus(tmp_path)
    opened = []
    open_file = pq.ParquetFile
    monkeypatch.setattr(pq, "ParquetFile", lambda *a, **k: opened.append(a) or open_file(*a, **k))
    texts_of(corpus, "train")
    assert len(opened) == 1


def test_a_shard_that_changed_since_the_start_is_refused(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.parquet", documents(50), row_group_size=10)
    corpus = ParquetCorpus(tmp_path)
    turned = [text[::-1] for text in documents(50)]
    changes = (documents(50), 5), (documents(50, seed=1), 10), (documents(49), 10), (turned, 10)
    for texts, size in changes:
        write(tmp_path / "a.parquet", texts, row_group_size=size)
        with pytest.raises(UserError, match=r"a\.parquet has changed since the start"):
            corpus.read_groups(0, 0, 1)
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(UserError, match=r"a\.parquet is gone"):
        corpus.read_groups(0, 0, 1)


def test_a_column_of_nulls_alone_is_rows_without_text(tmp_path):
    """As pandas writes a shard whose texts are all None."""
    for name in "abc":
        texts = documents(50) if name != "b" else [None] * 20
        pq.write_table(pa.table({"text": pa.array(texts)}), tmp_path / f"{name}.parquet")
    corpus = ParquetCorpus(tmp_path)
    assert corpus.read_groups(1, 0, 1) == [[None] * 20]
    assert len(list(corpus.head())) == 50


def test_text_in_the_place_of_other_text_of_its_size_is_other_content(tmp_path):
    found = []
    for turn in (1, -1):
        for name in "ab":
            texts = [f"{i:04d} birds sang {i:04d}"[::turn] for i in range(50)]
            pq.write_table(
                pa.table({"text": texts}), tmp_path / f"{name}.parquet",
                compression="none", use_dictionary=False,
            )  # fmt: skip
        found.append(ParquetCorpus(tmp_path))
    assert found[0].fingerprint == found[1].fingerprint
    assert found[0].content != found[1].content
    with pytest.raises(UserError, match="has changed since the start"):
        found[0].read_groups(0, 0, 1)
