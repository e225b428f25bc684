"""Row groups to tokens in the background, and the command that does all shards."""

import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanofuse.train.command import run_command
from nanofuse.train.data import encode as module
from nanofuse.train.data.__main__ import main
from nanofuse.train.data.corpus import ParquetCorpus, StdlibCorpus
from nanofuse.train.data.encode import Encoders, encoded_groups, fill_cache, split_tasks
from nanofuse.train.data.token_file import CacheWriter, TokenGroup
from nanofuse.train.data.tokenizer import Tokenizer
from nanofuse.train.data.tokens import TokenCache
from nanofuse.train.errors import UserError
from tests.helpers import documents


def direct(corpus, tokenizer, shard, first, count):
    """What encoded_groups has to give."""
    groups = corpus.read_groups(shard, first, count)
    return [TokenGroup(*tokenizer.encode_flat(texts)) for texts in groups]


def same(found, expected):
    return len(found) == len(expected) and all(
        a.tokens.dtype == b.tokens.dtype
        and a.offsets.dtype == b.offsets.dtype == np.int64
        and np.array_equal(a.tokens, b.tokens)
        and np.array_equal(a.offsets, b.offsets)
        for a, b in zip(found, expected, strict=True)
    )


def shards(folder, texts, **options):
    """A corpus of two shards of the same texts."""
    folder.mkdir(exist_ok=True)
    for name in "ab":
        pq.write_table(pa.table({"text": pa.array(texts)}), folder / f"{name}.parquet", **options)
    return ParquetCorpus(folder)


def helpers():
    """Threads of encoded_groups that run."""
    return [t for t in threading.enumerate() if t.name == "read" or t.name.startswith("encode")]


@pytest.mark.parametrize("documents_a_task", [1, 7, 128])
@pytest.mark.parametrize("threads", [1, 3, None])
def test_they_are_those_of_the_tokenizer(
    tmp_path, tokenizer, monkeypatch, threads, documents_a_task
):
    monkeypatch.setattr(module, "TASK_DOCUMENTS", documents_a_task)
    monkeypatch.setattr(module, "TASK_CHARS", 600)
    texts = [*documents(70), None, "", None, *documents(20, seed=1), "birds sang " * 200, None]
    corpus = shards(tmp_path, texts, row_group_size=20)
    expected = direct(corpus, tokenizer, 0, 0, 5)
    assert same(list(encoded_groups(corpus, tokenizer, 0, threads=threads)), expected)
    assert same(list(encoded_groups(corpus, tokenizer, 1, 3, threads=threads)), expected[3:])
    assert same(list(encoded_groups(corpus, tokenizer, 0, 1, 2, threads)), expected[1:3])
    assert list(encoded_groups(corpus, tokenizer, 0, 5)) == []


def test_rows_of_the_library(tokenizer):
    corpus = StdlibCorpus()
    found = list(encoded_groups(corpus, tokenizer, 1, 0, 1))
    assert same(found, direct(corpus, tokenizer, 1, 0, 1))


