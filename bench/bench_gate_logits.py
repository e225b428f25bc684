"""gate_logits at depth 16, forward and backward: products too thin for tensor cores."""

import pytest
import torch

from nanofuse.bench.checks import relative_error
from nanofuse.bench.harness import ON_GPU, compiled, measure, op_benchmark
from nanofuse.kernels.gate_logits import gate_logits_bwd, gate_logits_fwd, gate_logits_ref

N, WIDTH, HEADS, CHANNELS = (65536, 1024, 8, 12) if ON_GPU else (64, 32, 2, 12)
SECTOR = 32  # bytes, the smallest access to memory: what is read of a row of y


def backward_ref(grad_logits, y, rstd, weight, grad_normed, grad_weight):
    """gate_logits_bwd in plain torch: accumulates in place."""
    channels = weight.size(1)
    normed = y[:, :channels].float() * rstd[:, None]
    grad_weight.addmm_(grad_logits.t(), normed)
    grad_normed[:, :channels] += (grad_logits @ weight).to(grad_normed.dtype)


@op_benchmark
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def bench_gate_logits(benchmark, device, backward):
    y, grad_normed = torch.randn(2, N, WIDTH, device=device).bfloat16()
    weight, grad_weight = torch.randn(2, HEADS, CHANNELS, device=device)
    rstd, h = torch.rand(N, device=device), torch.randn(N, HEADS, device=device)
    args, op, reference = (y, rstd, weight), gate_logits_fwd, gate_logits_ref
    if backward:
        args, op, reference = (h, *args, grad_normed, grad_weight), gate_logits_bwd, backward_ref
    logits = gate_logits_fwd(y, rstd, weight)
    assert relative_error(logits, gate_logits_ref(y, rstd, weight)) < 1e-5
    totals = [(grad_normed.clone(), grad_weight.clone()) for _ in range(2)]
    gate_logits_bwd(h, y, rstd, weight, *totals[0])
    backward_ref(h, y, rstd, weight, *totals[1])
    for got, expected in zip(*totals, strict=True):
        assert relative_error(got, expected) < 0.01
    measure(
        benchmark,
        lambda: op(*args),
        bytes_moved=N * (SECTOR * (3 if backward else 1) + 4 * HEADS + 4),
        alternatives={
            "eager": lambda: reference(*args),
            "compile": lambda: compiled(reference)(*args),
        },
        shape=(N, HEADS, CHANNELS),
    )
