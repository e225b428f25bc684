"""embed_smear at depth 16: token embedding, RMSNorm and smear, forward and backward."""

import torch

from nanofuse.bench.checks import assert_accurate, relative_error
from nanofuse.bench.harness import ON_GPU, compiled, measure, op_benchmark, zipf_tokens
from nanofuse.kernels.common.rms_norm import rms_norm_ref
from nanofuse.kernels.embed_smear import (
    embed_smear_bwd,
    embed_smear_fwd,
    embed_smear_ref,
    smear_ref,
)

ROWS, T, WIDTH, VOCAB, GATE = (32, 2048, 1024, 32768, 24) if ON_GPU else (2, 8, 32, 50, 24)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32  # the interpreter truncates to bf16
UNIT = ROWS * T * WIDTH * 2


def inputs(device):
    tokens = zipf_tokens((ROWS, T), VOCAB, device)
    table = torch.randn(VOCAB, WIDTH, device=device).to(DTYPE)
    gate_weight = torch.rand(1, GATE, device=device)
    return tokens, table, gate_weight, torch.tensor([0.3], device=device)


@op_benchmark
def bench_embed_smear(benchmark, device):
    args = inputs(device)
    expected = embed_smear_ref(*args).view(-1, WIDTH)
    assert relative_error(embed_smear_fwd(*args)[0], expected) < 0.01
    measure(
        benchmark,
        lambda: embed_smear_fwd(*args),
        bytes_moved=UNIT + args[0].unique().numel() * WIDTH * 2,
        alternatives={
            "eager": lambda: embed_smear_ref(*args),
            "compile": lambda: compiled(embed_smear_ref)(*args),
        },
        shape=(ROWS * T, WIDTH),
    )


@op_benchmark
def bench_embed_smear_backward(benchmark, device):
    args = inputs(device)
    grad = torch.randn(ROWS * T, WIDTH, device=device).to(DTYPE)
    tokens, table, *gate_args = args
    rows = torch.nn.functional.embedding(tokens, table)  # (B, T, C)

    def smeared(x, gate_weight, smear_lambda):
        gate = torch.nn.functional.linear(x[..., :GATE], gate_weight.to(x.dtype))
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
    gate = embed_smear_fwd(*args)[1]
    results = embed_smear_bwd(grad, *args, gate), eager()
    truth = backward(smear_rows_rounded_once, torch.float64)()
    for name, *three in zip(("rows", "gate", "lambda"), *results, truth, strict=True):
        assert_accurate(name, *(x.view(three[0].shape) for x in three), floor=1e-3)
    del results, truth, three
    measure(
        benchmark,
        lambda: embed_smear_bwd(grad, *args, gate),
        bytes_moved=2 * UNIT + args[0].unique().numel() * WIDTH * 2,
        alternatives={"eager": eager, "compile": backward(compiled(smear_rows))},
        shape=(ROWS * T, WIDTH),
    )
