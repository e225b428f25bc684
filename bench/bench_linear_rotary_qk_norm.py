"""linear_rotary_qk_norm at the attention of depth 16, in FP8, with and without a value embedding.

The alternatives are a library's product followed by the rotary_qk_norm kernel, between which qkv
passes through memory in bf16.
"""

from functools import partial

import pytest
import torch

from nanofuse.bench.bench_linear_relu_squared import providers
from nanofuse.bench.cases.case import ROWS
from nanofuse.bench.cases.stream import linear_rotary_qk_norm_case
from nanofuse.bench.checks import relative_error
from nanofuse.bench.harness import measure_case, op_benchmark
from nanofuse.kernels.common import panel
from nanofuse.kernels.linear_rotary_qk_norm import OP
from nanofuse.kernels.rotary_qk_norm import rotary_qk_norm_fwd

BOUND = 0.005  # of a result that is rounded to bf16 twice, and of fast accumulation


def apart(case, gemm):
    """A provider's product, and then the rotary_qk_norm kernel."""
    x, w, args = case.args
    qkv = gemm.forward(x, w)
    return qkv, rotary_qk_norm_fwd(qkv, *args, case.shape[1] // 128)


@op_benchmark
@pytest.mark.parametrize("value", [False, True], ids=["plain", "value"])
def bench_linear_rotary_qk_norm(benchmark, device, value):
    if not panel.takes(OP, device, ROWS, 3072, 1024):
        pytest.skip("a kernel for Hopper alone")
    case = linear_rotary_qk_norm_case(ROWS, device, value)
    alternatives = {name: partial(apart, case, gemm) for name, gemm in providers().items()}
    qkv, rstd = case.run()
    for run in alternatives.values():
        other, other_rstd = run()
        assert relative_error(qkv, other.double()) < BOUND
        torch.testing.assert_close(rstd, other_rstd, rtol=BOUND, atol=0)
    measure_case(benchmark, case, alternatives)
