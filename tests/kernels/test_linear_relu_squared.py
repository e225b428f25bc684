from dataclasses import replace
from functools import partial

import pytest
import torch

import nanofuse.kernels.linear_relu_squared as op_module
from nanofuse.bench.cases.tiles import CASES
from nanofuse.bench.checks import (
    DTYPES,
    ON_GPU,
    assert_fp8,
    fp8_steps,
    relative_error,
    same_bits,
)
from nanofuse.kernels.common.fp8 import E4M3, E5M2, FP8Operand, Scaling
from nanofuse.kernels.common.tuning import forced
from nanofuse.kernels.linear_relu_squared import (
    PLAIN_TILES,
    LinearTile,
    linear_relu_squared_bwd,
    linear_relu_squared_bwd_ref,
    linear_relu_squared_fwd,
    linear_relu_squared_ref,
    plain_name,
)
from nanofuse.kernels.quantize import quantize
from nanofuse.kernels.relu_squared import relu_squared_fwd

FORWARD, BACKWARD = "linear_relu_squared", "linear_relu_squared_bwd"
SHAPES = [(16, 16, 16), (64, 32, 64), (80, 48, 144), (160, 32, 48), (112, 80, 160)]  # M, K, N
# the interpreter's dot is slow; a GPU takes the tuner's sizes
SMALL = LinearTile(*((128, 256, 128) if ON_GPU else (64, 64, 32)), warps=8, stages=3)
TILES = [
    SMALL,
    replace(SMALL, rows=128, group=2, programs=2),
    replace(SMALL, cols=128, depth=64, group=1),
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Case:
    """Random FP8Operands of the forward or backward launcher, and references of its result.

    Forward: x (M, K) and w (N, K) in e4m3. Backward: dz (M, K) in e5m2, v (K, N) and y (M, N).
    """

    def __init__(self, op, shape, device):
        rows, depth, cols = shape
        self.op, backward = op, op == BACKWARD

        def operand(bound, dtype, *shape):
            return quantize(torch.randn(shape, device=device), scale(bound, dtype, device))

        self.x = operand(6.0, E5M2 if backward else E4M3, rows, depth)
        weight = torch.randn((depth, cols) if backward else (cols, depth), device=device)
        self.w = quantize(weight / depth**0.5, scale(2.0, E4M3, device))
        self.scaling = scale(25.0, E5M2 if backward else E4M3, device)
        self.factors = self.x.data, self.w.transposed if backward else self.w.data
        self.y = None
        if backward:
            y = torch.randn(rows, cols, device=device).relu().square()
            self.y = quantize(y, scale(16.0, E4M3, device))

    def run(self, scaling, x=None):
        x = x or self.x
        if self.y is None:
            return linear_relu_squared_fwd(x, self.w, scaling)
        return linear_relu_squared_bwd(x, self.w, self.y, scaling)

    def product(self):
        """The product, (M, N) fp64."""
        a, b = (factor.double() for factor in self.factors)
        return a @ b.t() * (self.x.inverse_scale * self.w.inverse_scale).double()

    def epilogue(self, product, scaling):
        """FP8Operand that kernels of their own make of a product."""
        if self.y is None:
            return relu_squared_fwd(product.float(), scaling)
        return quantize(2 * self.y.dequantize().sqrt() * product.float(), scaling)


class PlainCase:
    """Case with plain tensors; the operands of the product have values of both signs."""

    def __init__(self, op, shape, dtype, device):
        rows, depth, cols = shape
        self.backward = op == BACKWARD
        weight = torch.randn((depth, cols) if self.backward else (cols, depth), device=device)
        self.x = torch.randn(rows, depth, device=device).to(dtype)
        self.w = (weight / depth**0.5).to(dtype)
        self.y = torch.randn(rows, cols, device=device).relu().square().to(dtype)

    def run(self):
        if self.backward:
            return linear_relu_squared_bwd(self.x, self.w, self.y)
        return linear_relu_squared_fwd(self.x, self.w)

    def exact(self):
        """The result, (M, N) fp64."""
        x, w, y = (tensor.double() for tensor in (self.x, self.w, self.y))
        if self.backward:
            return linear_relu_squared_bwd_ref(x, w, y)
        return linear_relu_squared_ref(x, w)


def scale(bound, dtype, device):
    return Scaling.from_bound(bound, dtype, device)


def zeroed(scaling):
    """A copy of the Scaling with a fresh amax of 0."""
    return replace(scaling, amax=torch.zeros_like(scaling.amax))


def assert_close_operands(name, got, expected, amax, expected_amax):
    """Compare FP8Operands of one product whose sums were taken in different orders: a few values
    may round to the adjacent FP8 value, none to one further away."""
    step = 2.0 ** -(3 if got.data.dtype == E4M3 else 2)  # spacing of FP8 values, relative
    values, wanted = got.dequantize(), expected.dequantize()
    allowed = step * wanted.abs() + 1e-3 * wanted.abs().max()
    assert ((values - wanted).abs() <= allowed).all(), name
    off = (fp8_steps(got.data, expected.data) > 0).float().mean().item()
    error = relative_error(got.dequantize(), expected.dequantize())
    print(f"{name}: {100 * off:.2f} % of FP8 values off, relative error {error:.1e}")
    assert off < 0.05 and error < 0.05
    assert torch.equal(got.data.t().view(torch.uint8), got.transposed.view(torch.uint8))
    torch.testing.assert_close(amax, expected_amax, rtol=1e-2, atol=0)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", [FORWARD, BACKWARD])
def test_matches_the_product_and_its_epilogue(op, shape, tile, device):
    """In the interpreter nearly bit for bit: fp32 sums of a few FP8 products are exact in any
    order, and results are rounded to bf16 first. Tensor cores accumulate with fewer bits."""
    case = Case(op, shape, device)
    product = case.product()
    with forced(op, tile):
        operand = case.run(case.scaling)
    if ON_GPU:
        other = zeroed(case.scaling)
        expected = case.epilogue(product, other)
        assert_close_operands(op, operand, expected, case.scaling.amax, other.amax)
    else:
        eye = torch.eye(product.size(1), dtype=torch.float64)
        if op == FORWARD:
            exact = linear_relu_squared_ref(product, eye)
        else:
            exact = linear_relu_squared_bwd_ref(product, eye, case.y.dequantize().double())
        assert_fp8(op, operand, exact, case.scaling, through=torch.bfloat16)
        if op == FORWARD:  # of values that are not rounded yet
            torch.testing.assert_close(case.scaling.amax[0], exact.max().float())


def assert_rounded(
    got,  # (M, N)
    exact,  # (M, N) fp64
    dtype,
):
    """Every element is exact but for fp32 sums in any order and one rounding to dtype."""
    assert got.dtype == dtype and got.shape == exact.shape and got.is_contiguous()
    step = max(torch.finfo(dtype).eps / 2, 4e-6)
    allowed = 1.01 * step * exact.abs() + 2e-6 * exact.abs().max()
    assert ((got.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (83, 48, 112)], ids=str)
@pytest.mark.parametrize("op", [FORWARD, BACKWARD])
def test_of_tensors_matches_the_exact_result(op, shape, tile, dtype, device):
    if ON_GPU and dtype == torch.float32:  # tensors of four bytes want smaller tiles
        tile = replace(tile, rows=64, cols=64, warps=4)
    case = PlainCase(op, shape, dtype, device)
    with forced(plain_name(op, dtype), tile):
        assert_rounded(case.run(), case.exact(), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [FORWARD, BACKWARD])
def test_tiles_of_tensors_are_those_of_their_dtype(op, dtype, device, monkeypatch):
    """The K loop advances by 128 bytes whatever the dtype; tiles are tuned per dtype."""
    launched = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **constants: launched.update(constants)

    monkeypatch.setattr(op_module, "linear_relu_squared_kernel", Kernel())
    case = PlainCase(op, (32, 48, 64), dtype, device)
    for tile in (PLAIN_TILES[dtype], replace(SMALL, rows=32, depth=64, group=3)):
        with forced(plain_name(op, dtype), tile):
            case.run()
        assert (launched["BM"], launched["BN"], launched["GROUP"]) == (
            tile.rows,
            tile.cols,
            tile.group,
        )
        assert launched["BK"] * dtype.itemsize == tile.depth
        assert launched["num_warps"] == tile.warps
    assert plain_name(op, torch.bfloat16) in CASES


def test_the_backward_reference_is_the_gradient_of_the_forward_one():
    x, w, v = (torch.randn(s, dtype=torch.float64) for s in ((7, 5), (6, 5), (3, 6)))
    h = (x @ w.t()).requires_grad_()
    eye = torch.eye(6, dtype=torch.float64)
    y = linear_relu_squared_ref(h, eye)
    torch.testing.assert_close(y, linear_relu_squared_ref(x, w))
    dz = torch.randn(7, 3, dtype=torch.float64)
    (expected,) = torch.autograd.grad(y @ v.t(), h, dz)
    torch.testing.assert_close(linear_relu_squared_bwd_ref(dz, v, y.detach()), expected)


def test_gradient_from_the_output_is_nearly_that_from_the_input(device):
    """The error of the FP8 gradient computed from y is at most 1.1 times that of one from h."""
    torch.manual_seed(1)
    h, g = torch.randn(2, 304, 272, device=device)
    exact = 2 * h.double().relu() * g.double()
    with_h = quantize(2 * h.relu() * g, scale(30.0, E5M2, device))
    y = relu_squared_fwd(h, scale(25.0, E4M3, device))
    without = quantize(2 * y.dequantize().sqrt() * g, scale(30.0, E5M2, device))
    errors = [relative_error(operand.dequantize(), exact) for operand in (without, with_h)]
    print("relative errors with sqrt(y) {:.4f}, with h {:.4f}".format(*errors))
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize("op", [FORWARD, BACKWARD])
def test_two_runs_give_the_same_bits(op, device):
    case = Case(op, (112, 48, 160), device)

    def run():
        found = zeroed(case.scaling)
        with forced(op, SMALL):
            y = case.run(found)
        return [y.data, y.transposed, found.amax]

    same_bits(run)


@pytest.mark.parametrize("op", [FORWARD, BACKWARD])
def test_two_runs_on_tensors_give_the_same_bits(op, device):
    case = PlainCase(op, (112, 48, 160), torch.bfloat16, device)
    with forced(plain_name(op, torch.bfloat16), SMALL):
        same_bits(lambda: [case.run()])


@pytest.mark.parametrize("op", [FORWARD, BACKWARD])
def test_nan_shows_in_tensors(op, device):
    """A NaN in x shows in its row of the result, one in y in its element."""
    case = PlainCase(op, (80, 32, 48), torch.bfloat16, device)
    case.x[3, 5] = case.y[2, 7] = float("nan")
    with forced(plain_name(op, torch.bfloat16), SMALL):
        found = case.run().isnan()
    expected = torch.zeros_like(found)
    expected[3], expected[2, 7] = True, op == BACKWARD
    assert torch.equal(found, expected)


@pytest.mark.parametrize("op", [FORWARD, BACKWARD])
def test_nan_shows(op, device):
    case = Case(op, (80, 32, 48), device)
    nan = torch.full((1,), float("nan"), device=device)
    with forced(op, SMALL):
        y = case.run(case.scaling, replace(case.x, inverse_scale=nan))
    assert y.data.float().isnan().all() and case.scaling.amax.isnan()


def test_refused_inputs(device):
    case = Case(FORWARD, (32, 32, 48), device)
    x, w, scaling = case.x, case.w, case.scaling
    narrow = quantize(torch.zeros(48, 16, device=device), scaling)
    with pytest.raises(ValueError, match="factors of 32 and 16 terms"):
        linear_relu_squared_fwd(x, narrow, scaling)
    with pytest.raises(ValueError, match="multiples of 16"):
        linear_relu_squared_fwd(replace(x, data=x.data[:24]), w, scaling)
    with pytest.raises(ValueError, match="not empty"):
        linear_relu_squared_fwd(replace(x, data=x.data[:0]), w, scaling)
    with pytest.raises(ValueError, match="x must be a contiguous matrix"):
        linear_relu_squared_fwd(replace(x, data=x.data.t()), w, scaling)
    with pytest.raises(ValueError, match="w must be a contiguous matrix"):
        linear_relu_squared_fwd(x, replace(w, data=w.data.view(-1)), scaling)
    shifted = torch.zeros(32 * 32 + 8, dtype=torch.uint8, device=device)[8:].view(E4M3).view(32, 32)
    with pytest.raises(ValueError, match="x must start at a multiple of 16 bytes"):
        linear_relu_squared_fwd(replace(x, data=shifted), w, scaling)
    case = Case(BACKWARD, (32, 32, 48), device)
    v = replace(case.w, transposed=case.w.transposed.t())
    with pytest.raises(ValueError, match="v transposed must be a contiguous matrix"):
        linear_relu_squared_bwd(case.x, v, case.y, scaling)
    y = replace(case.y, data=case.y.data[:16])
    with pytest.raises(ValueError, match=r"y is \(16, 48\), the product 32 x 48"):
        linear_relu_squared_bwd(case.x, case.w, y, scaling)


def test_refused_tensors(device):
    case = PlainCase(BACKWARD, (32, 48, 64), torch.bfloat16, device)
    with pytest.raises(ValueError, match="w is torch.float32, not torch.bfloat16"):
        linear_relu_squared_fwd(case.x, torch.zeros(64, 48, device=device))
    with pytest.raises(ValueError, match="factors of 48 and 64 terms"):
        linear_relu_squared_bwd(case.x, case.w.t().contiguous(), case.y)
    with pytest.raises(ValueError, match=r"y is \(16, 64\), the product 32 x 64"):
        linear_relu_squared_bwd(case.x, case.w, case.y[:16])
    with pytest.raises(ValueError, match="y is torch.float32"):
        linear_relu_squared_bwd(case.x, case.w, case.y.float())
    with pytest.raises(ValueError, match="w must be a contiguous matrix"):
        linear_relu_squared_fwd(case.x, case.w.t())
    with pytest.raises(ValueError, match="48 terms and 40 columns must be multiples of 16"):
        linear_relu_squared_fwd(case.x, case.x.new_zeros(40, 48))
    with pytest.raises(ValueError, match="40 terms and 64 columns must be multiples of 16"):
        linear_relu_squared_fwd(case.x.new_zeros(32, 40), case.x.new_zeros(64, 40))
    shifted = torch.zeros(32 * 48 + 4, dtype=torch.bfloat16, device=device)[4:].view(32, 48)
    with pytest.raises(ValueError, match="x must start at a multiple of 16 bytes"):
        linear_relu_squared_fwd(shifted, case.x.new_zeros(64, 48))
    fp8 = quantize(case.x, scale(6.0, E4M3, device))
    for x in (fp8, fp8.data, case.x.half()):
        with pytest.raises(ValueError, match="x must be a bf16 or fp32 tensor without a scaling"):
            linear_relu_squared_fwd(x, case.x.new_zeros(64, 48))


def scaled_mm(a, b, a_inverse, b_inverse):
    """a b^T of row-major FP8 matrices in bf16 by cuBLAS."""
    return torch._scaled_mm(
        a, b.t(), a_inverse, b_inverse, out_dtype=torch.bfloat16, use_fast_accum=True
    )


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(4096, 1024, 4096), (4112, 1040, 4112)], ids=str)
@pytest.mark.parametrize("tile", CASES[FORWARD][1], ids=str)
@pytest.mark.parametrize("op", [FORWARD, BACKWARD])
def test_every_candidate(op, tile, shape, device):
    """Every candidate tile of the tuner against cuBLAS and relu_squared; both layouts agree."""
    case = Case(op, shape, device)

    def run():
        found = zeroed(case.scaling)
        with forced(op, tile):
            operand = case.run(found)
        return operand.data, operand.transposed, found.amax

    data, transposed, amax = same_bits(run)
    operand = FP8Operand(data, transposed, case.scaling.inverse_scale)
    other = zeroed(case.scaling)
    expected = case.epilogue(
        scaled_mm(*case.factors, case.x.inverse_scale, case.w.inverse_scale), other
    )
    assert_close_operands(op, operand, expected, amax, other.amax)


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(4096, 1024, 4096), (4100, 1040, 4112)], ids=str)
@pytest.mark.parametrize("tile", CASES[plain_name(FORWARD, torch.bfloat16)][1], ids=str)
@pytest.mark.parametrize("op", [FORWARD, BACKWARD])
def test_every_candidate_on_tensors(op, tile, shape, device):
    case = PlainCase(op, shape, torch.bfloat16, device)
    with forced(plain_name(op, torch.bfloat16), tile):
        (found,) = same_bits(lambda: [case.run()])
    assert_rounded(found, case.exact(), torch.bfloat16)


