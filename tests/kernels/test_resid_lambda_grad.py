import pytest
import torch

from nanofuse.bench.checks import DTYPES, ON_GPU
from nanofuse.kernels.common.fp8 import E4M3, Scaling
from nanofuse.kernels.quantize import quantize
from nanofuse.kernels.resid_lambda_grad import (
    SMALL_LAMBDA,
    resid_lambda_grad,
    resid_lambda_grad_ref,
)

#         N, C, F
SHAPES = [(1, 16, 16), (127, 48, 64), (129, 32, 80), (300, 144, 64)]
SMALL = [0.0, 1e-30, -1e-7, 0.06, -0.06]


def make(shape, dtype, device):
    n, c, f = shape
    generator = torch.Generator().manual_seed(0)
    sizes = (n, c), (n, c), (n, f), (c, f)
    return [torch.randn(s, generator=generator).to(device, dtype) for s in sizes]


def total(tensors, value, device, programs=3):
    partial = torch.zeros(programs, device=device)
    return resid_lambda_grad(*tensors, torch.tensor([value], device=device), partial).sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_sum(shape, dtype, device):
    tensors = make(shape, dtype, device)
    value = torch.zeros(1, device=device)
    exact = resid_lambda_grad_ref(*(x.double() for x in tensors), value)
    size = (tensors[0].double() ** 2).sum().sqrt() * shape[2] ** 0.5
    assert (total(tensors, 0.0, device) - exact).abs() < 1e-5 * size


@pytest.mark.parametrize("value", [*SMALL, SMALL_LAMBDA, -SMALL_LAMBDA, 1.0, -1.15])
def test_only_a_small_lambda_is_worth_the_product(value, device):
    tensors = make((64, 32, 32), torch.float32, device)
    got = total(tensors, value, device)
    expected = resid_lambda_grad_ref(*tensors, torch.tensor(value, device=device))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    assert (got == 0) == (abs(value) >= SMALL_LAMBDA)


def test_nothing_is_read_for_an_ordinary_lambda(device):
    tensors = [x.fill_(torch.nan) for x in make((64, 32, 32), torch.float32, device)]
    assert total(tensors, 1.0, device) == 0


def test_fp8_operands(device):
    g, x, a, w = make((64, 32, 48), torch.bfloat16 if ON_GPU else torch.float32, device)
    operands = [quantize(t, Scaling.from_bound(5.0, E4M3, device)) for t in (a, w)]
    wide = [t.double() for t in (g, x, *(o.dequantize() for o in operands))]
    exact = resid_lambda_grad_ref(*wide, torch.zeros(1, device=device))
    got = total((g, x, *operands), 0.0, device)
    assert (got - exact).abs() < 1e-4 * wide[0].norm() * wide[2].norm()


def test_what_does_not_fit_is_refused(device):
    g, x, a, w = make((64, 32, 48), torch.float32, device)
    for tensors in ((g, x[1:], a, w), (g, x, a[1:], w), (g, x, a, w[1:]), (g, x, a, w.t())):
        with pytest.raises(ValueError, match="resid_lambda_grad"):
            total(tensors, 0.0, device)
