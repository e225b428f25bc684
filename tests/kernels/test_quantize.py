import pytest
import torch

from kernels.quantize import quantize_ref

FORMATS = [(torch.float8_e4m3fn, 448.0, 2.0**-3), (torch.float8_e5m2, 57344.0, 2.0**-2)]


@pytest.mark.parametrize(("dtype", "fp8_max", "step"), FORMATS)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_relative_error_is_half_a_step(dtype, fp8_max, step, scale):
    x = scale * torch.randn(64, 33)
    q, inverse = quantize_ref(x, dtype)
    assert q.dtype == dtype and inverse.shape == ()
    assert q.float().abs().max() == fp8_max  # the largest value uses the whole range
    normal = x.abs() > x.abs().max() * 2.0**-12
    error = (q.float() * inverse - x)[normal].abs() / x[normal].abs()
    assert error.max() <= step / 2 * 1.001


@pytest.mark.parametrize(("dtype", "fp8_max", "step"), FORMATS)
def test_zeros_stay_zero(dtype, fp8_max, step):
    q, inverse = quantize_ref(torch.zeros(4, 4), dtype)
    assert (q.float() == 0).all() and inverse.isfinite()
