"""Folders of shards as people have them: what is read, in which order, and what is refused."""

import os
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanofuse.train.data.__main__ import main
from nanofuse.train.data.corpus import ParquetCorpus
from nanofuse.train.data.shards import damaged, decode_texts, natural_key, open_shard
from nanofuse.train.errors import UserError
from tests.helpers import documents, texts_of, units_of

TEXTS = ["the cat", "naïve 日本語 🎉", None, "", "the cat", "rain\n\n\tfell"]


def write(path, column, **options):
    pq.write_table(pa.table({"text": column}), path, **options)


def shards(folder, names, **options):
    """A shard for every name, whose first document is its name."""
    folder.mkdir(exist_ok=True)
    for name in names:
        write(folder / name, [name, *documents(10)], **options)
    return folder


def first_texts(corpus, split):
    """Names of the shards of a split, in order, as they were written into them."""
    return [texts[0] for texts in units_of(corpus, split)]


def test_dot_files_are_not_looked_at(data_dir):
    plain = ParquetCorpus(data_dir)
    (data_dir / "._shard_00001.parquet").write_bytes(b"\0\x05\x16\x07Mac OS X")
    (data_dir / "._zz.parquet").write_bytes(b"")
    shutil.copy(data_dir / "shard_00000.parquet", data_dir / ".hidden.parquet")
    (data_dir / ".shard_00003.parquet.partial").mkdir()
    (data_dir / ".folder.parquet").mkdir()
    corpus = ParquetCorpus(data_dir)
    assert corpus.shards == plain.shards and corpus.fingerprint == plain.fingerprint


def test_a_folder_of_dot_files_only_holds_nothing(tmp_path):
    shards(tmp_path / "data", [".a.parquet", ".b.parquet"])
    with pytest.raises(UserError, match="holds 0 parquet shards"):
        ParquetCorpus(tmp_path / "data")


def test_numbers_in_names_count(tmp_path):
    names = [f"shard_{i}.parquet" for i in range(11)]
    corpus = ParquetCorpus(shards(tmp_path / "data", names))
    assert first_texts(corpus, "train") == names[:10] and first_texts(corpus, "val") == names[10:]
    assert len(corpus.hints) == 1 and "2 before 10" in corpus.hints[0]


def test_no_hint_where_the_order_is_the_old_one(data_dir):
    assert not ParquetCorpus(data_dir).hints


def test_natural_order():
    names = ["a1b2", "a1b10", "a2", "a10", "a010b", "b", "b7", "b07", "1", "02", "10", "9" * 200]
    expected = ["1", "02", "10", "9" * 200, "a1b2", "a1b10", "a2", "a10", "a010b", "b", "b07", "b7"]
    assert sorted(names, key=natural_key) == expected


@pytest.mark.parametrize(
    ("names", "val", "train", "words"),
    [
        (["a", "b", "val"], ["val"], ["a", "b"], "by name"),
        (["a", "validation-0", "validation-1", "z"], ["validation-0", "validation-1"], ["a", "z"],
         "validate by name"),
        (["a", "test-00000-of-00001", "train-0"], ["test-00000-of-00001"], ["a", "train-0"],
         "by name"),
        (["Test", "a", "b"], ["Test"], ["a", "b"], "by name"),
        (["test", "train", "validation"], ["validation"], ["train"], "test.parquet left out"),
        (["values_0", "values_1"], ["values_1"], ["values_0"], "values_1.parquet validates"),
        (["test_0", "val_0"], ["val_0"], ["test_0"], "val_0.parquet validates"),
        (["contest", "interval", "zz"], ["zz"], ["contest", "interval"], "zz.parquet validates"),
    ],
)  # fmt: skip
def test_names_that_validate(tmp_path, names, val, train, words):
    corpus = ParquetCorpus(shards(tmp_path / "data", [f"{name}.parquet" for name in names]))
    assert first_texts(corpus, "val") == [f"{name}.parquet" for name in val]
    assert first_texts(corpus, "train") == [f"{name}.parquet" for name in train]
    assert words in corpus.validation and val[0] in corpus.validation
    assert ("by name" in corpus.validation) == (
        any(name[:3].lower() in ("val", "tes") for name in names) and len(names) > 2
    )


