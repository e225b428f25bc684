from dataclasses import replace

import pytest
import torch

from bench.tune import CASES
from kernels.fp8 import E4M3, E5M2, FP8Operand, Scaling
from kernels.linear_relu_squared import (
    LinearTile,
    linear_relu_squared_bwd,
    linear_relu_squared_bwd_ref,
    linear_relu_squared_fwd,
    linear_relu_squared_ref,
)
from kernels.quantize import quantize
from kernels.relu_squared import relu_squared_bwd, relu_squared_fwd
from kernels.tuning import forced
from tests.kernels.checks import (
    ON_GPU,
    assert_accurate,
    assert_fp8,
    fp8_steps,
    relative_error,
    same_bits,
)

FORWARD, BACKWARD = "linear_relu_squared", "linear_relu_squared_bwd"
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


def forward_inputs(shape, device):
    """x (M, K) and w (N, K) in e4m3, and the scaling of the activation."""
    rows, depth, cols = shape
    x = quantize(torch.randn(rows, depth, device=device), Scaling.from_bound(6.0, E4M3, device))
    w = torch.randn(cols, depth, device=device) / depth**0.5
    w = quantize(w, Scaling.from_bound(2.0, E4M3, device))
    return x, w, Scaling.from_bound(25.0, E4M3, device)


def backward_inputs(shape, device):
    """g (M, K) in e5m2, w (K, N) in e4m3, h (M, N), and the scaling of h's gradient."""
    rows, depth, cols = shape
    g = quantize(torch.randn(rows, depth, device=device), Scaling.from_bound(8.0, E5M2, device))
    w = torch.randn(depth, cols, device=device) / depth**0.5
    w = quantize(w, Scaling.from_bound(2.0, E4M3, device))
    h = torch.randn(rows, cols, device=device).bfloat16()
    return g, w, h, Scaling.from_bound(40.0, E5M2, device)


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
    x, w, scaling = forward_inputs(shape, device)
    with forced(FORWARD, tile):
        h, operand = linear_relu_squared_fwd(x, w, scaling)
    x, w = x.dequantize().double(), w.dequantize().double()
    truth, _ = linear_relu_squared_ref(x, w)
    assert_accurate("h", h, truth.bfloat16(), truth)
    assert_fp8("activation", operand, h.double().relu().square(), scaling)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(shape, tile, device):
    g, w, h, scaling = backward_inputs(shape, device)
    with forced(BACKWARD, tile):
        operand = linear_relu_squared_bwd(g, w, h, scaling)
    g, w = g.dequantize().double(), w.dequantize().double()
    other = zeroed(scaling)
    _, expected = relu_squared_bwd((g @ w).bfloat16(), h, other, want_plain=False)
    assert_close_operands("gradient", operand, expected, scaling.amax, other.amax)
    exact = linear_relu_squared_bwd_ref(g, w, h.double())
    assert relative_error(operand.dequantize(), exact) < 0.1  # half a step of e5m2 is 1/8


def test_two_runs_give_the_same_bits(device):
    shape = (112, 48, 160)
    x, w, forward = forward_inputs(shape, device)
    g, v, h, backward = backward_inputs(shape, device)

    def run():
        scalings = zeroed(forward), zeroed(backward)
        with forced(FORWARD, SMALL), forced(BACKWARD, SMALL):
            out, y = linear_relu_squared_fwd(x, w, scalings[0])
            dh = linear_relu_squared_bwd(g, v, h, scalings[1])
        operands = [y.data, y.transposed, dh.data, dh.transposed]
        return [out, *operands, *(scaling.amax for scaling in scalings)]

    same_bits(run)


def test_nan_shows(device):
    shape = (80, 32, 48)
    x, w, forward = forward_inputs(shape, device)
    g, v, h, backward = backward_inputs(shape, device)
    h[79, 47] = float("nan")
    nan = torch.full((1,), float("nan"), device=device)
    with forced(FORWARD, SMALL), forced(BACKWARD, SMALL):
        out, y = linear_relu_squared_fwd(replace(x, inverse_scale=nan), w, forward)
        dh = linear_relu_squared_bwd(g, v, h, backward)
    assert out.isnan().all() and y.data.float().isnan().all() and forward.amax.isnan()
    assert torch.equal(dh.data.float().isnan(), h.isnan()) and backward.amax.isnan()


