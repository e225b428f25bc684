"""residual_mix and residual_gradients at depth 16, and the cost of the whole bigram path.

Timed are the residual mix with norm and quantisation that opens a block, the residual add and norm
in its middle, both backward passes, and the gradients of all layers' lambdas. The compiled
alternative computes the same, with dynamic FP8 scales and a separate transposed copy.
"""

import torch

from nanofuse.bench.checks import relative_error
from nanofuse.bench.harness import (
    CAST_ERROR,
    ON_GPU,
    compiled,
    measure,
    median_seconds,
    op_benchmark,
    quantize_both_layouts,
    zipf_tokens,
)
from nanofuse.kernels.bigram_rows import bigram_embedding_ref, bigram_rows, bigram_rows_ref
from nanofuse.kernels.common.fp8 import E4M3, E5M2, Scaling
from nanofuse.kernels.common.rms_norm import rms_norm_ref
from nanofuse.kernels.embedding_grad import embedding_grad, sort_rows
from nanofuse.kernels.residual_gradients import residual_gradients, residual_gradients_ref
from nanofuse.kernels.residual_mix import residual_mix_bwd, residual_mix_fwd, residual_mix_ref

LAYERS, ROWS, T, WIDTH, VOCAB = (16, 32, 2048, 1024, 32768) if ON_GPU else (2, 2, 8, 32, 50)
N = ROWS * T
UNIT = N * WIDTH * 2  # bytes of one bf16 activation


class Inputs:
    """Random tensors of one layer in one micro-step of `rows` rows of `length` tokens."""

    def __init__(self, device, rows=ROWS, length=T):
        def randn(*shape):
            return torch.randn(*shape, device=device).bfloat16()

        n = rows * length
        self.tokens = zipf_tokens((rows, length), VOCAB, device)
        self.table = randn(5 * VOCAB, WIDTH)
        self.x, self.x0, self.branch, self.h, self.stream = (randn(n, WIDTH) for _ in range(5))
        self.resid, self.x0_lambda, self.bigram = (
            torch.tensor([v], device=device) for v in (1.1, 0.2, 0.05)
        )
        self.e4m3 = Scaling.from_bound(WIDTH**0.5, E4M3, device)
        self.e5m2 = Scaling.from_bound(40.0, E5M2, device)
        distinct = bigram_rows_ref(self.tokens, self.table.size(0)).unique().numel()
        self.row_bytes = distinct * WIDTH * 2  # each row read once
        self.rows = bigram_rows(self.tokens, self.table.size(0)).view(-1)

    def opening(self, table=True):
        """The kernel that opens a block, with or without the bigram term."""
        return residual_mix_fwd(
            self.x,
            self.branch,
            self.x0,
            ((self.rows, self.table, self.bigram),) if table else (),
            resid_lambda=self.resid,
            x0_lambda=self.x0_lambda,
            scaling=self.e4m3,
            want_normed=False,
        )


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


@op_benchmark
def bench_block_opening(benchmark, device):
    i = Inputs(device)
    args = (i.x, i.branch, i.x0, i.tokens, i.table, i.resid, i.x0_lambda, i.bigram)
    y, (q, _, inverse_scale) = opening_ref(*args)
    got, _, _, operand = i.opening()
    assert_close(got, y)
    assert_close(operand.dequantize(), q.float() * inverse_scale, 0.05)
    measure(
        benchmark,
        i.opening,
        bytes_moved=5 * UNIT + i.row_bytes,  # x, branch, x0 in; y, FP8 twice out; table rows
        alternatives=alternatives(opening_ref, *args),
        shape=(N, WIDTH),
    )


@op_benchmark
def bench_middle_norm(benchmark, device):
    i = Inputs(device)

    def op():
        return residual_mix_fwd(i.x, i.branch, scaling=i.e4m3, want_normed=False)

    y, (q, _, inverse_scale) = middle_ref(i.x, i.branch)
    got, _, _, operand = op()
    assert_close(got, y)
    assert_close(operand.dequantize(), q.float() * inverse_scale, 0.05)
    measure(
        benchmark,
        op,
        bytes_moved=4 * UNIT,
        alternatives=alternatives(middle_ref, i.x, i.branch),
        shape=(N, WIDTH),
    )


def backward_case(benchmark, i, x, resid):
    rstd = i.branch.float().square().mean(dim=-1).add(2.0**-23).rsqrt()
    args = (i.h, i.branch, rstd, i.stream, x, resid)

    def op():
        return residual_mix_bwd(
            i.h, i.branch, rstd, i.stream, x=x, resid_lambda=resid, scaling=i.e5m2
        )

    grad, grad_resid_lambda, (q, _, inverse_scale) = backward_ref(*args)
    got, got_resid_lambda, operand = op()
    assert_close(got, grad)
    assert x is None or abs(got_resid_lambda - grad_resid_lambda) < 1.0
    assert_close(operand.dequantize(), q.float() * inverse_scale, 0.1)
    measure(
        benchmark,
        op,
        bytes_moved=5 * UNIT,  # h, y, stream in; gradient, FP8 twice out
        alternatives=alternatives(backward_ref, *args),
        shape=(N, WIDTH),
    )


@op_benchmark
def bench_block_opening_backward(benchmark, device):
    i = Inputs(device)
    backward_case(benchmark, i, i.branch, i.resid)  # sum(g * x) follows from sum(g * y)


@op_benchmark
def bench_middle_norm_backward(benchmark, device):
    backward_case(benchmark, Inputs(device), None, None)


def all_layers_ref(grads, x0, x0_lambdas, tokens, table, bigram_lambdas):
    e = bigram_embedding_ref(tokens, table).view(x0.shape)
    return residual_gradients_ref(grads, x0, x0_lambdas, ((e, bigram_lambdas),))


def flat(gradients):
    """All tensors of what residual_gradients returns."""
    *first, of_tables = gradients
    return [*first, *(x for pair in of_tables for x in pair)]


@op_benchmark
def bench_residual_gradients(benchmark, device):
    i = Inputs(device)
    grads = torch.randn(LAYERS, N, WIDTH, device=device, dtype=torch.bfloat16)
    lambdas = [torch.rand(LAYERS, device=device) for _ in range(2)]

    def op(table=True):
        if not table:
            return residual_gradients(grads, i.x0, lambdas[0])
        return residual_gradients(grads, i.x0, lambdas[0], ((i.rows, i.table, lambdas[1]),))

    low = [v.bfloat16() for v in lambdas]
    args = (grads, i.x0, low[0], i.tokens, i.table, low[1])
    expected = all_layers_ref(*args)
    for got, want in zip(flat(op()), flat(expected), strict=True):
        assert_close(got, want, 0.05)
    info = measure(
        benchmark,
        op,
        bytes_moved=(LAYERS + 3) * UNIT + i.row_bytes,
        alternatives=alternatives(all_layers_ref, *args),
        shape=(LAYERS, N, WIDTH),
    )
    if "us" in info:
        benchmark.extra_info["bigram_path_ms"] = bigram_path(i, info["us"] * 1e-6, op)


def bigram_path(i, with_bigram, gradients):
    """Milliseconds per micro-step that the bigram term costs: the difference between the kernels
    with and without it, and the table's gradient.

    Args:
        i: Inputs.
        with_bigram: seconds of gradients().
        gradients: residual_gradients with the bigram term; gradients(False) without.
    """
    table_grad = torch.zeros_like(i.table)
    _, _, [(grad_e, _)] = gradients()
    forward = LAYERS * (median_seconds(i.opening) - median_seconds(lambda: i.opening(False)))
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
