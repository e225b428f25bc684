"""symmetric_matmul and batched_matmul: the products of a Newton-Schulz iteration at depth 16."""

import pytest

from nanofuse.bench.cases import optim
from nanofuse.bench.cases.case import ROWS
from nanofuse.bench.checks import relative_error
from nanofuse.bench.harness import compiled, measure_case, op_benchmark
from nanofuse.kernels.symmetric_matmul import batched_matmul_ref, symmetric_matmul_ref

BOUND = 5e-3  # fp16's rounding is 5e-4, and the reference rounds after each operation


@op_benchmark
@pytest.mark.parametrize("transpose", [False, True], ids=["square", "transposed"])
def bench_symmetric_matmul(benchmark, device, transpose):
    name = "symmetric_matmul_transposed_case" if transpose else "symmetric_matmul_case"
    case = getattr(optim, name)(ROWS, device)
    x, options = case.args
    assert relative_error(case.run(), symmetric_matmul_ref(x, **options)) < BOUND
    alternatives = {
        "eager": lambda: symmetric_matmul_ref(x, **options),
        "compile": lambda: compiled(symmetric_matmul_ref)(x, **options),
    }
    measure_case(benchmark, case, alternatives)


@op_benchmark
def bench_batched_matmul(benchmark, device):
    """With a result in bf16, as the iteration's last product has."""
    case = optim.batched_matmul_case(ROWS, device)
    x, scale = case.args
    got = case.run()[0]
    assert relative_error(got, batched_matmul_ref(x.float(), x.float(), scale=scale)) < BOUND
    alternatives = {
        "eager": lambda: batched_matmul_ref(x, x, scale=scale),
        "compile": lambda: compiled(batched_matmul_ref)(x, x, scale=scale),
    }
    measure_case(benchmark, case, alternatives)
