"""residual_mix by TMA: the numbers of the other kernel, on a Hopper GPU alone."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nanofuse.bench.checks import same_bits
from nanofuse.kernels import residual_mix_tma_kernels as tma
from nanofuse.kernels.common.fp8 import E4M3, E5M2, Scaling
from nanofuse.kernels.common.tuning import Gpu, aimed_at, forced
from nanofuse.kernels.residual_mix import (
    BACKWARD_TILE,
    FORWARD_TILE,
    residual_mix_bwd,
    residual_mix_fwd,
)

HOPPER = Gpu("NVIDIA H200", (9, 0), 132)
BWD, MIX, FWD = "residual_norm_bwd", "residual_mix_bwd", "residual_norm_fwd"
# one block; fewer blocks than programs; shares that differ; units that fill the ring and do not
SHAPES = [
    (32, 128), (4224, 256), (4224, 384), (8224, 512), (4256, 768), (65536, 1024), (8192, 1280),
    (4256, 1536),
]  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def hopper(device):
    """The GPU, if these kernels run on it."""
    if not tma.takes("", torch.empty(32, 256, dtype=torch.bfloat16, device=device)):
        pytest.skip("TMA kernels run on a Hopper GPU alone")
    return device


def randn(device, *shape):
    return torch.randn(*shape, device=device).bfloat16()


@pytest.mark.skipif(not tma.HAS_GLUON, reason="needs Triton")
def test_what_they_take(monkeypatch):
    monkeypatch.setattr(tma, "INTERPRETED", SimpleNamespace(value=False))

    def takes(rows, cols, *others, dtype=torch.bfloat16):
        return tma.takes(BWD, torch.zeros(rows, cols, dtype=dtype), *others)

    with aimed_at(HOPPER):
        assert takes(32, 128) and takes(64, 1536, torch.zeros(64, 1536).bfloat16())
        assert (
            not takes(0, 256) and not takes(48, 256) and not takes(32, 192) and not takes(32, 1664)
        )
        assert not takes(32, 256, None)
        assert not takes(32, 256, torch.zeros(32, 256))
        assert not takes(32, 256, dtype=torch.float32)
        with forced(BWD, BACKWARD_TILE):
            assert not takes(32, 256)
    with aimed_at(replace(HOPPER, capability=(12, 0))):
        assert not takes(32, 256)


class Backward:
    """Inputs of the backward pass of (rows, cols); `opening`: of a mix, with lambda and sum."""

    def __init__(self, shape, opening, dtype, device):
        self.h, self.y, self.g = (randn(device, *shape) for _ in range(3))
        self.rstd = self.y.float().square().mean(dim=1).rsqrt()
        self.factor = torch.tensor([0.9], device=device)
        self.resid = torch.tensor([0.1, 1.1], device=device)[1:] if opening else None
        self.op, self.dtype = MIX if opening else BWD, dtype

    def run(self):
        """grad_y, the sum, both layouts as bytes, and amax."""
        scaling = Scaling.from_bound(8.0, self.dtype, self.h.device)
        grad, total, operand = residual_mix_bwd(
            self.h, self.y, self.rstd, self.g, self.factor, self.y if self.resid is not None else
            None, self.resid, scaling,
        )  # fmt: skip
        total = torch.zeros((), device=grad.device) if total is None else total
        layouts = (x.view(torch.uint8) for x in (operand.data, operand.transposed))
        return grad, total, *layouts, scaling.amax

    def apart(self):
        with forced(self.op, BACKWARD_TILE) as asked:
            found = self.run()
        assert asked
        return found


def compare(found, wanted, rows_of_floats, rounded):
    """The same numbers but for few that lie at a tie, and layouts that agree."""
    for i in rows_of_floats:
        torch.testing.assert_close(found[i], wanted[i], rtol=2e-6, atol=2e-6, equal_nan=True)
    for i in rounded:
        differs = found[i].view(torch.uint8) != wanted[i].view(torch.uint8)
        assert differs.sum() <= max(4, 1e-4 * differs.numel())
    data, transposed = found[-3:-1]
    assert torch.equal(transposed, data.t())


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("opening", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(shape, opening, dtype, hopper):
    case = Backward(shape, opening, dtype, hopper)
    found, wanted = same_bits(case.run), case.apart()
    scale = case.h.float().abs().mean() * case.h.numel() ** 0.5
    assert (found[1] - wanted[1]).abs() <= 1e-4 * scale
    compare(found, wanted, [4], [0, 2])


@pytest.mark.cuda
def test_backward_without_factors(hopper):
    case = Backward((96, 512), True, E5M2, hopper)
    case.factor = case.resid = None
    case.op = BWD
    compare(case.run(), case.apart(), [4], [0, 2])


@pytest.mark.cuda
def test_backward_into_what_is_given(hopper):
    case = Backward((64, 256), True, E5M2, hopper)
    out = torch.full((3, 64, 256), 7.0, dtype=torch.bfloat16, device=hopper)
    scaling = Scaling.from_bound(8.0, E5M2, hopper)
    args = case.h, case.y, case.rstd, case.g, case.factor, case.y, case.resid
    grad, _, _ = residual_mix_bwd(*args, scaling, out[1])
    assert grad.data_ptr() == out[1].data_ptr()
    assert torch.equal(grad, case.run()[0])
    assert (out[0] == 7).all() and (out[2] == 7).all()


@pytest.mark.cuda
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row_and_shows(value, hopper):
    case = Backward((96, 256), False, E5M2, hopper)
    whole = case.run()[0]
    case.h[40, 100] = value
    grad, _, _, _, amax = case.run()
    assert not amax.isfinite() and grad[40].isnan().any()
    others = torch.arange(96, device=hopper) != 40
    assert torch.equal(grad[others], whole[others])


@pytest.mark.cuda
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_forward(shape, hopper):
    x, branch = randn(hopper, *shape), randn(hopper, *shape)

    def run():
        scaling = Scaling.from_bound(shape[1] ** 0.5, E4M3, hopper)
        y, rstd, operand = residual_mix_fwd(x, branch, scaling=scaling)
        layouts = (t.view(torch.uint8) for t in (operand.data, operand.transposed))
        return y, rstd, *layouts, scaling.amax

    found = same_bits(run)
    with forced(FWD, FORWARD_TILE) as asked:
        wanted = run()
    assert asked and torch.equal(found[0], wanted[0])
    compare(found, wanted, [1, 4], [2])


@pytest.mark.cuda
@pytest.mark.large
def test_more_than_two_to_the_31_elements(hopper):
    """The last rows are those of these rows alone."""
    rows, last = 2**21 + 64, 64
    case = Backward((rows, 1024), False, E5M2, hopper)
    grad, _, data, transposed, _ = case.run()
    case.h, case.y, case.g, case.rstd = (
        x[-last:].clone() for x in (case.h, case.y, case.g, case.rstd)
    )
    wanted = case.run()
    assert torch.equal(grad[-last:], wanted[0])
    assert torch.equal(data[-last:], wanted[2]) and torch.equal(transposed[:, -last:], wanted[3])