def test_ids_of_32_bits_and_empty_groups(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(Tokenizer, "dtype", np.dtype(np.uint32))
    texts = [None] * 4 + ["the cat"]
    corpus = shards(tmp_path, pa.array(texts, pa.string()), row_group_size=2)
    found = list(encoded_groups(corpus, tokenizer, 0))
    assert same(found, direct(corpus, tokenizer, 0, 0, 3)) and found[2].tokens.dtype == np.uint32
    assert found[0].offsets.tolist() == [0, 0, 0] and not len(found[0].tokens)


def test_tasks_are_bounded_by_documents_and_characters(monkeypatch):
    monkeypatch.setattr(module, "TASK_DOCUMENTS", 3)
    monkeypatch.setattr(module, "TASK_CHARS", 10)
    assert split_tasks([]) == []
    assert split_tasks([None, ""]) == [[None, ""]]
    assert split_tasks(["a"] * 7) == [["a"] * 3, ["a"] * 3, ["a"]]
    texts = ["a" * 4, None, "b" * 6, "c", "d" * 50, "e" * 10, None, "", "f"]
    assert [len(task) for task in split_tasks(texts)] == [3, 1, 1, 3, 1]
    assert [text for task in split_tasks(texts) for text in task] == texts


def test_tasks_are_of_128_documents_or_half_a_million_characters():
    assert [len(task) for task in split_tasks(["a"] * 300)] == [128, 128, 44]
    assert [len(task) for task in split_tasks(["a" * 2**18] * 5)] == [2, 2, 1]


def test_tasks_of_what_nobody_asked_for_are_dropped():
    ahead = module._Ahead(10, 10)
    futures = [Future() for _ in range(3)]
    ahead.put((futures[:2], [1]))
    ahead.put((futures[2:], [1]))
    ahead.put(None)
    ahead.cancel()
    assert all(future.cancelled() for future in futures)


@pytest.mark.parametrize("bound", ["documents", "characters"])
def test_few_row_groups_are_ahead(tmp_path, tokenizer, monkeypatch, bound):
    """Of 40 row groups of 10 documents: by either bound at most 3, and the one that waits."""
    monkeypatch.setattr("nanofuse.train.data.corpus.READ_DOCUMENTS", 1)
    corpus = shards(tmp_path, documents(400), row_group_size=10)
    largest = max(sum(map(len, texts)) for texts in corpus.read_groups(0, 0, 40))
    if bound == "documents":
        monkeypatch.setattr(module, "TASK_DOCUMENTS", 15)  # 2 tasks ahead: 30
    else:
        monkeypatch.setattr(module, "TASK_CHARS", 1)
        monkeypatch.setattr(module, "MIN_CHARS_AHEAD", 3 * largest)
    read, read_groups = [], corpus.read_groups
    monkeypatch.setattr(
        corpus, "read_groups", lambda *args: read.append(args[1]) or read_groups(*args)
    )
    furthest = 0
    for number, _ in enumerate(encoded_groups(corpus, tokenizer, 0, threads=1)):
        if number in (0, 1, 10, 30):
            time.sleep(0.1)  # for the reader to get as far as it may
            ahead = read[-1] - number
            furthest = max(furthest, ahead)
    assert number == 39 and 3 <= furthest <= (4 if bound == "documents" else 10)


def test_a_row_group_larger_than_the_bounds_is_read(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "TASK_DOCUMENTS", 2)
    monkeypatch.setattr(module, "MIN_CHARS_AHEAD", 5)
    monkeypatch.setattr(module, "TASK_CHARS", 5)
    corpus = shards(tmp_path, documents(90), row_group_size=30)
    found = list(encoded_groups(corpus, tokenizer, 0, threads=2))
    assert same(found, direct(corpus, tokenizer, 0, 0, 3))


def test_threads_may_serve_several_shards(tmp_path, tokenizer):
    """With encodings of their own; what nobody asks for any more is dropped."""
    corpus = shards(tmp_path, documents(200), row_group_size=10)
    with Encoders(tokenizer, 2) as encoders:
        for shard in (0, 1):
            first = encoded_groups(corpus, tokenizer, shard, encoders=encoders)
            next(first)
            first.close()
            groups = encoded_groups(corpus, tokenizer, shard, encoders=encoders)
            assert same(list(groups), direct(corpus, tokenizer, shard, 0, 20))
        assert not any(thread.name == "read" for thread in helpers()) and len(helpers()) == 2
        own = encoders.pool.submit(lambda: encoders.own.tokenizer).result()
        assert own.encoding is not tokenizer.encoding and own.dtype == tokenizer.dtype
    assert not helpers()


def test_closing_stops_the_threads(tmp_path, tokenizer):
    corpus = shards(tmp_path, documents(600), row_group_size=10)
    before = helpers()
    groups = encoded_groups(corpus, tokenizer, 0, threads=2)
    assert helpers() == before  # none until it is asked
    next(groups)
    assert len(helpers()) > len(before)
    groups.close()
    assert helpers() == before
    list(encoded_groups(corpus, tokenizer, 0, threads=2))
    assert helpers() == before


def test_what_lies_before_damage_is_given(tmp_path, tokenizer):
    """Though it is read together with it; the error then names the row group."""
    texts = [f"{i} birds sang loudly over hills" for i in range(40)]
    plain = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    shards(tmp_path, texts, row_group_size=10, **plain)
    path = tmp_path / "a.parquet"
    content = bytearray(path.read_bytes())
    content[content.index(b"25 birds") + 4] ^= 1
    path.write_bytes(content)
    corpus, found = ParquetCorpus(tmp_path), []
    assert corpus.groups_a_read(0) > 3
    with pytest.raises(UserError, match=r"row group 2 of shard .*a\.parquet is damaged"):
        for group in encoded_groups(corpus, tokenizer, 0):
            found.append(group)
    assert same(found, direct(corpus, tokenizer, 0, 0, 2)) and not helpers()
    cache = TokenCache(corpus, tokenizer)
    with pytest.raises(UserError, match="row group 2"):
        fill_cache(corpus, tokenizer, cache)
    assert cache.open(0).num_groups == 2 and not cache.open(0).complete


def test_an_error_of_the_tokenizer_comes_at_its_row_group(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("nanofuse.train.data.corpus.READ_DOCUMENTS", 1)
    corpus = shards(tmp_path, [*documents(25), "a bad one"], row_group_size=10)
    encode_flat = Tokenizer.encode_flat

    def failing(self, texts):
        if "a bad one" in texts:
            raise UserError("the tokenizer's library failed")
        return encode_flat(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_flat", failing)
    groups = encoded_groups(corpus, tokenizer, 0)
    assert len([next(groups), next(groups)]) == 2
    with pytest.raises(UserError, match="library failed"):
        next(groups)
    assert not helpers()


def test_torch_is_not_loaded():
    """By what runs in a process of its own."""
    code = (
        "import sys\nfrom nanofuse.train.data import corpus, encode, tokens\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=module.__file__.split("/train/")[0]
    )


def test_the_command_writes_what_is_missing(data_dir, tokenizer, capsys, monkeypatch):
    data = ["--data", str(data_dir)]
    main(["tokenize", *data])
    corpus = ParquetCorpus(data_dir)
    cache = TokenCache(corpus, tokenizer)
    total = 0
    for shard, groups in enumerate((4, 3, 3)):
        cached = cache.open(shard)
        found = [cached.group(i) for i in range(groups)]
        assert cached.complete and same(found, direct(corpus, tokenizer, shard, 0, groups))
        total += cached.num_tokens()
    out = capsys.readouterr().out
    assert f"{total:,} tokens of 3 shards written" in out and re.search(r"[\d,]+ tokens/s", out)
    assert str(data_dir / ".tokens") in out
    files = {path: path.stat().st_ino for path in cache.where(0).iterdir()}
    main(["tokenize", *data])
    assert "nothing to do" in capsys.readouterr().out
    assert files == {path: path.stat().st_ino for path in cache.where(0).iterdir()}
    writer = cache.writer(1)
    next(cache.where(1).glob("shard_00001*")).unlink()
    writer.append(direct(corpus, tokenizer, 1, 0, 1)[0])
    writer.close()
    main(["info", *data])
    out = capsys.readouterr().out
    assert out.splitlines()[1:3] == [
        "train: 7 row groups",
        f"val: 3 row groups ({corpus.validation})",
    ]
    assert re.search(r"shard_00000.* [\d,]+ tokens cached$", out, re.MULTILINE)
    assert re.search(r"shard_00001.* [\d,]+ tokens cached, of 1 of 3 row groups$", out, re.M)
    encoded, encode_flat = [], Tokenizer.encode_flat
    monkeypatch.setattr(
        Tokenizer, "encode_flat", lambda self, t: encoded.append(len(t)) or encode_flat(self, t)
    )
    main(["tokenize", *data, "--workers", "1"])
    assert sum(encoded) == 70 - 25 and "tokens of 1 shards written" in capsys.readouterr().out
    for path in cache.where(0).iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    main(["info", *data])
    assert "cached" not in capsys.readouterr().out


def test_the_command_writes_into_another_folder(tmp_path, data_dir, capsys):
    flags = ["--data", str(data_dir / "shard_00000.parquet"), "--cache", str(tmp_path / "cache")]
    tokenizer = Tokenizer.load(data_dir / "tokenizer.json")
    tokenizer.save(data_dir / "shard_00000.parquet.tokenizer.json")
    main(["tokenize", *flags])
    assert "of 1 shards" in capsys.readouterr().out and not (data_dir / ".tokens").exists()
    main(["info", *flags])
    assert "tokens cached" in capsys.readouterr().out
    main(["info", *flags[:2]])
    assert "cached" not in capsys.readouterr().out


def ended(argv, capsys):
    """Exit code and stderr of the command."""
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main(argv))
    return stop.value.code, capsys.readouterr().err


def test_what_stands_in_the_way_is_said_in_a_line(tmp_path, data_dir, capsys, monkeypatch):
    data = ["--data", str(data_dir)]
    (tmp_path / "file").write_text("")
    shutil_free = "nanofuse.train.data.token_file.shutil.disk_usage"
    cases = [
        (["--data", "stdlib"], "the standard library has no shards to tokenize"),
        ([*data, "--cache", "off"], "--cache off: "),
        ([*data, "--cache", str(tmp_path / "file")], "file is not a folder; name one"),
        ([*data, "--workers", "0"], "--workers must be at least 1"),
        ([*data, "--cache", ""], "--cache is empty|--cache: is empty"),
    ]
    for flags, words in cases:
        code, err = ended(["tokenize", *flags], capsys)
        assert code == 2 and err.count("\n") == 1 and re.search(words, err), err
    with monkeypatch.context() as patch:
        patch.setattr(shutil_free, lambda path: type("Usage", (), {"free": 10}))
        code, err = ended(["tokenize", *data], capsys)
    assert code == 2 and err.count("\n") == 1 and "less than 2 GiB of its disk would stay" in err
    (data_dir / "tokenizer.json").unlink()
    code, err = ended(["tokenize", *data], capsys)
    assert code == 2 and err.count("\n") == 1 and "train-tokenizer" in err


def test_control_c_keeps_what_is_whole(data_dir, tokenizer, capsys, monkeypatch):
    corpus = ParquetCorpus(data_dir)
    append = CacheWriter.append

    def interrupted(self, group):
        append(self, group)
        if self.num_groups == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(CacheWriter, "append", interrupted)
    code, err = ended(["tokenize", "--data", str(data_dir)], capsys)
    assert code == 130 and not err and not helpers()
    cached = TokenCache(corpus, tokenizer).open(0)
    found = [cached.group(i) for i in range(cached.num_groups)]
    assert same(found, direct(corpus, tokenizer, 0, 0, 2))
    assert len(list((data_dir / ".tokens").iterdir())) == 1


def test_a_shard_replaced_meanwhile_is_said(data_dir, tokenizer, monkeypatch):
    corpus = ParquetCorpus(data_dir)
    cache = TokenCache(corpus, tokenizer)

    def replaced(groups):
        if groups == 1:
            content = corpus.shards[0].read_bytes()
            corpus.shards[0].unlink()
            corpus.shards[0].write_bytes(content)

    with pytest.raises(UserError, match=r"shard .*shard_00000\.parquet has changed since"):
        fill_cache(corpus, tokenizer, cache, progress=replaced)


def test_what_another_process_wrote_meanwhile_will_do(data_dir, tokenizer, monkeypatch):
    """A writer that found a complete file in its place."""
    close = CacheWriter.close
    monkeypatch.setattr(CacheWriter, "close", lambda self, **keep: close(self, **keep) and False)
    corpus = ParquetCorpus(data_dir)
    cache = TokenCache(corpus, tokenizer)
    assert fill_cache(corpus, tokenizer, cache)[0] == 3
    assert all(cache.open(shard).complete for shard in range(3))
