import numpy as np
import pytest
import torch

from nanofuse.train.data.__main__ import main
from nanofuse.train.data.corpus import ParquetCorpus
from nanofuse.train.data.loader import DeviceLoader, LoaderState, PackedLoader
from nanofuse.train.errors import UserError


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
