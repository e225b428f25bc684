"""resid_lambda_grad at depth 16 in FP8: an ordinary lambda, which only returns, and a small one."""

import pytest
import torch

from nanofuse.bench.checks import relative_error
from nanofuse.bench.harness import ON_GPU, measure, op_benchmark
from nanofuse.kernels.common.fp8 import E4M3, Scaling
from nanofuse.kernels.common.tuning import sm_count
from nanofuse.kernels.quantize import quantize
from nanofuse.kernels.resid_lambda_grad import resid_lambda_grad

N, WIDTH = (65536, 1024) if ON_GPU else (64, 32)
HIDDEN = 4 * WIDTH


@op_benchmark
@pytest.mark.parametrize("value", [1.0, 0.0], ids=["ordinary", "small"])
def bench_resid_lambda_grad(benchmark, device, value):
    g, x = torch.randn(2, N, WIDTH, device=device).bfloat16()
    a = quantize(
        torch.randn(N, HIDDEN, device=device).bfloat16(), Scaling.from_bound(6.0, E4M3, device)
    )
    w = quantize(
        torch.rand(WIDTH, HIDDEN, device=device).bfloat16(), Scaling.from_bound(1.0, E4M3, device)
    )
    resid, shares = (
        torch.tensor([value], device=device),
        torch.zeros(sm_count(g.device), device=device),
    )
    branch = torch.mm(a.dequantize(), w.dequantize().t())
    exact = (g.double() * (x.double() + branch)).sum() if value == 0 else torch.zeros(())
    got = resid_lambda_grad(g, x, a, w, resid, shares).sum()
    assert got == exact if value else relative_error(got, exact) < 0.01
    small = value == 0
    measure(
        benchmark,
        lambda: resid_lambda_grad(g, x, a, w, resid, shares),
        bytes_moved=N * (4 * WIDTH + HIDDEN) + WIDTH * HIDDEN if small else 4,
        flops=2 * N * WIDTH * HIDDEN if small else 0,
        alternatives={"eager": lambda: (g * (x + branch)).sum()} if small else {},
        shape=(N, WIDTH, HIDDEN),
    )
