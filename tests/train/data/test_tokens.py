"""The token cache: what it holds, whom it belongs to, and what happens to it."""

import errno
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanofuse.train.data import token_file as module
from nanofuse.train.data.corpus import ParquetCorpus, StdlibCorpus
from nanofuse.train.data.token_file import CachedShard, TokenGroup
from nanofuse.train.data.tokenizer import Tokenizer
from nanofuse.train.data.tokens import TokenCache, open_cache
from nanofuse.train.errors import UserError
from tests.helpers import documents

TEXTS = ["the cat", None, "", "naïve 日本語 🎉", "rain <|bos|> fell", None, "birds " * 50]


@pytest.fixture
def corpus(data_dir):
    """Three shards of 4, 3 and 3 row groups."""
    return ParquetCorpus(data_dir)


@pytest.fixture
def cache(corpus, tokenizer):
    return TokenCache(corpus, tokenizer)


def encode(corpus, tokenizer, shard=0, column=None):
    """The TokenGroups of a shard."""
    groups = corpus.read_groups(shard, 0, corpus.num_groups(shard))
    return [TokenGroup(*tokenizer.encode_flat(texts)) for texts in groups]


def fill(cache, groups, shard=0, first=0):
    """Write groups from `first` after what is there; whether the file was put in its place."""
    writer = cache.writer(shard)
    if cached := cache.open(shard):
        writer.copy_from(cached)
    assert writer.num_groups == first
    for group in groups:
        writer.append(group)
    return writer.close()


def same(cached, groups):
    found = [cached.group(i) for i in range(cached.num_groups)]
    return len(found) == len(groups) and all(
        a.tokens.dtype == b.tokens.dtype
        and a.offsets.dtype == np.int64
        and np.array_equal(a.tokens, b.tokens)
        and np.array_equal(a.offsets, b.offsets)
        for a, b in zip(found, groups, strict=True)
    )


def names(cache, shard=0):
    return sorted(path.name for path in cache.where(shard).iterdir())


