"""linear_softcap_cross_entropy at lm_head of depths 16, 8 and 4, in FP8 and bf16.

The alternatives are a library's product followed by the softcap_cross_entropy kernels, between
which the logits pass through memory in bf16; in bf16 torch.compile as well. The passes over x, dx
and dw that only this op needs are timed by themselves.
"""

from functools import partial

import pytest
import torch

from nanofuse.bench.bench_linear_relu_squared import providers
from nanofuse.bench.cases import mlp
from nanofuse.bench.cases.case import ROWS, sizes
from nanofuse.bench.checks import relative_error
from nanofuse.bench.harness import CAST_ERROR, ON_GPU, compiled, measure_case, op_benchmark
from nanofuse.kernels.common.fp8 import E5M2, Scaling
from nanofuse.kernels.linear_softcap_cross_entropy import (
    linear_softcap_cross_entropy_dx,
    linear_softcap_cross_entropy_fwd,
    linear_softcap_cross_entropy_ref,
)
from nanofuse.kernels.softcap_cross_entropy import (
    mean_grad_scale,
    softcap_cross_entropy_fwd_bwd,
    softcap_cross_entropy_ref,
)

PLAIN = torch.bfloat16 if ON_GPU else torch.float32  # the interpreter's products of bf16 are wrong
WIDTHS = pytest.mark.parametrize("width", [1024, 512, 256] if ON_GPU else [64])
CHECKED_ROWS = min(ROWS, 1024)


def unfused(args, gemm, fp8):
    """A provider's product, then losses and the logits' gradient, as operands."""
    x, w, targets, vocab = args
    logits, scale = gemm(x, w), mean_grad_scale(targets)
    scaling = Scaling.from_bound(2.0 / len(targets), E5M2, targets.device) if fp8 else None
    return softcap_cross_entropy_fwd_bwd(logits, targets, scale, vocab, scaling, inplace=not fp8)


def check(x, w, targets, vocab, fp8):
    """Losses and dx of the first rows against the reference in fp32 of the same operands."""
    x_plain, w_plain = (t.dequantize() if fp8 else t.float() for t in (x, w))
    x_plain = x_plain[:CHECKED_ROWS].requires_grad_()
    rows = targets[:CHECKED_ROWS]
    losses, _, grad = linear_softcap_cross_entropy_fwd(x, w, targets, vocab)
    exact = softcap_cross_entropy_ref(x_plain @ w_plain.t(), rows, vocab, reduction="none")
    exact.sum().backward()
    u = grad.u.data if fp8 else grad.u
    product = torch.zeros(len(targets), w_plain.size(1), device=targets.device)
    product[:CHECKED_ROWS] = u[:CHECKED_ROWS].float() @ w_plain
    one = torch.ones(1, device=targets.device)
    dx = linear_softcap_cross_entropy_dx(product, w, grad, one)[:CHECKED_ROWS]
    assert (losses[:CHECKED_ROWS] - exact.detach()).abs().mean() < 5e-3
    error = relative_error(dx, x_plain.grad)
    assert error < CAST_ERROR * 0.03, error


@op_benchmark
@WIDTHS
def bench_linear_softcap_cross_entropy(benchmark, device, width):
    case = mlp.linear_softcap_case(ROWS, device, True, width)
    check(*case.args, fp8=True)
    alternatives = {
        name: partial(unfused, case.args, gemm.forward, True) for name, gemm in providers().items()
    }
    measure_case(benchmark, case, alternatives)


@op_benchmark
@WIDTHS
def bench_linear_softcap_cross_entropy_bf16(benchmark, device, width):
    """In bf16 (fp32 on a CPU)."""
    case = mlp.linear_softcap_case(ROWS, device, False, width, PLAIN)
    check(*case.args, fp8=False)
    reference = compiled(linear_softcap_cross_entropy_ref)

    def forward_alone():
        with torch.no_grad():
            return reference(*case.args)

    alternatives = {
        "product and kernels": partial(unfused, case.args, lambda x, w: x @ w.t(), False),
        "compile, losses alone": forward_alone,
    }
    measure_case(benchmark, case, alternatives)


PASSES = {
    "weighted_rows": mlp.weighted_rows_case,
    "dx": mlp.linear_softcap_dx_case,
    "dw": mlp.linear_softcap_dw_case,
}


@op_benchmark
@pytest.mark.parametrize("name", PASSES)
def bench_linear_softcap_cross_entropy_rows(benchmark, device, name):
    """What scales rows and adds the targets' part, of FP8 operands (tests compare the results)."""
    measure_case(benchmark, PASSES[name](ROWS, device, True, sizes(device).width))
