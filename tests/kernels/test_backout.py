import pytest
import torch

from nanofuse.bench.checks import DTYPES, assert_accurate
from nanofuse.kernels.backout import backout, backout_ref
from nanofuse.kernels.common.rms_norm import rms_norm_ref


def test_reference_against_longhand():
    x, mid = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(backout_ref(x, mid, torch.tensor([0.2])), x - 0.2 * mid)


def run(case, dtype, fused):
    x, branch, mid, scale, *upstream = (t.to(dtype) for t in case)
    leaves = [t.detach().requires_grad_() for t in (x, branch, mid, scale)]
    if fused:
        y, normed = backout(leaves[0], leaves[2], leaves[3], branch=leaves[1])
    else:
        y = backout_ref(leaves[0] + leaves[1], *leaves[2:])
        normed = rms_norm_ref(y)
    return y, normed, *torch.autograd.grad([y, normed], leaves, upstream)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 17, 129)], ids=str)
def test_with_the_last_branch_and_the_norm(shape, dtype, device):
    generator = torch.Generator().manual_seed(0)
    case = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(5)]
    case.insert(3, torch.tensor([0.2], device=device))
    got, same = run(case, dtype, True), run(case, dtype, False)
    names = ("y", "normed", "x", "branch", "mid", "lambda")
    floor = 1e-6 if dtype == torch.float32 else 4e-3
    for name, *tensors in zip(names, got, same, run(case, torch.float64, False), strict=True):
        assert_accurate(name, *tensors, floor)