@pytest.mark.parametrize("kind", [pa.string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_what_is_kept_is_what_was_encoded(tmp_path, tokenizer, monkeypatch, kind, dtype):
    """Whatever the type of the column, nulls and empty ones included."""
    monkeypatch.setattr(Tokenizer, "dtype", np.dtype(dtype))
    array = pa.array(TEXTS)
    column = array.dictionary_encode() if pa.types.is_dictionary(kind) else array.cast(kind)
    for name in "ab":
        pq.write_table(pa.table({"text": column}), tmp_path / f"{name}.parquet", row_group_size=3)
    corpus = ParquetCorpus(tmp_path)
    cache, groups = TokenCache(corpus, tokenizer), encode(corpus, tokenizer)
    assert cache.open(0) is None and not cache.where(0).exists()
    assert fill(cache, groups)
    cached = cache.open(0)
    assert cached.complete and cached.num_groups == 3 and same(cached, groups)
    assert cached.num_tokens() == sum(len(group.tokens) for group in groups)
    tokens, offsets = cached.group(0)
    assert tokens.dtype == dtype and not tokens.flags.owndata and not tokens.flags.writeable
    assert tokenizer.decode(tokens[1 : offsets[1]]) == TEXTS[0]
    assert offsets[1] == offsets[2] and tokens[offsets[2] :].tolist() == [tokenizer.bos]
    assert cache.where(0) == tmp_path / ".tokens" and len(names(cache)) == 1


def test_it_takes_two_bytes_a_token(tmp_path, tokenizer):
    texts = documents(400, longest=400)
    for name in "ab":
        pq.write_table(pa.table({"text": texts}), tmp_path / f"{name}.parquet", row_group_size=100)
    corpus = ParquetCorpus(tmp_path)
    cache, groups = TokenCache(corpus, tokenizer), encode(corpus, tokenizer)
    fill(cache, groups)
    size = sum(path.stat().st_size for path in cache.where(0).iterdir())
    assert 2 < size / sum(len(group.tokens) for group in groups) < 2.1


def test_a_prefix_is_kept_and_continued(corpus, tokenizer, cache):
    groups = encode(corpus, tokenizer)
    assert fill(cache, groups[:2])
    cached = cache.open(0)
    assert not cached.complete and same(cached, groups[:2])
    writer = cache.writer(0)
    writer.append(groups[0])
    assert not writer.close() and cache.open(0).num_groups == 2  # shorter
    assert not fill(cache, [], first=2)  # as long
    assert not cache.writer(0).close()  # empty
    assert fill(cache, groups[2:], first=2)
    assert cache.open(0).complete and same(cache.open(0), groups) and len(names(cache)) == 1
    writer = cache.writer(1)
    writer.append(encode(corpus, tokenizer, 1)[0])
    assert not writer.close(keep=False) and not writer.close() and cache.open(1) is None


def test_views_outlive_the_file(corpus, tokenizer, cache):
    groups = encode(corpus, tokenizer)
    fill(cache, groups[:2])
    cached = cache.open(0)
    view = cached.group(1)
    fill(cache, groups[2:], first=2)
    cached.close()
    shutil.rmtree(cache.where(0))
    del cached
    assert np.array_equal(view.tokens, groups[1].tokens)


@pytest.mark.parametrize("how", ["in place", "renamed"])
def test_another_content_of_the_same_size_and_time(tmp_path, tokenizer, how):
    texts = documents(50)
    for name in "ab":
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"text": texts}), path, compression="none", use_dictionary=False,
                       write_statistics=False)  # fmt: skip
    cache = TokenCache(ParquetCorpus(tmp_path), tokenizer)
    fill(cache, encode(cache.corpus, tokenizer))
    shard = tmp_path / "a.parquet"
    before = shard.stat()
    target = shard if how == "in place" else tmp_path / "new"
    target.write_bytes(shard.read_bytes().replace(b"birds", b"words"))
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
    target.replace(shard)
    after = shard.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(OSError, match="has changed since the start"):
        cache.writer(0)  # what the corpus has open may be the old one
    assert cache.open(0) is None and not names(cache)
    cache = TokenCache(ParquetCorpus(tmp_path), tokenizer)
    groups = encode(cache.corpus, tokenizer)
    assert fill(cache, groups) and same(cache.open(0), groups)


def test_a_shard_that_changes_while_it_is_written_is_not_kept(corpus, tokenizer, cache):
    groups = encode(corpus, tokenizer)
    writer = cache.writer(0)
    for group in groups:
        writer.append(group)
    shutil.copy(corpus.shards[1], corpus.shards[0])
    assert not writer.close() and not names(cache)


def test_tokenizers_and_columns_have_files_of_their_own(data_dir, tokenizer):
    for path in data_dir.glob("*.parquet"):
        table = pq.read_table(path)
        more = pa.array([text.as_py()[::-1] for text in table["text"]])
        pq.write_table(table.append_column("more", more), path)
    other = Tokenizer(tokenizer.tokens[:-1])
    caches = [
        TokenCache(ParquetCorpus(data_dir, column), each)
        for column in ("text", "more")
        for each in (tokenizer, other)
    ]
    for number, cache in enumerate(caches):
        assert cache.open(0) is None and len(caches) > number
        each = tokenizer if number % 2 == 0 else other
        fill(cache, encode(cache.corpus, each))
        assert len(names(cache)) == number + 1
    for number, cache in enumerate(caches):
        each = tokenizer if number % 2 == 0 else other
        assert same(cache.open(0), encode(cache.corpus, each))


