"""What a case of an op is: one call at the sizes of a model, and the least work that it is.

The bytes of a call are counted from its tensors, so that bench, tuner and page agree on them.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from nanofuse.bench.harness import ON_GPU
from nanofuse.kernels.common.fp8 import FP8Operand
from nanofuse.train.gpu import copy_ceiling, matmul_ceiling

SEQUENCE = 2048 if ON_GPU else 16  # tokens of a sequence, at most
ROWS = 65536 if ON_GPU else 32  # positions of a micro-step
BIGRAM_FACTOR = 5  # rows of the bigram table per token of the vocabulary


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model; its width is heads * head_dim."""

    layers: int
    heads: int
    head_dim: int
    vocab: int

    @property
    def width(self):
        return self.heads * self.head_dim


D16 = Sizes(layers=16, heads=8, head_dim=128, vocab=32768)
TINY = Sizes(layers=2, heads=2, head_dim=32, vocab=64)
_timed = [D16]  # the last one's shapes are timed on a GPU


@contextlib.contextmanager
def of_width(width):
    """Context in which cases on a GPU have the shapes of the recipe's model of this width, a
    multiple of 128."""
    _timed.append(replace(D16, layers=width // 64, heads=width // D16.head_dim))
    try:
        yield
    finally:
        _timed.pop()


def sizes(device):
    """Sizes of the model whose shapes are timed; tiny ones for Triton's interpreter."""
    return _timed[-1] if device.type == "cuda" else TINY


def nbytes(*content):
    """Bytes of tensors, of both layouts of FP8 operands, of lists of these; numbers count as they
    are, None as nothing."""
    total = 0
    for x in content:
        if isinstance(x, torch.Tensor):
            total += x.numel() * x.element_size()
        elif isinstance(x, FP8Operand):
            total += nbytes(x.data, x.transposed)
        elif isinstance(x, (tuple, list)):
            total += nbytes(*x)
        else:
            total += x or 0
    return total


def looked_up(
    table,  # (R, C)
    rows,  # (...) integer
):
    """Bytes of the distinct rows of a table that are looked up: each is moved once."""
    return rows.unique().numel() * table.size(1) * table.element_size()


@dataclass(frozen=True)
class Case:
    """One call of an op, to be checked and timed."""

    run: Callable[[], Any]
    shape: Any  # for people
    read: Any = ()  # what it must read, as `nbytes` takes it
    written: Any = ()  # what it must write in place; what `run` returns is counted beside it
    returns_new: bool = True  # whether what `run` returns is new memory, which it writes
    flops: float = 0.0  # of its matrix products
    args: tuple = ()  # inputs, for a reference to take them too

    @functools.cached_property
    def bytes_moved(self):
        """The bytes that it must at least read and write. Calls `run`."""
        returned = self.run() if self.returns_new else ()
        return nbytes(self.read, self.written, returned)

    def share(self, seconds):
        """Share of the roof: the least time, by the measured copy bandwidth or by cuBLAS's FLOP/s,
        whichever is longer, over the time taken."""
        by_bytes = self.bytes_moved / seconds / copy_ceiling()
        return max(by_bytes, self.flops / seconds / matmul_ceiling() if self.flops else 0.0)


def randn(device, *shape):
    return torch.randn(*shape, device=device).bfloat16()


def rows_of_tokens(rows):
    """Shape (B, T) of a batch of `rows` positions."""
    return max(rows // SEQUENCE, 1), min(rows, SEQUENCE)
