"""gradient_squares at depth 16: every gradient of the recipe's model, fp32 and bf16."""

import torch

from nanofuse.bench.cases.case import ROWS
from nanofuse.bench.cases.optim import gradient_squares_case
from nanofuse.bench.harness import measure_case, op_benchmark
from nanofuse.kernels.gradient_squares import gradient_squares_ref


@op_benchmark
def bench_gradient_squares(benchmark, device):
    case = gradient_squares_case(ROWS, device)
    (grads,) = case.args
    truth = gradient_squares_ref(grads)
    assert ((case.run().double() - truth) / truth).abs().max() < 1e-4
    measure_case(benchmark, case, {"foreach_norm": lambda: torch._foreach_norm(grads)})
