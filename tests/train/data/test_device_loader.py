import numpy as np
import pytest
import torch

from nanofuse.train.data.corpus import ParquetCorpus
from nanofuse.train.data.device_loader import DeviceLoader, restore_state
from nanofuse.train.data.loader import LoaderState, Packing, ThreadLoader
from nanofuse.train.errors import UserError


@pytest.fixture
def packing(data_dir, tokenizer):
    return Packing(ParquetCorpus(data_dir), "train", tokenizer, 8, 64)


def batches(packing, count):
    """[(rows (B, T+1), LoaderState)] of the first batches."""
    loader, found = ThreadLoader(packing), []
    for _ in range(count):
        rows = np.empty((packing.batch_size, packing.seq_len + 1), np.int32)
        found.append((rows, loader.take(rows)))
    loader.close()
    return found


def test_targets_are_shifted_and_the_state_is_that_of_the_batch(packing):
    loader = DeviceLoader(packing, "cpu")
    assert loader.state.position() == LoaderState().position()
    for rows, state in batches(packing, 3):
        inputs, targets = next(loader)
        assert inputs.dtype == targets.dtype == torch.int64
        assert np.array_equal(inputs, rows[:, :-1]) and np.array_equal(targets, rows[:, 1:])
        assert np.array_equal(loader.tokens, rows[:, :-1])
        assert loader.state.position() == state.position()
        assert np.array_equal(loader.state.documents, state.documents)
    loader.close()


@pytest.mark.cuda
@pytest.mark.parametrize("thread", [False, True])
def test_copies_to_a_gpu_are_exact(packing, thread):
    """200 batches with work queued behind each: a pinned buffer reused too early would show."""
    loader = DeviceLoader(packing, "cuda", thread=thread)
    busy = torch.randn(2048, 2048, device="cuda")
    found = []
    for _ in range(200):
        busy = (busy @ busy).clamp(-1, 1)
        batch = next(loader)
        found.append((batch, loader.tokens.clone(), loader.state.position()))
    loader.close()
    for (rows, state), ((inputs, targets), tokens, position) in zip(
        batches(packing, 200), found, strict=True
    ):
        assert np.array_equal(tokens, rows[:, :-1])
        assert np.array_equal(inputs.cpu(), rows[:, :-1])
        assert np.array_equal(targets.cpu(), rows[:, 1:])
        assert position == state.position()


def test_a_saved_state_continues_on_the_device(packing):
    whole = batches(packing, 6)
    state = whole[2][1]
    tensors = {name: torch.from_numpy(array) for name, array in state.to_arrays().items()}
    restored = restore_state({**state.position(), "corpus": "other names do not count"}, tensors)
    loader = DeviceLoader(packing, "cpu", restored)
    for rows, _ in whole[3:]:
        assert np.array_equal(next(loader)[0], rows[:, :-1])
    loader.close()
    tensors["documents"] = tensors["documents"].to(torch.bfloat16)
    with pytest.raises(UserError, match="state of the data loader is damaged"):
        restore_state(state.position(), tensors)
