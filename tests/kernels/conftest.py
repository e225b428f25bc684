"""Kernels are tested on hostile memory: their outputs start as NaN, surrounded by guard bytes."""

import pytest
import torch

from nanofuse.kernels.common import panel

GUARD = 256  # bytes on each side; keeps the alignment of a fresh allocation
SENTINEL = 0xA5
REAL_EMPTY = torch.empty


class HostileMemory:
    """Replaces torch.empty, empty_like and Tensor.new_empty; `check` looks at the guards."""

    def __init__(self):
        self.buffers = []

    def empty(self, *size, dtype=None, device=None, **kwargs):
        if len(size) == 1 and isinstance(size[0], (tuple, list, torch.Size)):
            size = tuple(size[0])
        dtype = dtype or torch.get_default_dtype()
        count = torch.Size(size).numel() * dtype.itemsize
        padded = -(-count // 16) * 16
        raw = REAL_EMPTY(padded + 2 * GUARD, dtype=torch.uint8, device=device)
        raw.fill_(SENTINEL)
        inner = raw[GUARD : GUARD + count]
        inner.fill_(0xFF)  # NaN in every float format here; -1 or 255 in integers
        self.buffers.append((raw, count))
        return inner.view(dtype).view(size)

    def empty_like(self, x, dtype=None, device=None, **kwargs):
        return self.empty(*x.shape, dtype=dtype or x.dtype, device=device or x.device)

    def new_empty(self, x, *size, dtype=None, device=None, **kwargs):
        return self.empty(*size, dtype=dtype or x.dtype, device=device or x.device)

    def check(self):
        for raw, count in self.buffers:
            ends = torch.cat([raw[:GUARD], raw[GUARD + count :]])
            assert (ends == SENTINEL).all(), "a kernel wrote outside of its output"


@pytest.fixture(autouse=True)
def hostile_memory(monkeypatch):
    memory = HostileMemory()
    monkeypatch.setattr(torch, "empty", memory.empty)
    monkeypatch.setattr(torch, "empty_like", memory.empty_like)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *s, **k: memory.new_empty(x, *s, **k))
    yield memory
    memory.check()


@pytest.fixture(scope="session")
def device():
    """A GPU where there is one, else the CPU under Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def hopper(device):
    """The GPU, if panels run on it."""
    if not panel.takes("", device, 128, 256, 256):
        pytest.skip("panels run on a Hopper GPU alone")
    return device
