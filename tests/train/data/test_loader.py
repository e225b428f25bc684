import itertools
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanofuse.train.data.__main__ import main
from nanofuse.train.data.corpus import ParquetCorpus
from nanofuse.train.data.loader import DeviceLoader, LoaderState, PackedLoader
from nanofuse.train.errors import UserError
from tests.helpers import documents


@pytest.fixture
def corpus(data_dir):
    return ParquetCorpus(data_dir)


def take(loader, count):
    items = [next(loader) for _ in range(count)]
    loader.close()
    return items


def test_rows_start_with_bos_and_batches_repeat(corpus, tokenizer):
    runs = [take(PackedLoader(corpus, "train", tokenizer, 3, 64), 40) for _ in range(2)]
    for (rows, _), (again, _) in zip(*runs, strict=True):
        assert rows.shape == (3, 65) and rows.dtype == np.int32
        assert (rows[:, 0] == tokenizer.bos).all()
        assert np.array_equal(rows, again)


def test_batch_size_does_not_change_the_rows(corpus, tokenizer):
    one = [r for rows, _ in take(PackedLoader(corpus, "train", tokenizer, 1, 64), 30) for r in rows]
    five = [r for rows, _ in take(PackedLoader(corpus, "train", tokenizer, 5, 64), 6) for r in rows]
    assert np.array_equal(np.stack(one), np.stack(five))


@pytest.mark.parametrize("documents", [1, 7, 24])
def test_tasks_do_not_change_the_rows(corpus, tokenizer, monkeypatch, documents):
    """Row groups hold 25 documents: one task each by default, or several."""
    whole = take(PackedLoader(corpus, "train", tokenizer, 3, 64), 60)
    monkeypatch.setattr("nanofuse.train.data.loader.DOCUMENTS_A_TASK", documents)
    parts = take(PackedLoader(corpus, "train", tokenizer, 3, 64), 60)
    assert whole[-1][1].epoch >= 1
    for (rows, state), (same_rows, same_state) in zip(whole, parts, strict=True):
        assert np.array_equal(rows, same_rows)
        assert state.position() == same_state.position()


@pytest.mark.parametrize("cut", [1, 7, 25, 60])
def test_resume_is_exact_across_epochs(corpus, tokenizer, cut):
    whole = take(PackedLoader(corpus, "train", tokenizer, 3, 64), cut + 40)
    assert whole[-1][1].epoch >= 1  # the corpus was read more than once
    state = whole[cut - 1][1]
    restored = LoaderState.restore(state.position(), state.to_tensors())
    rest = take(PackedLoader(corpus, "train", tokenizer, 3, 64, state=restored), 40)
    for (expected, _), (rows, _) in zip(whole[cut:], rest, strict=True):
        assert np.array_equal(expected, rows)


def test_a_state_without_documents_restores():
    state = LoaderState()
    restored = LoaderState.restore(state.position(), state.to_tensors())
    assert restored == state


def test_one_epoch_ends_and_keeps_every_token_it_can(corpus, tokenizer):
    loader = PackedLoader(corpus, "val", tokenizer, 1, 64, epochs=1)
    rows = [rows for rows, _ in loader]
    loader.close()
    total = sum(
        len(ids)
        for unit in range(corpus.num_units("val"))
        for ids in tokenizer.encode_documents(corpus.read("val", unit))
    )
    assert total - 65 < sum(r.size for r in rows) + loader.packer.dropped_tokens <= total
    with pytest.raises(StopIteration):
        next(loader)


def test_an_unreadable_shard_raises_in_the_caller(corpus, tokenizer):
    (corpus.directory / "shard_00000.parquet").write_bytes(b"PAR1")
    loader = PackedLoader(corpus, "train", tokenizer, 1, 64)
    with pytest.raises(UserError, match="shard_00000"):
        next(loader)
    loader.close()


def test_device_loader_shifts_targets_and_reports_its_state(corpus, tokenizer):
    expected = take(PackedLoader(corpus, "train", tokenizer, 2, 32), 3)
    loader = DeviceLoader(PackedLoader(corpus, "train", tokenizer, 2, 32), "cpu")
    for rows, state in expected:
        inputs, targets = next(loader)
        assert inputs.dtype == targets.dtype == torch.int64
        assert np.array_equal(inputs, rows[:, :-1]) and np.array_equal(targets, rows[:, 1:])
        assert loader.state.position() == state.position()
    loader.close()