@pytest.mark.cuda
@pytest.mark.large
@pytest.mark.parametrize("op", [FORWARD, BACKWARD])
def test_more_than_two_to_the_31_elements_of_tensors(op, device):
    rows, depth, cols = 131072 + 64, 32, 16384
    case = PlainCase(op, (16, depth, 16), torch.bfloat16, device)
    case.x = torch.zeros(rows, depth, dtype=torch.bfloat16, device=device)
    w = torch.zeros(cols, depth, dtype=torch.bfloat16, device=device)
    case.x[0, 0], case.x[-1, 1], w[0, 1], w[-1, 0], w[-1, 1] = 1.0, 2.0, 0.5, 1.5, 1.0
    case.w, case.y, expected = w, None, [4.0, 1.0, 2.25]
    if op == BACKWARD:
        case.w, expected = w.t().contiguous(), [8.0, 8.0, 1.5]
        case.y = torch.zeros(rows, cols, dtype=torch.bfloat16, device=device)
        case.y[-1, -1], case.y[-1, 0], case.y[0, -1] = 4.0, 16.0, 0.25
    found = case.run()
    assert [found[i, j].item() for i, j in ((-1, -1), (-1, 0), (0, -1))] == expected
    assert not found[1:-1].any()


@pytest.mark.cuda
@pytest.mark.large
@pytest.mark.parametrize("op", [FORWARD, BACKWARD])
def test_more_than_two_to_the_31_elements(op, device):
    rows, depth, cols = 131072 + 64, 32, 16384
    corners = (-1, -1), (-1, 0), (0, -1)
    x = torch.zeros(rows, depth, device=device)
    w = torch.zeros(cols, depth, device=device)
    x[0, 0], x[-1, 1], w[0, 1], w[-1, 0], w[-1, 1] = 1.0, 2.0, 0.5, 1.5, 1.0
    unit = partial(Scaling.from_bound, 448.0, E4M3, device)  # a scale of 1
    x, run = quantize(x, unit()), partial(linear_relu_squared_fwd, w=quantize(w, unit()))
    expected = [4.0, 1.0, 2.25]
    if op == BACKWARD:
        y = torch.zeros(rows, cols, dtype=torch.bfloat16, device=device)
        y[-1, -1], y[-1, 0], y[0, -1] = 4.0, 16.0, 0.25
        run = partial(linear_relu_squared_bwd, v=quantize(w.t().contiguous(), unit()),
                      y=quantize(y, unit()))  # fmt: skip
        del y
        expected = [8.0, 8.0, 1.5]
    operand = run(x, scaling=unit())
    for y in (operand.data, operand.transposed.t()):
        assert [y[i, j].item() for i, j in corners] == expected
        assert not y[1:-1].view(torch.uint8).any()
