"""Sums of squares of a list of gradients, against fp64."""

import pytest
import torch

from nanofuse.kernels.common.tuning import forced
from nanofuse.kernels.gradient_squares import (
    PARTIALS,
    GradientSquares,
    SquaresConfig,
    gradient_squares_ref,
)

SMALL = SquaresConfig(block_bytes=64, warps=1)  # 16 elements of fp32, 32 of bf16
SHAPES = [(1,), (15,), (16,), (17,), (3, 31), (0,), (127,), (4, 4, 4)]


def make(device, dtypes=(torch.float32, torch.bfloat16), shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator).to(device, dtypes[i % len(dtypes)])
        for i, shape in enumerate(shapes)
    ]


def relative(x, truth):
    return ((x.double() - truth).abs() / truth.abs().clamp_min(1e-30)).max().item()


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,), None])
@pytest.mark.parametrize("config", [SMALL, SquaresConfig()])
def test_error_is_at_most_twice_that_of_torch(device, dtypes, config):
    grads = make(device, dtypes or (torch.float32, torch.bfloat16))
    with forced("gradient_squares", config):
        op = GradientSquares(grads)
    truth = gradient_squares_ref(grads)
    theirs = torch.stack([g.float().square().sum() for g in grads])
    assert op().dtype == torch.float32
    error, allowed = relative(op(), truth), relative(theirs, truth)
    print(f"{error:.3g}, torch {allowed:.3g}")
    assert error <= 2 * allowed + 1e-7  # an eighth of fp32's spacing at 1


def test_more_blocks_than_are_added_at_once(device):
    (g,) = make(device, shapes=[(16 * (PARTIALS + 3) + 5,)])
    with forced("gradient_squares", SMALL):
        op = GradientSquares([g])
    assert relative(op(), gradient_squares_ref([g])) < 1e-6


def test_rows_that_lie_apart(device):
    """Beside contiguous gradients; what is between the rows does not count."""
    grads = make(device, (torch.bfloat16,), [(9, 48), (5,), (9, 7)])
    some = [grads[0][2::4], grads[1], grads[2][::2]]
    truth = gradient_squares_ref(some)
    for x, step in ((grads[0], 4), (grads[2], 2)):
        between = torch.arange(9, device=device) % step != (2 if step == 4 else 0)
        x[between] = float("nan")
    for config in (SMALL, SquaresConfig()):
        with forced("gradient_squares", config):
            assert relative(GradientSquares(some)(), truth) < 1e-6


def test_values_are_read_anew_and_bits_repeat(device):
    grads = make(device)
    op = GradientSquares(grads)
    assert torch.equal(op(), op())
    grads[1].mul_(2)
    assert relative(op(), gradient_squares_ref(grads)) < 1e-6


def test_addresses_that_are_not_aligned(device):
    storage = torch.randn(200, device=device)
    grads = [storage[1:18], storage[20:52], storage[53:150]]
    with forced("gradient_squares", SMALL):
        op = GradientSquares(grads)
    assert relative(op(), gradient_squares_ref(grads)) < 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("at", [0, 4, 7])
def test_what_is_not_finite_shows_in_its_tensor_only(device, value, at):
    grads = make(device)
    grads[at].view(-1)[-1] = value
    finite = torch.isfinite(GradientSquares(grads)()).tolist()
    assert finite == [i != at for i in range(len(grads))]


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ([], "at least one"),
        ([torch.zeros(4, 4).t()[:, :2]], "gradient 0: .*contiguous"),
        ([torch.zeros(4), torch.zeros(4).double()], "gradient 1: .*float64"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(grads, message):
    with pytest.raises(ValueError, match=message):
        GradientSquares(grads)