def test_refused_inputs(device):
    x, w, scaling = forward_inputs((32, 32, 48), device)
    g, v, h, backward = backward_inputs((32, 32, 48), device)
    narrow = quantize(torch.zeros(48, 16, device=device), scaling)
    with pytest.raises(ValueError, match=r"x is \(32, 32\), w \(48, 16\)"):
        linear_relu_squared_fwd(x, narrow, scaling)
    with pytest.raises(ValueError, match=r"g is \(32, 32\), w \(16, 48\), h \(32, 48\)"):
        linear_relu_squared_bwd(g, FP8Operand(None, narrow.data, v.inverse_scale), h, backward)
    with pytest.raises(ValueError, match=r"h \(16, 48\)"):
        linear_relu_squared_bwd(g, v, h[:16], backward)
    with pytest.raises(ValueError, match="bf16"):
        linear_relu_squared_bwd(g, v, h.float(), backward)
    with pytest.raises(ValueError, match="multiples of 16"):
        linear_relu_squared_fwd(replace(x, data=x.data[:24]), w, scaling)
    with pytest.raises(ValueError, match="not empty"):
        linear_relu_squared_fwd(replace(x, data=x.data[:0]), w, scaling)
    with pytest.raises(ValueError, match="x must be a contiguous"):
        linear_relu_squared_fwd(replace(x, data=x.data.t()), w, scaling)
    shifted = torch.zeros(32 * 48 + 1, dtype=torch.bfloat16, device=device)[1:].view(32, 48)
    with pytest.raises(ValueError, match="h must start at a multiple of 16 bytes"):
        linear_relu_squared_bwd(g, v, shifted, backward)
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
@pytest.mark.parametrize("tile", CASES[FORWARD][1], ids=str)
def test_every_candidate_forward(tile, shape, device):
    x, w, scaling = forward_inputs(shape, device)

    def run():
        found = zeroed(scaling)
        with forced(FORWARD, tile):
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
@pytest.mark.parametrize("shape", [(4096, 1024, 4096), (4112, 1040, 4112)], ids=str)
@pytest.mark.parametrize("tile", CASES[BACKWARD][1], ids=str)
def test_every_candidate_backward(tile, shape, device):
    """Operands are small integers, whose sums are exact in any order: every byte must agree."""
    rows, depth, cols = shape
    e4m3, e5m2 = (Scaling.from_bound(torch.finfo(f).max, f, device) for f in (E4M3, E5M2))
    g = quantize(torch.randint(-2, 3, (rows, depth), device=device).float(), e5m2)
    w = quantize(torch.randint(-2, 3, (depth, cols), device=device).float(), e4m3)
    h = torch.randn(rows, cols, device=device).bfloat16()
    scaling = Scaling.from_bound(500.0, E5M2, device)

    def run():
        found = zeroed(scaling)
        with forced(BACKWARD, tile):
            operand = linear_relu_squared_bwd(g, w, h, found)
        return operand.data, operand.transposed, found.amax

    data, transposed, amax = same_bits(run)  # tiles that overwrite each other would differ
    product = scaled_mm(g.data, w.transposed, g.inverse_scale, w.inverse_scale)
    other = zeroed(scaling)
    _, expected = relu_squared_bwd(product, h, other, want_plain=False)
    assert_same_operands(FP8Operand(data, transposed, scaling.inverse_scale), expected)
    assert torch.equal(amax, other.amax)


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
    del operand, y
    v = FP8Operand(w.transposed, w.data, w.inverse_scale)  # w^T
    scaling = Scaling.from_bound(57344.0, E5M2, device)
    operand = linear_relu_squared_bwd(x, v, h, scaling)
    for y in (operand.data, operand.transposed.t()):
        assert [y[i, j].item() for i, j in corners] == [8.0, 2.0, 4.0]  # 4.5 in e5m2: to even
        assert not y[1:-1].view(torch.uint8).any()
    assert scaling.amax.item() == 8.0