@pytest.mark.cuda
def test_copies_to_a_gpu_are_exact(corpus, tokenizer):
    """200 batches with work queued behind each: a pinned buffer reused too early would show."""
    expected = take(PackedLoader(corpus, "train", tokenizer, 8, 64), 200)
    loader = DeviceLoader(PackedLoader(corpus, "train", tokenizer, 8, 64), "cuda")
    busy = torch.randn(2048, 2048, device="cuda")
    got = []
    for _ in range(200):
        busy = (busy @ busy).clamp(-1, 1)
        got.append((next(loader), loader.state.position()))
    loader.close()
    for (rows, state), ((inputs, targets), position) in zip(expected, got, strict=True):
        assert np.array_equal(inputs.cpu(), rows[:, :-1])
        assert np.array_equal(targets.cpu(), rows[:, 1:])
        assert position == state.position()


def test_info_lists_the_shards(data_dir, capsys):
    main(["info", "--data", str(data_dir)])
    out = capsys.readouterr().out
    assert "3 parquet shards" in out and "shard_00002.parquet" in out and "60 documents" in out
    main(["info", "--data", "stdlib"])
    assert "standard library" in capsys.readouterr().out


def write(path, texts, **options):
    pq.write_table(pa.table({"text": texts}), path, **options)


def small_groups(folder, groups, count=300):
    """Two shards of the same documents, in row groups of these sizes, again and again."""
    folder.mkdir()
    texts = documents(count, seed=4)
    schema = pa.schema([("text", pa.string())])
    for name in ("a", "b"):
        with pq.ParquetWriter(folder / f"{name}.parquet", schema) as writer:
            rest = list(texts)
            for size in itertools.cycle(groups):
                if not rest:
                    break
                writer.write_table(pa.table({"text": rest[:size]}), row_group_size=size)
                del rest[:size]
    return ParquetCorpus(folder)


@pytest.mark.parametrize("groups", [[1], [1, 9, 2], [150]])
def test_the_size_of_row_groups_does_not_change_the_rows(tmp_path, tokenizer, groups):
    corpus, whole = small_groups(tmp_path / "a", groups), small_groups(tmp_path / "b", [300])
    sizes = [len(corpus.read("train", unit)) for unit in range(corpus.num_units("train"))]
    got, expected = (take(PackedLoader(c, "train", tokenizer, 3, 64), 80) for c in (corpus, whole))
    for (rows, state), (expected_rows, expected_state) in zip(got, expected, strict=True):
        assert np.array_equal(rows, expected_rows)
        assert sum(sizes[: state.unit]) + state.document == expected_state.document
        assert state.reading == expected_state.reading and state.epoch == expected_state.epoch


@pytest.mark.parametrize("cut", [1, 8, 50])
def test_resume_amid_small_row_groups_is_exact(tmp_path, tokenizer, cut, monkeypatch):
    """Units keep their meaning whatever is read together."""
    monkeypatch.setattr("nanofuse.train.data.corpus.READ_DOCUMENTS", 40)
    corpus = small_groups(tmp_path / "data", [1, 9, 2])
    whole = take(PackedLoader(corpus, "train", tokenizer, 3, 64), cut + 30)
    monkeypatch.setattr("nanofuse.train.data.corpus.READ_DOCUMENTS", 7)
    state = whole[cut - 1][1]
    restored = LoaderState.restore(state.position(), state.to_tensors())
    corpus = ParquetCorpus(tmp_path / "data")
    rest = take(PackedLoader(corpus, "train", tokenizer, 3, 64, state=restored), 30)
    for (rows, after), (again, after_again) in zip(whole[cut:], rest, strict=True):
        assert np.array_equal(rows, again)
        assert after.position() == after_again.position() and after.epoch == after_again.epoch


