"""residual_mix and residual_gradients at depth 16, and the cost of the whole bigram path.

Timed are the residual mix with norm and quantisation that opens a block, the residual add and norm
in its middle, both backward passes, and the gradients of all layers' lambdas. The compiled
alternative computes the same, with dynamic FP8 scales and a separate transposed copy.
"""

import torch

from nanofuse.bench.cases.case import ROWS
from nanofuse.bench.cases.stream import (
    residual_bwd_case,
    residual_gradients_case,
    residual_mix_fwd_case,
    residual_norm_fwd_case,
)
from nanofuse.bench.checks import relative_error
from nanofuse.bench.harness import (
    CAST_ERROR,
    compiled,
    measure_case,
    median_seconds,
    op_benchmark,
    quantize_both_layouts,
)
from nanofuse.kernels.bigram_rows import bigram_embedding_ref, bigram_rows
from nanofuse.kernels.common.fp8 import E4M3, E5M2
from nanofuse.kernels.common.rms_norm import rms_norm_ref
from nanofuse.kernels.embedding_grad import embedding_grad, sort_rows
from nanofuse.kernels.residual_gradients import residual_gradients_ref
from nanofuse.kernels.residual_mix import residual_mix_ref


def opening_ref(x, branch, x0, tokens, table, resid, x0_lambda, bigram):
    e = bigram_embedding_ref(tokens, table).view(x.shape)
    scales = (s.to(x.dtype) for s in (resid, x0_lambda))
    y = residual_mix_ref(x + branch, x0, *scales, ((e, bigram.to(x.dtype)),))
    return y, quantize_both_layouts(rms_norm_ref(y), E4M3)


def middle_ref(x, branch):
    y = x + branch
    return y, quantize_both_layouts(rms_norm_ref(y), E4M3)


def backward_ref(h, y, rstd, stream, x, resid):
    h, y, rstd = h.float(), y.float(), rstd[:, None]
    g = stream.float() + rstd * h - y * rstd**3 * (h * y).mean(dim=-1, keepdim=True)
    grad_resid_lambda = None if x is None else (g * x.float()).sum()
    branch = (g if resid is None else resid * g).bfloat16()
    return g.bfloat16(), grad_resid_lambda, quantize_both_layouts(branch, E5M2)


def alternatives(function, *args):
    return {
        "eager": lambda: function(*args),
        "compile": lambda: compiled(function)(*args),
    }


def assert_close(got, expected, bound=0.01):
    assert relative_error(got, expected) < CAST_ERROR * bound


def forward(benchmark, case, reference, *args):
    """Check and time a mix with norm and quantisation."""
    y, (q, _, inverse_scale) = reference(*args)
    got, _, operand = case.run()
    assert_close(got, y)
    assert_close(operand.dequantize(), q.float() * inverse_scale, 0.05)
    measure_case(benchmark, case, alternatives(reference, *args))


@op_benchmark
def bench_block_opening(benchmark, device):
    case = residual_mix_fwd_case(ROWS, device)
    (i,) = case.args
    args = i.x, i.branch, i.x0, i.tokens, i.table, i.resid, i.x0_lambda, i.bigram
    forward(benchmark, case, opening_ref, *args)


@op_benchmark
def bench_middle_norm(benchmark, device):
    case = residual_norm_fwd_case(ROWS, device)
    (i,) = case.args
    forward(benchmark, case, middle_ref, i.x, i.branch)


def backward(benchmark, case):
    i, options = case.args
    x, resid = (options.get(name) for name in ("x", "resid_lambda"))
    args = i.h, i.branch, i.rstd, i.stream, x, resid
    grad, grad_resid_lambda, (q, _, inverse_scale) = backward_ref(*args)
    got, got_resid_lambda, operand = case.run()
    assert_close(got, grad)
    assert x is None or abs(got_resid_lambda - grad_resid_lambda) < 1.0
    assert_close(operand.dequantize(), q.float() * inverse_scale, 0.1)
    measure_case(benchmark, case, alternatives(backward_ref, *args))


@op_benchmark
def bench_block_opening_backward(benchmark, device):
    backward(benchmark, residual_bwd_case(ROWS, device, opening=True))


@op_benchmark
def bench_middle_norm_backward(benchmark, device):
    backward(benchmark, residual_bwd_case(ROWS, device, opening=False))


def all_layers_ref(grads, x0, x0_lambdas, tokens, table, bigram_lambdas):
    e = bigram_embedding_ref(tokens, table).view(x0.shape)
    return residual_gradients_ref(grads, x0, x0_lambdas, ((e, bigram_lambdas),))


def flat(gradients):
    """All tensors of what residual_gradients returns."""
    *first, of_tables = gradients
    return [*first, *(x for pair in of_tables for x in pair)]


@op_benchmark
def bench_residual_gradients(benchmark, device):
    case = residual_gradients_case(ROWS, device)
    i, grads, lambdas = case.args
    low = [v.bfloat16() for v in lambdas]
    args = (grads, i.x0, low[0], i.tokens, i.table, low[1])
    expected = all_layers_ref(*args)
    for got, want in zip(flat(case.run()), flat(expected), strict=True):
        assert_close(got, want, 0.05)
    info = measure_case(benchmark, case, alternatives(all_layers_ref, *args))
    if "us" in info:
        path = bigram_path(i, grads.size(0), info["us"] * 1e-6, case.run)
        benchmark.extra_info["bigram_path_ms"] = path


def bigram_path(i, layers, with_bigram, gradients):
    """Milliseconds per micro-step that the bigram term costs: the difference between the kernels
    with and without it, and the table's gradient.

    Args:
        i: cases.stream.Layer.
        layers: of the model.
        with_bigram: seconds of gradients().
        gradients: residual_gradients with the bigram term; gradients(False) without.
    """
    table_grad = torch.zeros_like(i.table)
    _, _, [(grad_e, _)] = gradients()
    forward = layers * (median_seconds(i.opening) - median_seconds(lambda: i.opening(False)))
    backward = with_bigram - median_seconds(lambda: gradients(False))

    def table_gradient():
        rows = table_grad.size(0)
        order = sort_rows(bigram_rows(i.tokens, rows), rows)
        embedding_grad(grad_e, order, table_grad)

    scatter = median_seconds(table_gradient)
    parts = {"forward": forward, "backward": backward, "table_grad": scatter}
    total = 1e3 * sum(parts.values())
    shown = ", ".join(f"{name} {1e3 * seconds:.3f}" for name, seconds in parts.items())
    print(f"\nbigram path, ms a micro-step: {total:.3f} ({shown})")
    return total
