import pytest
import torch

from nanofuse.bench.checks import DTYPES, assert_fp8, same_bits
from nanofuse.kernels.common.fp8 import E4M3, E5M2, Scaling
from nanofuse.kernels.quantize import quantize, quantize_by_scaling_ref, quantize_ref

FORMATS = [(E4M3, 448.0, 2.0**-3), (E5M2, 57344.0, 2.0**-2)]
SHAPES = [(16, 16), (48, 112), (64, 128), (80, 144), (304, 272)]


@pytest.mark.parametrize("fp8", [E4M3, E5M2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_layouts_are_the_rounded_values(shape, dtype, fp8, device):
    x = torch.randn(shape, device=device).to(dtype)
    scaling = Scaling.from_bound(5.0, fp8, device)
    assert_fp8("quantize", quantize(x, scaling), x, scaling)


def test_rows_of_a_wider_buffer_are_accepted_and_columns_refused(device):
    x = torch.randn(48, 64, device=device)
    scaling = Scaling.from_bound(5.0, E4M3, device)
    assert_fp8("slice", quantize(x[:, 16:48], scaling), x[:, 16:48], scaling)
    with pytest.raises(ValueError, match="contiguous rows"):
        quantize(x.t(), scaling)
    with pytest.raises(ValueError, match="multiples of 16, got 47 x 64"):
        quantize(x[:47], scaling)


@pytest.mark.parametrize(("width", "start"), [(48, 1), (65, 0), (66, 3), (72, 8), (80, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_rows_are_refused_and_their_copy_is_taken(width, start, dtype, device):
    buffer = torch.randn(97 * width, device=device).to(dtype)
    x = buffer.as_strided((96, 48), (width, 1), start)
    scaling = Scaling.from_bound(5.0, E4M3, device)
    with pytest.raises(ValueError, match=r"quantize: x must start at .* call \.clone\(\)"):
        quantize(x, scaling)
    assert_fp8("copy", quantize(x.clone(), scaling), x, scaling)


def test_values_beyond_the_bound_saturate_and_amax_tells(device):
    x = torch.zeros(16, 16, device=device)
    x[0, :3] = torch.tensor([1.0, -1000.0, 1000.0])
    scaling = Scaling.from_bound(10.0, E4M3, device)
    values = quantize(x, scaling).dequantize()
    assert values[0, 1] == -10 and values[0, 2] == 10 and values[0, 3] == 0
    assert scaling.amax.item() == 1000


@pytest.mark.parametrize("fp8", [E4M3, E5M2])
def test_the_reference_does_the_same(fp8, device):
    x = 3 * torch.randn(48, 112, device=device)  # some of them beyond the bound
    ours, theirs = (Scaling.from_bound(5.0, fp8, device) for _ in range(2))
    theirs.amax.fill_(1.0)
    operand = quantize_by_scaling_ref(x, theirs)
    assert_fp8("reference", operand, x, theirs)
    assert_fp8("kernel", quantize(x, ours), operand.dequantize().where(x.abs() < 5, x), ours)
    theirs.amax.fill_(99.0)
    quantize_by_scaling_ref(x, theirs)
    assert theirs.amax == 99


def test_amax_only_rises(device):
    scaling = Scaling.from_bound(10.0, E4M3, device)
    for value, expected in ((2.0, 2.0), (1.0, 2.0), (-3.0, 3.0)):
        quantize(torch.full((16, 32), value, device=device), scaling)
        assert scaling.amax.item() == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_show(bad, device):
    x = torch.randn(80, 144, device=device)
    x[79, 143] = bad
    scaling = Scaling.from_bound(5.0, E4M3, device)
    operand = quantize(x, scaling)
    assert not scaling.amax.isfinite()
    assert bad == bad or operand.dequantize()[79, 143].isnan()


def test_two_runs_give_the_same_bits(device):
    x = torch.randn(208, 304, device=device)

    def run():
        scaling = Scaling.from_bound(5.0, E4M3, device)
        operand = quantize(x, scaling)
        return operand.data, operand.transposed, scaling.amax

    same_bits(run)


def test_a_bound_must_be_positive():
    with pytest.raises(ValueError, match="positive"):
        Scaling.from_bound(0.0, E4M3, "cpu")


@pytest.mark.cuda
@pytest.mark.large
def test_more_than_two_to_the_31_elements(device):
    rows, cols = 65600, 32768
    x = torch.zeros(rows, cols, dtype=torch.bfloat16, device=device)
    x[-1, -1], x[-1, 0], x[0, -1] = 1.0, 2.0, 3.0
    scaling = Scaling.from_bound(448.0, E4M3, device)
    operand = quantize(x, scaling)
    for view in (operand.data, operand.transposed.t()):
        assert [view[i, j].item() for i, j in ((-1, -1), (-1, 0), (0, -1))] == [1.0, 2.0, 3.0]
        assert view[-2].float().abs().max() == 0


@pytest.mark.parametrize(("dtype", "fp8_max", "step"), FORMATS)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_relative_error_is_half_a_step(dtype, fp8_max, step, scale):
    x = scale * torch.randn(64, 33)
    q, inverse = quantize_ref(x, dtype)
    assert q.dtype == dtype and inverse.shape == ()
    assert q.float().abs().max() == fp8_max  # the range of the dtype is used in full
    normal = x.abs() > x.abs().max() * 2.0**-12
    error = (q.float() * inverse - x)[normal].abs() / x[normal].abs()
    assert error.max() <= step / 2 * 1.001


@pytest.mark.parametrize(("dtype", "fp8_max", "step"), FORMATS)
def test_zeros_stay_zero(dtype, fp8_max, step):
    q, inverse = quantize_ref(torch.zeros(4, 4), dtype)
    assert (q.float() == 0).all() and inverse.isfinite()