def test_thousands_of_row_groups_are_read_at_half_the_speed_or_more(tmp_path, tokenizer):
    """Of the processor's time, which other processes do not change."""
    texts = documents(3000, seed=1)
    seconds = {}
    for size in (1000, 1):
        folder = tmp_path / str(size)
        folder.mkdir()
        write(folder / "a.parquet", texts, row_group_size=size)
        write(folder / "b.parquet", texts[:9])
        corpus, times = ParquetCorpus(folder), []
        for _ in range(3):
            began = time.process_time()
            loader = PackedLoader(corpus, "train", tokenizer, 8, 64, epochs=1)
            rows = [rows for rows, _ in loader]
            loader.close()
            times.append(time.process_time() - began)
        seconds[size] = min(times)
    assert len(rows) > 100 and seconds[1] <= 2 * seconds[1000], seconds


def test_what_lies_before_a_damaged_row_group_is_trained_on(tmp_path, tokenizer):
    """Though it is read together with it; the error then names the row group."""
    texts = [f"{i} " + "birds sang loudly over hills " * 9 for i in range(40)]
    for name in "ab":
        write(tmp_path / f"{name}.parquet", texts, row_group_size=10, compression="none",
              use_dictionary=False, write_page_checksum=True)  # fmt: skip
    path = tmp_path / "a.parquet"
    content = bytearray(path.read_bytes())
    content[content.index(b"25 birds") + 4] ^= 1
    path.write_bytes(content)
    corpus = ParquetCorpus(tmp_path)
    assert list(corpus.spans("train")) == [(0, 4)]
    loader = PackedLoader(corpus, "train", tokenizer, 1, 64)
    read = list(itertools.islice(loader._load(lambda texts: texts, 0, 4), 3))
    assert read[0] == [(0, 10), (1, 10)] and read[1] == [texts[:20]]
    with pytest.raises(UserError, match=r"row group 2 of shard .*a\.parquet is damaged"):
        for _ in loader:
            pass
    assert (loader.unit, loader.document) == (1, 10)
    loader.close()


def test_the_epoch_is_that_of_what_was_trained(tmp_path, tokenizer):
    """400 documents and a store of 1,000: two epochs and a half are read before the first row."""
    folder = tmp_path / "data"
    folder.mkdir()
    texts = documents(400)
    write(folder / "a.parquet", texts, row_group_size=64)
    write(folder / "b.parquet", texts[:9])
    corpus = ParquetCorpus(folder)
    items = take(PackedLoader(corpus, "train", tokenizer, 4, 64), 400)
    assert items[0][1].reading == 2 and items[0][1].epoch == 0
    tokens = sum(map(len, tokenizer.encode_documents(texts)))
    for number, (_, state) in enumerate(items, 1):
        passes = 4 * 65 * number / tokens  # at least: what was cropped is not in the rows
        assert int(passes) <= state.epoch <= 1.6 * passes + 0.1
    assert items[-1][1].epoch >= 2
    states = [state for _, state in items]
    first = next(i for i, state in enumerate(states) if state.epoch == 1)
    gone = [state.num_read - len(state.buffer) for state in states]
    assert gone[first - 1] < 400 <= gone[first]


def test_a_state_of_0_1_continues(corpus, tokenizer):
    """Without counts, and with whole documents in its buffer."""
    items = take(PackedLoader(corpus, "train", tokenizer, 3, 64), 20)
    state = items[9][1]
    old = {name: state.to_tensors()[name] for name in ("tokens", "lengths")}
    whole = [tokenizer.encode_documents(["birds " * 300])[0], *state.buffer]
    whole.sort(key=len)
    long = {
        "tokens": torch.from_numpy(np.concatenate(whole)),
        "lengths": torch.tensor([len(d) for d in whole]),
    }
    restored = LoaderState.restore(state.position(), long)
    assert max(map(len, restored.buffer)) > 300 and restored.epoch == state.reading
    got = take(PackedLoader(corpus, "train", tokenizer, 3, 64, state=restored), 1)
    assert max(map(len, got[0][1].buffer)) == 65 and max(got[0][1].lengths) > 300
    if max(state.lengths) <= 65:
        restored = LoaderState.restore(state.position(), old)
        got = take(PackedLoader(corpus, "train", tokenizer, 3, 64, state=restored), 10)
        assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(items[10:], got, strict=True))


