import pytest
import torch

from nanofuse.bench.checks import DTYPES, assert_accurate, assert_fp8, same_bits
from nanofuse.kernels.common.fp8 import E4M3, E5M2, Scaling
from nanofuse.kernels.relu_squared import (
    relu_squared,
    relu_squared_bwd,
    relu_squared_fwd,
    relu_squared_ref,
)

SHAPES = [(1, 1), (63, 127), (64, 128), (65, 129), (127, 97), (0, 8)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def gradient(op, x, dy):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(op(x), x, dy)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(shape, dtype, device):
    x, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    truth = relu_squared_ref(x.double())
    assert_accurate("forward", relu_squared(x), relu_squared_ref(x), truth)
    truth = gradient(relu_squared_ref, x.double(), dy.double())
    theirs = gradient(relu_squared_ref, x, dy)
    assert_accurate("backward", gradient(relu_squared, x, dy), theirs, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 16), (64, 128), (80, 144), (304, 272)], ids=str)
def test_operands_in_both_layouts(shape, dtype, device):
    x, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    forward, backward = (Scaling.from_bound(b, f, device) for b, f in ((9.0, E4M3), (5.0, E5M2)))
    operand = relu_squared_fwd(x, forward)
    assert_fp8("forward", operand, relu_squared_ref(x.double()), forward)
    operand = relu_squared_bwd(dy, x, backward)
    exact = gradient(relu_squared_ref, x.double(), dy.double())
    assert_fp8("backward", operand, exact, backward)


def test_more_dimensions_and_a_broadcast_gradient(device):
    x = torch.randn(2, 3, 5, 7, device=device, requires_grad=True)
    y = relu_squared(x)
    assert y.shape == x.shape
    y.backward(torch.full((), 3.0, device=device).expand_as(y))
    torch.testing.assert_close(x.grad, 6 * x.detach().clamp_min(0))


def test_rows_of_a_wider_buffer_are_accepted(device):
    x, dy = torch.randn(2, 40, 64, device=device)
    x, dy = x[:, 16:48], dy[:, 5:37]
    assert torch.equal(relu_squared_fwd(x), relu_squared_ref(x))
    assert torch.equal(relu_squared_bwd(dy, x), 2 * x.clamp_min(0) * dy)


def test_refused_inputs(device):
    x = torch.randn(4, 6, device=device)
    with pytest.raises(ValueError, match="contiguous"):
        relu_squared(x.t())
    for op in (lambda: relu_squared_fwd(x.t()), lambda: relu_squared_bwd(x.t(), x)):
        with pytest.raises(ValueError, match="contiguous rows"):
            op()
    with pytest.raises(ValueError, match=r"dy is \(4, 5\)"):
        relu_squared_bwd(x[:, :5], x)


def test_unaligned_rows_are_refused_with_fp8_alone(device):
    x, dy = torch.randn(2, 48, 65, device=device)[:, :, :48]
    scaling = Scaling.from_bound(9.0, E4M3, device)
    copies = x.clone(), dy.clone()
    for name, run in (
        ("x", lambda scaling: relu_squared_fwd(x, scaling)),
        ("x", lambda scaling: relu_squared_bwd(copies[1], x, scaling)),
        ("dy", lambda scaling: relu_squared_bwd(dy, copies[0], scaling)),
    ):
        run(None)
        with pytest.raises(ValueError, match=f"{name} must start at a multiple of 16 bytes"):
            run(scaling)
    wide = torch.randn(48, 80, device=device)[:, 16:64]
    assert_fp8("strided", relu_squared_fwd(wide, scaling), relu_squared_ref(wide), scaling)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_show(bad, device):
    x = torch.randn(80, 144, device=device)
    x[79, 143] = bad
    y = relu_squared(x)
    assert torch.equal(y.isfinite(), x.isfinite())
    for run in (relu_squared_fwd, lambda x, s: relu_squared_bwd(torch.ones_like(x), x, s)):
        scaling = Scaling.from_bound(9.0, E4M3, device)
        plain, operand = run(x, None), run(x, scaling)
        assert not plain[79, 143].isfinite() and not scaling.amax.isfinite()
        assert bad == bad or operand.dequantize()[79, 143].isnan()


def test_two_runs_give_the_same_bits(device):
    x, dy = torch.randn(2, 112, 144, device=device)

    def run():
        scaling = Scaling.from_bound(9.0, E4M3, device)
        operands = [relu_squared_fwd(x, scaling), relu_squared_bwd(dy, x, scaling)]
        copies = [t for operand in operands for t in (operand.data, operand.transposed)]
        return [relu_squared_fwd(x), relu_squared_bwd(dy, x), *copies, scaling.amax]

    same_bits(run)


@pytest.mark.cuda
@pytest.mark.large
@pytest.mark.parametrize("width", [256, 768, 1024])
def test_model_shapes(width, device):
    x, dy = torch.randn(2, 65536, 4 * width, device=device).bfloat16()
    forward, backward = (Scaling.from_bound(b, f, device) for b, f in ((36.0, E4M3), (60.0, E5M2)))
    plain, operand = relu_squared_fwd(x), relu_squared_fwd(x, forward)
    exact = relu_squared_ref(x.float())
    assert_accurate("forward", plain, relu_squared_ref(x), exact)
    assert_fp8("forward", operand, exact, forward)
    plain, operand = relu_squared_bwd(dy, x), relu_squared_bwd(dy, x, backward)
    exact = 2 * x.float().clamp_min(0) * dy.float()
    assert_accurate("backward", plain, gradient(relu_squared_ref, x, dy), exact)
    assert_fp8("backward", operand, exact, backward)


@pytest.mark.cuda
@pytest.mark.large
def test_more_than_two_to_the_31_elements(device):
    rows, cols = 65600, 32768
    x = torch.zeros(rows, cols, dtype=torch.bfloat16, device=device)
    x[-1, -1], x[-1, 0], x[0, -1] = 1.0, 2.0, 3.0
    for run, expected in (
        (relu_squared_fwd, [1.0, 4.0, 9.0]),
        (lambda x, s: relu_squared_bwd(x, x, s), [2.0, 8.0, 18.0]),
    ):
        plain, operand = run(x, None), run(x, Scaling.from_bound(448.0, E4M3, device))
        for y in (plain, operand.data, operand.transposed.t()):
            assert [y[i, j].item() for i, j in ((-1, -1), (-1, 0), (0, -1))] == expected
            assert y[-2].float().abs().max() == 0
        del plain, operand, y