@pytest.mark.parametrize("name", ["shard_00000.parquet", "shard_00000", "val.parquet"])
def test_the_validation_shard_can_be_chosen(data_dir, name):
    shutil.copy(data_dir / "shard_00000.parquet", data_dir / "val.parquet")
    corpus = ParquetCorpus(data_dir, val_shard=name)
    assert corpus.val_shards == [f"{name.removesuffix('.parquet')}.parquet"]
    assert "by name" not in corpus.validation
    described = {corpus.describe("train", u)["shard"] for u in range(corpus.num_units("train"))}
    assert described == {p.name for p in data_dir.glob("*.parquet")} - set(corpus.val_shards)


def test_a_validation_shard_that_is_not_there(data_dir):
    with pytest.raises(UserError, match=r"--val-shard no\.parquet: .* has shard_00000\.parquet, "):
        ParquetCorpus(data_dir, val_shard="no.parquet")


def test_info_says_what_validates(tmp_path, capsys):
    folder = shards(tmp_path / "data", [f"part{i}.parquet" for i in (1, 2, 10)] + ["test.parquet"])
    main(["info", "--data", str(folder)])
    out = capsys.readouterr().out
    assert re.search(r"^val: 1 row group \(test\.parquet validates by name", out, re.MULTILINE)
    assert out.index("part1.parquet") < out.index("part2.parquet") < out.index("part10.parquet")
    assert "2 before 10" in out
    main(["info", "--data", str(folder), "--val-shard", "part1.parquet"])
    assert "(part1.parquet validates)" in capsys.readouterr().out
    main(["info", "--data", str(folder / "part1.parquet")])
    assert "its last 1 documents validate" in capsys.readouterr().out
    main(["info", "--data", "stdlib"])
    assert re.search(r"^train: \d+ files\nval: \d+ files$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("command", ["info", "train-tokenizer", "download"])
def test_an_empty_flag_of_the_commands_is_refused(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--data", ""])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "--data" in err and "empty" in err


TYPES = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "binary": pa.binary(),
    "large_binary": pa.large_binary(),
    "binary_view": pa.binary_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "dictionary of bytes": pa.dictionary(pa.int8(), pa.binary()),
    "dictionary of large_string": pa.dictionary(pa.int64(), pa.large_string()),
}


def as_type(texts, kind):
    array = pa.array(texts, pa.string())
    if pa.types.is_dictionary(kind):
        encoded = array.cast(kind.value_type).dictionary_encode()
        return pa.DictionaryArray.from_arrays(
            encoded.indices.cast(kind.index_type), encoded.dictionary
        )
    return array.cast(kind)


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
def test_every_type_of_text_is_read(tmp_path, kind):
    for name in "ab":
        write(tmp_path / f"{name}.parquet", as_type(TEXTS, kind), row_group_size=2)
    corpus = ParquetCorpus(tmp_path)
    expected = [text for text in TEXTS if text is not None]
    assert texts_of(corpus, "train") == list(corpus.head()) == expected
    assert corpus.read_groups(0, 0, 3) == [TEXTS[i : i + 2] for i in (0, 2, 4)]
    assert corpus.tell_replaced() is None


BAD = [b"caf\xe9 \xff\xfe ok", b"fine", b"\xed\xa0\x80", None, b"cut \xf0\x9f"]


def unchecked(kind):
    """BAD in a column of a type, as writers make it that do not check."""
    raw = pa.array(BAD, pa.binary())
    if kind in ("binary", "large_binary", "binary_view"):
        return raw.cast(TYPES[kind])
    text = pa.Array.from_buffers(pa.string(), len(BAD), raw.buffers(), raw.null_count)
    if kind == "dictionary":
        return text.dictionary_encode()
    if kind == "string_view":
        view = raw.cast(pa.binary_view())
        return pa.Array.from_buffers(pa.string_view(), len(BAD), view.buffers(), view.null_count)
    return text


@pytest.mark.parametrize(
    "kind", ["string", "string_view", "dictionary", "binary", "large_binary", "binary_view"]
)
def test_bytes_that_are_not_utf8_are_replaced_and_counted_once(tmp_path, kind):
    for name in "ab":
        write(tmp_path / f"{name}.parquet", unchecked(kind), row_group_size=2)
    corpus = ParquetCorpus(tmp_path)
    expected = [raw.decode(errors="replace") for raw in BAD if raw is not None]
    for _ in range(2):  # as in two epochs, and by the tokenizer before
        assert texts_of(corpus, "train") == expected
    line = corpus.tell_replaced()
    assert "3 training documents" in line and "UTF-8" in line and "U+FFFD" in line
    corpus.read_groups(1, 0, 1)
    assert "1 validation documents" in corpus.tell_replaced()
    corpus.read_groups(1, 1, 2)
    assert corpus.tell_replaced() is None


def test_a_row_counts_for_its_own_split(tmp_path):
    """Of a row group that both splits share, which is read whole."""
    raw = [b"fine"] * 30
    raw[3] = raw[5] = raw[-1] = b"\xff"
    write(tmp_path / "a.parquet", pa.array(raw, pa.binary()))
    corpus = ParquetCorpus(tmp_path / "a.parquet")
    corpus.read_groups(0, 0, 1)
    line = corpus.tell_replaced()
    assert "2 training documents and 1 validation documents" in line
    corpus.read_groups(0, 0, 1)
    assert corpus.tell_replaced() is None


def test_decoding_says_which():
    texts, replaced = decode_texts(pa.chunked_array([pa.array(BAD, pa.binary())] * 2))
    assert replaced == [0, 2, 4, 5, 7, 9] and texts[1] == texts[6] == "fine"


def make_unreadable(folder):
    """{what: (function that spoils shard_00001.parquet, words of the message)}"""
    path = folder / "shard_00001.parquet"
    content = path.read_bytes()

    def column(**columns):
        return lambda: pq.write_table(pa.table(columns), path)

    def array(values, kind):
        return column(text=pa.array(values, kind))

    def replace(make):
        def spoil():
            path.unlink()
            make()

        return spoil

    def flip_footer():
        damaged = bytearray(content)
        damaged[-40:-8] = b"\xff" * 32
        path.write_bytes(damaged)

    def twice():
        both = pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"])
        pq.write_table(both, path)

    return {
        "empty": (lambda: path.write_bytes(b""), "is empty"),
        "ten bytes": (lambda: path.write_bytes(content[:10]), "is truncated"),
        "half": (lambda: path.write_bytes(content[: len(content) // 2]), "is truncated"),
        "a byte less": (lambda: path.write_bytes(content[:-1]), "is truncated"),
        "footer": (flip_footer, "is damaged"),
        "csv": (lambda: path.write_text("text\na\n"), "is not a parquet file"),
        "encrypted": (lambda: path.write_bytes(b"PARE" + content[4:]), "is encrypted"),
        "folder": (replace(path.mkdir), "is a folder"),
        "link": (replace(lambda: path.symlink_to("/nowhere")), "is a link to a file that does not"),
        "pipe": (replace(lambda: os.mkfifo(path)), "is not a regular file"),
        "no column": (column(body=["a"], title=["b"]), "no column 'text' .*body, title.*--text-c"),
        "no columns": (column(), "no column 'text'"),
        "twice": (twice, "more than one column 'text'"),
        "int64": (array([1, 2], pa.int64()), "'text' of .* is of type int64"),
        "list": (array([["a"], ["b"]], pa.list_(pa.string())), "is of type list"),
        "struct": (array([{"a": "b"}], pa.struct([("a", pa.string())])), "is of type struct"),
        "time": (array([1], pa.timestamp("us")), "is of type timestamp"),
        "hashes": (array([b"ab"], pa.binary(2)), r"is of type fixed_size_binary\[2\]"),
    }


KINDS = (
    "empty|ten bytes|half|a byte less|footer|csv|encrypted|folder|link|pipe|no column|no columns|"
    "twice|int64|list|struct|time|hashes"
).split("|")


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_that_cannot_be_used_says_why(data_dir, kind):
    """One line with the file's name, and no advice to destroy data of somebody else's."""
    kinds = make_unreadable(data_dir)
    assert sorted(kinds) == sorted(KINDS)
    spoil, words = kinds[kind]
    spoil()
    with pytest.raises(UserError, match=words) as error:
        ParquetCorpus(data_dir)
    text = str(error.value)
    assert "shard_00001.parquet" in text and "\n" not in text
    assert not re.search(r"(?i)\b(delete|overwrite|remove|rm)\b", text)


@pytest.fixture
def not_root():
    """Permissions do not hold root back."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_permissions(tmp_path, data_dir, request):
    for folder in (tmp_path, *list(tmp_path.parents)[:3]):
        if os.stat(folder).st_uid == os.geteuid() and "pytest" in str(folder):
            folder.chmod(0o755)
    shard = data_dir / "shard_00001.parquet"
    shard.chmod(0)
    request.getfixturevalue("not_root")
    with pytest.raises(UserError, match=r"shard_00001\.parquet cannot be read \(Permission denied"):
        ParquetCorpus(data_dir)


def test_a_folder_that_cannot_be_listed(tmp_path, data_dir, request):
    for folder in (tmp_path, *list(tmp_path.parents)[:3]):
        if os.stat(folder).st_uid == os.geteuid() and "pytest" in str(folder):
            folder.chmod(0o755)
    data_dir.chmod(0)
    request.getfixturevalue("not_root")
    with pytest.raises(UserError, match="cannot be read .Permission denied"):
        ParquetCorpus(data_dir)
    with pytest.raises(UserError, match="cannot be read .Permission denied"):
        ParquetCorpus(data_dir / "shard_00001.parquet")


def flip(path, word, at):
    raw = bytearray(path.read_bytes())
    raw[raw.index(word, at)] ^= 1
    path.write_bytes(raw)


def test_a_flipped_bit_is_found_where_pages_have_checksums(tmp_path):
    plain = {"compression": "none", "use_dictionary": False, "row_group_size": 50}
    texts = documents(300, longest=30)
    for name in "ab":
        write(tmp_path / f"{name}.parquet", texts, write_page_checksum=True, **plain)
    flip(tmp_path / "a.parquet", b"birds", 20_000)
    corpus = ParquetCorpus(tmp_path)
    with pytest.raises(
        UserError, match=r"row group (\d) of shard .*a\.parquet is damaged"
    ) as error:
        corpus.read_groups(0, 0, 6)
    assert "CRC" in str(error.value) and "delete" not in str(error.value)
    group = int(re.search(r"row group (\d)", str(error.value))[1])
    for unit in set(range(6)) - {group}:
        assert corpus.read_groups(0, unit, 1) == [texts[50 * unit : 50 * unit + 50]]
    write(tmp_path / "a.parquet", texts, **plain)
    corpus = ParquetCorpus(tmp_path)  # without checksums, as before
    assert corpus.read_groups(0, 0, 1) == [texts[:50]]


def test_a_text_file_is_told_how_to_become_data(tmp_path):
    (tmp_path / "mine.txt").write_text("some text")
    with pytest.raises(UserError, match=r"mine\.txt is not a parquet .*quickstart\.md says how"):
        ParquetCorpus(tmp_path / "mine.txt")


def test_a_name_that_is_not_utf8_is_said_to_be_one(data_dir):
    """pyarrow would look for another file."""
    shard = data_dir / "shard_00000.parquet"
    strange = data_dir / os.fsdecode(b"s_\xe9.parquet")
    try:
        shutil.copy(shard, strange)
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    with pytest.raises(UserError, match="its name is not UTF-8; rename the file or its folder"):
        open_shard(strange, "text")


def test_what_is_no_damage():
    with pytest.raises(MemoryError):
        damaged("shard x", pa.ArrowMemoryError("malloc of size 60 failed"))
    assert "is encrypted; name" in str(damaged("shard x", OSError("Cannot decrypt ColumnMetadata")))
    assert "is damaged (OSError" not in str(damaged("shard x", OSError("bad page")))
    assert str(damaged("shard x", OSError("bad page"))).startswith("shard x is damaged (bad page)")
