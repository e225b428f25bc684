"""embed_smear at depth 16: token embedding, RMSNorm and smear, forward and backward."""

import torch

from nanofuse.bench.cases.case import ROWS
from nanofuse.bench.cases.stream import SMEAR_CHANNELS, embed_smear_bwd_case, embed_smear_fwd_case
from nanofuse.bench.checks import assert_accurate, relative_error
from nanofuse.bench.harness import ON_GPU, compiled, measure_case, op_benchmark
from nanofuse.kernels.common.rms_norm import rms_norm_ref
from nanofuse.kernels.embed_smear import embed_smear_ref, smear_ref

DTYPE = torch.bfloat16 if ON_GPU else torch.float32  # the interpreter truncates to bf16


@op_benchmark
def bench_embed_smear(benchmark, device):
    case = embed_smear_fwd_case(ROWS, device, DTYPE)
    args = case.args
    expected = embed_smear_ref(*args).view(case.shape)
    assert relative_error(case.run()[0], expected) < 0.01
    alternatives = {
        "eager": lambda: embed_smear_ref(*args),
        "compile": lambda: compiled(embed_smear_ref)(*args),
    }
    measure_case(benchmark, case, alternatives)


@op_benchmark
def bench_embed_smear_backward(benchmark, device):
    case = embed_smear_bwd_case(ROWS, device, DTYPE)
    grad, tokens, table, *gate_args = case.args
    rows = torch.nn.functional.embedding(tokens, table)  # (B, T, C)

    def smeared(x, gate_weight, smear_lambda):
        gate = torch.nn.functional.linear(x[..., :SMEAR_CHANNELS], gate_weight.to(x.dtype))
        return smear_ref(x, gate, smear_lambda)

    def smear_rows(rows, *gate_args):
        return smeared(rms_norm_ref(rows), *gate_args)

    def smear_rows_rounded_once(rows, *gate_args):
        """smear_rows with the normalised rows rounded to DTYPE, as kernel and reference round them,
        and nothing else: this rounding alone changes smear_lambda's gradient, in whose sum most
        terms cancel, by up to 1 %."""
        x = rms_norm_ref(rows)
        return smeared(x + (x.to(DTYPE) - x).detach(), *gate_args)

    def backward(function, dtype=None):
        """A function that runs only the backward pass of `function`, on a graph that is kept;
        `dtype` casts the inputs."""
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (rows, *gate_args)]
        y = function(*leaves)
        g = grad.view(y.shape).to(y.dtype)
        return lambda: torch.autograd.grad(y, leaves, g, retain_graph=True)

    eager = backward(smear_rows)
    results = case.run(), eager()
    truth = backward(smear_rows_rounded_once, torch.float64)()
    for name, *three in zip(("rows", "gate", "lambda"), *results, truth, strict=True):
        assert_accurate(name, *(x.view(three[0].shape) for x in three), floor=1e-3)
    del results, truth, three
    measure_case(benchmark, case, {"eager": eager, "compile": backward(compiled(smear_rows))})