def test_a_folder_of_caches_keeps_data_folders_apart(tmp_path, data_dir, tokenizer):
    shutil.copytree(data_dir, tmp_path / "more" / "data")
    shutil.copy(
        data_dir / "shard_00001.parquet", tmp_path / "more" / "data" / "shard_00000.parquet"
    )
    caches = [
        TokenCache(ParquetCorpus(folder), tokenizer, tmp_path / "cache" / "deep")
        for folder in (data_dir, tmp_path / "more" / "data")
    ]
    for cache in caches:
        fill(cache, encode(cache.corpus, tokenizer))
    folders = {cache.where(0) for cache in caches}
    assert len(folders) == 2 and {path.parent for path in folders} == {tmp_path / "cache" / "deep"}
    assert all(path.name.startswith("data-") for path in folders)
    assert all(same(cache.open(0), encode(cache.corpus, tokenizer)) for cache in caches)
    assert not (data_dir / ".tokens").exists()
    assert TokenCache(StdlibCorpus(), tokenizer).open(0) is None


def test_where_the_flag_has_it(corpus, tokenizer, work_dir):
    assert open_cache(corpus, tokenizer, "off") is None
    assert open_cache(corpus, tokenizer).where(0) == corpus.directory / ".tokens"
    assert open_cache(corpus, tokenizer, "here").where(0).parts[0] == "here"
    assert open_cache(corpus, tokenizer, "~/x").where(0).parent == work_dir.parent / "x"
    (work_dir / "file").touch()
    with pytest.raises(UserError, match="--cache file is not a folder"):
        open_cache(corpus, tokenizer, "file")
    with pytest.raises(UserError, match="--cache ~nobody-here/x: no home"):
        open_cache(corpus, tokenizer, "~nobody-here/x")


def test_a_flipped_bit_is_found(corpus, tokenizer, cache):
    """Wherever it is: nothing else is ever given than what was written, and the file goes."""
    groups = encode(corpus, tokenizer)
    fill(cache, groups)
    (path,) = cache.where(0).iterdir()
    whole, draw, found = path.read_bytes(), random.Random(0), 0
    for _ in range(200):
        content = bytearray(whole)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        cached = cache.open(0)
        if cached is None:
            assert not path.exists()
            found += 1
            continue
        for index, group in enumerate(groups):
            try:
                got = cached.group(index)
            except ValueError as error:
                assert "is damaged" in str(error) and not path.exists()
                found += 1
                break
            assert all(np.array_equal(a, b) for a, b in zip(got, group, strict=True))
    assert found > 150


def test_damage_is_found_in_counting(corpus, tokenizer, cache, monkeypatch):
    fill(cache, encode(corpus, tokenizer))
    cached = cache.open(0)
    monkeypatch.setattr(cached, "num_groups", cached.num_groups + 1)
    with pytest.raises(ValueError, match="shard_00000"):
        cached.num_tokens()
    assert not names(cache)


def test_the_checksum_is_looked_at_before_the_first_use_only(corpus, tokenizer, cache, monkeypatch):
    fill(cache, encode(corpus, tokenizer))
    cached, calls = cache.open(0), []
    monkeypatch.setattr(module, "checksum", lambda *arrays: calls.append(arrays) or "0")
    with pytest.raises(ValueError, match="row group 2 has another checksum"):
        cached.group(2)
    assert len(calls) == 1 and cache.open(0) is None
    monkeypatch.undo()
    fill(cache, encode(corpus, tokenizer))
    cached = cache.open(0)
    first = cached.group(1)
    monkeypatch.setattr(module, "checksum", lambda *arrays: "0")
    assert np.array_equal(cached.group(1).tokens, first.tokens)


@pytest.mark.parametrize("end", [0, 5, 100, -1000, -1])
def test_a_file_cut_short_is_removed(corpus, tokenizer, cache, end):
    groups = encode(corpus, tokenizer)
    fill(cache, groups)
    (path,) = cache.where(0).iterdir()
    path.write_bytes(path.read_bytes()[:end])
    assert cache.open(0) is None and (end == 0 or not path.exists())
    assert fill(cache, groups) and same(cache.open(0), groups)


