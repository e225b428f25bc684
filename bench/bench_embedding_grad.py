"""embedding_grad of 65,536 tokens into the token table and the bigram table of depth 16."""

import pytest
import torch

from nanofuse.bench.cases.case import ROWS
from nanofuse.bench.cases.tables import (
    bigram_rows_case,
    bigram_table_case,
    embedding_grad_case,
    sort_rows_case,
)
from nanofuse.bench.harness import CAST_ERROR, compiled, measure_case, op_benchmark
from nanofuse.kernels.bigram_rows import bigram_rows_ref
from nanofuse.kernels.embedding_grad import embedding_grad_ref

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


def add_dense_backward(grad_rows, indices, table_grad):
    """What eager autograd does: a dense gradient, then an addition."""
    return table_grad.add_(
        torch.ops.aten.embedding_dense_backward(grad_rows, indices, table_grad.size(0), -1, False)
    )


def index_add(grad_rows, indices, table_grad):
    return table_grad.index_add_(0, indices, grad_rows.to(table_grad.dtype))


def bench(benchmark, case):
    """Check and time one accumulation of gradient rows into a table."""
    grad_rows, indices, table = case.args
    expected = embedding_grad_ref(grad_rows, indices, table.double())
    assert_close(case.run(), expected)
    alternatives = {
        "eager": lambda: add_dense_backward(grad_rows, indices, table),
        "compile": lambda: compiled(index_add)(grad_rows, indices, table),
    }
    measure_case(benchmark, case, alternatives)


def assert_close(got, exact):
    error = (got.double() - exact).norm() / exact.norm()
    assert error < CAST_ERROR * (3e-3 if got.dtype == torch.bfloat16 else 1e-6), error


@op_benchmark
@DTYPES
@pytest.mark.parametrize("pattern", ["zipf", "all equal", "never repeated"])
def bench_token_table(benchmark, device, pattern, dtype):
    bench(benchmark, embedding_grad_case(ROWS, device, pattern, dtype))


@op_benchmark
@DTYPES
def bench_bigram_table(benchmark, device, dtype):
    bench(benchmark, bigram_table_case(ROWS, device, dtype))


@op_benchmark
def bench_sort_rows(benchmark, device):
    case = sort_rows_case(ROWS, device)
    (tokens,) = case.args
    measure_case(benchmark, case, {"eager": lambda: tokens.flatten().sort(stable=True)})


@op_benchmark
def bench_bigram_rows(benchmark, device):
    case = bigram_rows_case(ROWS, device)
    assert torch.equal(case.run().long(), bigram_rows_ref(*case.args).view(case.run().shape))
    alternatives = {
        "eager": lambda: bigram_rows_ref(*case.args),
        "compile": lambda: compiled(bigram_rows_ref)(*case.args),
    }
    measure_case(benchmark, case, alternatives)