def test_the_state_holds_a_row_of_each_document(tmp_path, tokenizer):
    texts = ["birds sang " * 400 + str(i) for i in range(60)]
    for name in "ab":
        write(tmp_path / f"{name}.parquet", texts, row_group_size=20)
    items = take(PackedLoader(ParquetCorpus(tmp_path), "train", tokenizer, 2, 32), 20)
    tensors = items[9][1].to_tensors()
    assert 32_000 < len(tensors["tokens"]) <= 33 * 1000 and tensors["whole_lengths"].min() > 400
    restored = LoaderState.restore(items[9][1].position(), tensors)
    corpus = ParquetCorpus(tmp_path)
    rest = take(PackedLoader(corpus, "train", tokenizer, 2, 32, state=restored), 10)
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(items[10:], rest, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": None},
        {"tokens": torch.zeros(5, dtype=torch.int32)},
        {"tokens": torch.zeros(9, dtype=torch.int64)},
        {"tokens": torch.zeros(3, 3, dtype=torch.int32)},
        {"lengths": torch.tensor([9, 0])},
        {"lengths": torch.tensor([-1, 10])},
        {"lengths": torch.tensor([2**62, 2**62])},
        {"lengths": torch.tensor([4.0, 5.0])},
        {"whole_lengths": torch.tensor([3, 5])},
        {"whole_lengths": torch.tensor([7, 5])},
        {"whole_lengths": torch.tensor([9])},
        {"counts": torch.tensor([1])},
        {"counts": torch.tensor([-1, 0])},
        {"counts": torch.tensor([1.0, 0.0])},
        {"epoch": -1},
        {"unit": 1.5},
        {"document": None},
        {"epoch": True},
        {"unit": 2**63},
    ],
    ids=str,
)
def test_a_damaged_state_is_refused(change):
    state = LoaderState(0, 1, 2, [np.zeros(4, np.int32), np.zeros(5, np.int32)], [4, 5], 20, 7)
    parts = {**state.position(), **state.to_tensors()}
    split = {"epoch", "unit", "document"}

    def restore(parts):
        return LoaderState.restore(
            {n: v for n, v in parts.items() if n in split},
            {n: v for n, v in parts.items() if n not in split and v is not None},
        )

    again = restore(parts)
    assert again.position() == state.position() and (again.num_read, again.epoch_size) == (20, 7)
    with pytest.raises(UserError, match="state of the data loader is damaged"):
        restore({**parts, **change})


def test_a_state_of_other_data_or_another_tokenizer_is_refused(corpus, tokenizer):
    with pytest.raises(UserError, match="is of other data"):
        PackedLoader(corpus, "train", tokenizer, 1, 64, state=LoaderState(unit=99))
    for token in (-1, 320):
        buffer = [np.full(3, token, np.int32)]
        with pytest.raises(UserError, match="is of another tokenizer"):
            state = LoaderState(buffer=buffer, lengths=[3])
            PackedLoader(corpus, "train", tokenizer, 1, 64, state=state)


def test_rows_left_over_fill_a_last_batch(corpus, tokenizer):
    """At every batch size the same rows; those added count no bytes."""
    rows = {}
    for batch in (1, 4, 7):
        loader = PackedLoader(corpus, "val", tokenizer, batch, 64, epochs=1, fill=True)
        items = [rows for rows, _ in loader]
        loader.close()
        assert all(item.shape == (batch, 65) for item in items)
        rows[batch] = np.concatenate(items)
    whole = rows[1]
    for batch, found in rows.items():
        assert np.array_equal(found[: len(whole)], whole) and len(found) - len(whole) < batch
        assert (found[len(whole) :] == tokenizer.bos).all()
    assert not tokenizer.token_bytes()[tokenizer.bos]
    assert len(rows[7]) > len(whole)


def test_documents_that_are_not_utf8_are_told_of_once(tmp_path, tokenizer, capsys):
    raw = [b"caf\xe9 and birds", *(text.encode() for text in documents(40))] * 5
    for name in "ab":
        write(tmp_path / f"{name}.parquet", pa.array(raw, pa.binary()), row_group_size=41)
    corpus = ParquetCorpus(tmp_path)
    for _ in range(2):
        take(PackedLoader(corpus, "train", tokenizer, 2, 64), 30)
    out = capsys.readouterr().out
    assert out.count("UTF-8") == 1 and "5 training documents" in out
    take(PackedLoader(corpus, "val", tokenizer, 2, 64), 3)
    assert "5 validation documents" in capsys.readouterr().out
