"""resid_lambda_grad at depth 16 in FP8: an ordinary lambda, which only returns, and a small one."""

import pytest
import torch

from nanofuse.bench.cases.case import ROWS
from nanofuse.bench.cases.stream import resid_lambda_grad_case
from nanofuse.bench.checks import relative_error
from nanofuse.bench.harness import measure_case, op_benchmark


@op_benchmark
@pytest.mark.parametrize("value", [1.0, 0.0], ids=["ordinary", "small"])
def bench_resid_lambda_grad(benchmark, device, value):
    case = resid_lambda_grad_case(ROWS, device, value)
    g, x, a, w, *_ = case.args
    branch = torch.mm(a.dequantize(), w.dequantize().t())
    exact = torch.zeros(()) if value else (g.double() * (x.double() + branch)).sum()
    got = case.run().sum()
    assert got == exact if value else relative_error(got, exact) < 0.01
    measure_case(benchmark, case, {} if value else {"eager": lambda: (g * (x + branch)).sum()})