def test_another_replaced_a_damaged_file(corpus, tokenizer, cache):
    """It stays."""
    groups = encode(corpus, tokenizer)
    fill(cache, groups)
    cached = cache.open(0)
    (path,) = cache.where(0).iterdir()
    shutil.copy(path, path.with_name("new"))
    path.with_name("new").replace(path)
    cached._damaged("for a test")
    assert same(cache.open(0), groups)


def test_a_folder_that_cannot_be_used(corpus, tokenizer, cache, monkeypatch):
    (corpus.directory / ".tokens").write_text("a file")
    assert cache.open(0) is None
    with pytest.raises(FileExistsError):
        cache.writer(0)
    (corpus.directory / ".tokens").unlink()

    def read_only(*args):
        raise OSError(errno.EROFS, "Failed to open local file")

    monkeypatch.setattr(pa, "OSFile", read_only)
    with pytest.raises(OSError, match="Read-only file system.*shard_00000"):
        cache.writer(0)

    def unreadable(path):
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(os, "listdir", unreadable)
    assert cache.open(0) is None
    corpus.shards[0].unlink()
    assert cache.open(0) is None


def test_the_disk_keeps_room_for_checkpoints(corpus, tokenizer, cache, monkeypatch):
    free = module.RESERVE_BYTES
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(OSError, match="less than 2 GiB of its disk would stay free") as error:
        cache.writer(0)
    assert error.value.errno == errno.ENOSPC and not names(cache)
    free += 1 << 20
    groups = encode(corpus, tokenizer)
    writer = cache.writer(0)
    writer.append(groups[0])
    free -= 1 << 20
    with pytest.raises(OSError, match="would stay free") as error:
        writer.append(groups[1])
    assert error.value.errno == errno.ENOSPC
    assert writer.close() and same(cache.open(0), groups[:1])  # what is whole


def test_a_write_that_fails_leaves_nothing(corpus, tokenizer, cache):
    groups = encode(corpus, tokenizer)
    writer = cache.writer(0)
    writer.append(groups[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (writer.path.stat().st_size + 100, hard))
    try:
        with pytest.raises(OSError, match="File too large.*shard_00000"):
            writer.append(groups[1])
        assert not writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not names(cache)


def test_leftovers_of_killed_writers_are_removed(corpus, cache, monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: process.pid)
        cache.writer(0)
    (left,) = names(cache)
    assert left.startswith(".shard_00000.parquet.") and f"-{process.pid}-" in left
    folder = cache.where(0)
    for name, age in (("f" * 8, 3600), ("0" * 8, 90_000)):
        path = folder / f".x.arrow.{'0' * 8}-{process.pid}-{name}-partial"
        path.write_bytes(b"of another host")
        os.utime(path, (time.time() - age,) * 2)
    mine = cache.writer(1)
    kept = names(cache)
    assert len(kept) == 2 and mine.path.name in kept and any("f" * 8 in name for name in kept)
    cache.writer(2).close()
    assert mine.path.exists()  # its process runs
    mine.close()


def test_two_writers_at_once(corpus, tokenizer, cache):
    groups = encode(corpus, tokenizer)
    writers = [cache.writer(0) for _ in range(3)]
    for group in groups:
        for writer in writers:
            writer.append(group)
    reader = None
    for number, writer in enumerate(writers):
        assert writer.close() == (number == 0)
        reader = reader or cache.open(0)
        assert same(cache.open(0), groups)
    assert same(reader, groups) and len(names(cache)) == 1


def test_a_file_of_other_facts_is_not_taken(corpus, tokenizer, cache):
    """Though it has the name."""
    fill(cache, encode(corpus, tokenizer))
    (path,) = cache.where(0).iterdir()
    facts = cache._facts(0)
    CachedShard(path, facts).close()
    with pytest.raises(ValueError, match="is damaged .its schema is another"):
        CachedShard(path, {**facts, "content": "0" * 64})
    assert not path.exists()
