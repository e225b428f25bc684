"""linear_residual_norm at the end of attention of depth 16, in FP8.

The alternatives are a library's product followed by residual_mix, between which the branch passes
through memory in bf16.
"""

from functools import partial

import pytest
import torch

from nanofuse.bench.bench_linear_relu_squared import providers
from nanofuse.bench.cases.case import ROWS
from nanofuse.bench.cases.stream import linear_residual_norm_case
from nanofuse.bench.checks import relative_error
from nanofuse.bench.harness import measure_case, op_benchmark
from nanofuse.kernels.common import panel
from nanofuse.kernels.linear_residual_norm import OP
from nanofuse.kernels.residual_mix import residual_mix_fwd

BOUND = 0.005  # of a result that is rounded to bf16 twice, and of fast accumulation
OF_NORM = 0.05  # in FP8, of which some numbers go to the other neighbour


def apart(case, gemm):
    """A provider's product, and then residual_mix."""
    a, w, x, scaling = case.args
    return residual_mix_fwd(x, gemm.forward(a, w), scaling=scaling)


@op_benchmark
def bench_linear_residual_norm(benchmark, device):
    if not panel.takes(OP, device, ROWS, 1024, 1024):
        pytest.skip("a kernel for Hopper alone")
    case = linear_residual_norm_case(ROWS, device)
    alternatives = {name: partial(apart, case, gemm) for name, gemm in providers().items()}
    y, rstd, normed = case.run()
    for run in alternatives.values():
        other, other_rstd, other_normed = run()
        assert relative_error(y, other.double()) < BOUND
        torch.testing.assert_close(rstd, other_rstd, rtol=BOUND, atol=0)
        other = other_normed.dequantize().double()
        assert relative_error(normed.dequantize(), other) < OF_NORM
    measure_case(benchmark, case, alternatives)
