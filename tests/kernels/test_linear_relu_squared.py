from dataclasses import replace

import pytest
import torch

from bench.tune import CASES
from kernels.fp8 import E4M3, FP8Operand, Scaling
from kernels.linear_relu_squared import (
    LinearTile,
    linear_relu_squared_fwd,
    linear_relu_squared_ref,
)
from kernels.quantize import quantize
from kernels.relu_squared import relu_squared_fwd
from kernels.tuning import forced
from tests.kernels.checks import (
    ON_GPU,
    assert_accurate,
    assert_fp8,
    fp8_steps,
    relative_error,
    same_bits,
)

OP = "linear_relu_squared"
SHAPES = [(16, 16, 16), (64, 32, 64), (80, 48, 144), (160, 32, 48), (112, 80, 160)]  # M, K, N
# the interpreter's dot is slow; a GPU takes the tuner's sizes, in whose layouts FP8 comes out right
SMALL = LinearTile() if ON_GPU else LinearTile(rows=64, cols=64, depth=32, part=32)
TILES = [
    SMALL,
    replace(SMALL, rows=128, part=64, group=2, programs=2),
    replace(SMALL, cols=128, depth=64, part=64, group=1),
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def inputs(shape, device):
    """x (M, K) and w (N, K) in e4m3, and the scaling of the activation."""
    rows, depth, cols = shape
    x = quantize(torch.randn(rows, depth, device=device), Scaling.from_bound(6.0, E4M3, device))
    w = torch.randn(cols, depth, device=device) / depth**0.5
    w = quantize(w, Scaling.from_bound(2.0, E4M3, device))
    return x, w, Scaling.from_bound(25.0, E4M3, device)


def zeroed(scaling):
    """The same scaling with an amax of its own."""
    return replace(scaling, amax=torch.zeros_like(scaling.amax))


def assert_close_operands(name, got, expected, amax, expected_amax):
    """Two operands of products that add in different orders: some of the products are rounded to
    another bf16 value, and of those some land on the next FP8 value."""
    off = (fp8_steps(got.data, expected.data) > 0).float().mean().item()
    error = relative_error(got.dequantize(), expected.dequantize())
    print(f"{name}: {100 * off:.2f} % of FP8 values off, relative error {error:.1e}")
    assert off < 0.05 and error < 0.05
    assert torch.equal(got.data.t().view(torch.uint8), got.transposed.view(torch.uint8))
    torch.testing.assert_close(amax, expected_amax, rtol=1e-2, atol=0)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape, tile, device):
    x, w, scaling = inputs(shape, device)
    with forced(OP, tile):
        h, operand = linear_relu_squared_fwd(x, w, scaling)
    x, w = x.dequantize().double(), w.dequantize().double()
    truth, _ = linear_relu_squared_ref(x, w)
    assert_accurate("h", h, truth.bfloat16(), truth)
    assert_fp8("activation", operand, h.double().relu().square(), scaling)


def test_two_runs_give_the_same_bits(device):
    x, w, scaling = inputs((112, 48, 160), device)

    def run():
        found = zeroed(scaling)
        with forced(OP, SMALL):
            h, y = linear_relu_squared_fwd(x, w, found)
        return [h, y.data, y.transposed, found.amax]

    same_bits(run)


def test_nan_shows(device):
    x, w, scaling = inputs((80, 32, 48), device)
    nan = torch.full((1,), float("nan"), device=device)
    with forced(OP, SMALL):
        h, y = linear_relu_squared_fwd(replace(x, inverse_scale=nan), w, scaling)
    assert h.isnan().all() and y.data.float().isnan().all() and scaling.amax.isnan()


def test_refused_inputs(device):
    x, w, scaling = inputs((32, 32, 48), device)
    narrow = quantize(torch.zeros(48, 16, device=device), scaling)
    with pytest.raises(ValueError, match=r"x is \(32, 32\), w \(48, 16\)"):
        linear_relu_squared_fwd(x, narrow, scaling)
    with pytest.raises(ValueError, match="multiples of 16"):
        linear_relu_squared_fwd(replace(x, data=x.data[:24]), w, scaling)
    with pytest.raises(ValueError, match="not empty"):
        linear_relu_squared_fwd(replace(x, data=x.data[:0]), w, scaling)
    with pytest.raises(ValueError, match="x must be contiguous"):
        linear_relu_squared_fwd(replace(x, data=x.data.t()), w, scaling)
    shifted = torch.zeros(32 * 32 + 8, dtype=torch.uint8, device=device)[8:].view(E4M3).view(32, 32)
    with pytest.raises(ValueError, match="x must start at a multiple of 16 bytes"):
        linear_relu_squared_fwd(replace(x, data=shifted), w, scaling)


def scaled_mm(a, b, a_inverse, b_inverse):
    """a b^T of row-major FP8 matrices in bf16 by cuBLAS."""
    return torch._scaled_mm(
        a, b.t(), a_inverse, b_inverse, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def assert_same_operands(got, expected):
    for name in ("data", "transposed"):
        a, b = (getattr(operand, name).view(torch.uint8) for operand in (got, expected))
        assert torch.equal(a, b), f"{(a != b).float().mean():.1e} of the bytes of {name} differ"


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(4096, 1024, 4096), (4112, 1040, 4112)], ids=str)
@pytest.mark.parametrize("tile", CASES[OP][1], ids=str)
def test_every_candidate(tile, shape, device):
    x, w, scaling = inputs(shape, device)

    def run():
        found = zeroed(scaling)
        with forced(OP, tile):
            h, operand = linear_relu_squared_fwd(x, w, found)
        return h, operand.data, operand.transposed, found.amax

    h, data, transposed, amax = same_bits(run)
    operand = FP8Operand(data, transposed, scaling.inverse_scale)
    product = scaled_mm(x.data, w.data, x.inverse_scale, w.inverse_scale)
    assert_accurate("h", h, product, x.dequantize().double() @ w.dequantize().double().t())
    other = zeroed(scaling)
    assert_same_operands(operand, relu_squared_fwd(h, other, want_plain=False)[1])
    assert torch.equal(amax, other.amax)
    other = zeroed(scaling)
    _, expected = relu_squared_fwd(product, other, want_plain=False)
    assert_close_operands("activation", operand, expected, amax, other.amax)


@pytest.mark.cuda
def test_more_than_two_to_the_31_elements(device):
    rows, depth, cols = 131072 + 64, 32, 16384
    corners = (-1, -1), (-1, 0), (0, -1)
    x = torch.zeros(rows, depth, device=device)
    w = torch.zeros(cols, depth, device=device)
    x[0, 0], x[-1, 1], w[0, 1], w[-1, 0], w[-1, 1] = 1.0, 2.0, 0.5, 1.5, 1.0
    unit = Scaling.from_bound(448.0, E4M3, device)  # a scale of 1
    x, w = quantize(x, unit), quantize(w, unit)
    h, operand = linear_relu_squared_fwd(x, w, Scaling.from_bound(448.0, E4M3, device))
    for y, expected in (
        (h, [2.0, 1.0, 1.5]),
        (operand.data, [4.0, 1.0, 2.25]),
        (operand.transposed.t(), [4.0, 1.0, 2.25]),
    ):
        assert [y[i, j].item() for i, j in corners] == expected
        assert not y[1:-1].view(torch.uint8).any()
