"""embedding_grad of 65,536 tokens into the token table and the bigram table of depth 16."""

import pytest
import torch

from nanofuse.bench.harness import CAST_ERROR, ON_GPU, compiled, measure, op_benchmark, zipf_tokens
from nanofuse.kernels.bigram_rows import bigram_rows, bigram_rows_ref
from nanofuse.kernels.embedding_grad import embedding_grad, embedding_grad_ref, sort_rows

BATCH, LENGTH, WIDTH = (32, 2048, 1024) if ON_GPU else (2, 16, 8)
VOCAB, BIGRAM_ROWS = (32768, 163840) if ON_GPU else (32, 160)


def add_dense_backward(grad_rows, indices, table_grad):
    """What eager autograd does: a dense gradient, then an addition."""
    return table_grad.add_(
        torch.ops.aten.embedding_dense_backward(grad_rows, indices, table_grad.size(0), -1, False)
    )


def index_add(grad_rows, indices, table_grad):
    return table_grad.index_add_(0, indices, grad_rows.to(table_grad.dtype))


def bench(benchmark, op, grad_rows, indices, table, name):
    """Check and time op(table): one accumulation of grad_rows into a table."""
    assert_close(op(table.clone()), embedding_grad_ref(grad_rows, indices, table.double()))
    distinct = indices.unique().numel()
    measure(
        benchmark,
        lambda: op(table),
        bytes_moved=grad_rows.numel() * 2 + 2 * distinct * WIDTH * table.element_size(),
        alternatives={
            "eager": lambda: add_dense_backward(grad_rows, indices, table),
            "compile": lambda: compiled(index_add)(grad_rows, indices, table),
        },
        shape=(*grad_rows.shape, name, table.size(0), distinct),
    )


def assert_close(got, exact):
    error = (got.double() - exact).norm() / exact.norm()
    assert error < CAST_ERROR * (3e-3 if got.dtype == torch.bfloat16 else 1e-6), error


def inputs(dtype, rows, device):
    """Zipf tokens (B, T), gradient rows, and a gradient table that is not zero."""
    tokens = zipf_tokens((BATCH, LENGTH), VOCAB, device)
    grad_rows = torch.randn(BATCH * LENGTH, WIDTH, device=device).to(torch.bfloat16)
    return tokens, grad_rows, torch.randn(rows, WIDTH, device=device).to(dtype)


@op_benchmark
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("pattern", ["zipf", "all equal", "never repeated"])
def bench_token_table(benchmark, device, pattern, dtype):
    """Without sorting the tokens: that is done once per micro-step for all tables."""
    tokens, grad_rows, table = inputs(dtype, max(VOCAB, BATCH * LENGTH), device)
    if pattern == "all equal":
        tokens.zero_()
    elif pattern == "never repeated":
        tokens = torch.randperm(BATCH * LENGTH, device=device)
    indices = tokens.flatten()
    sorted_rows = sort_rows(indices, table.size(0))

    def op(table):
        return embedding_grad(grad_rows, sorted_rows, table)

    bench(benchmark, op, grad_rows, indices, table, pattern)


@op_benchmark
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def bench_bigram_table(benchmark, device, dtype):
    """Hashing, sorting and sums."""
    tokens, grad_rows, table = inputs(dtype, BIGRAM_ROWS, device)
    indices = bigram_rows_ref(tokens, BIGRAM_ROWS).flatten()

    def op(table):
        order = sort_rows(bigram_rows(tokens, BIGRAM_ROWS), BIGRAM_ROWS)
        return embedding_grad(grad_rows, order, table)

    bench(benchmark, op, grad_rows, indices, table, "bigram")


@op_benchmark
def bench_sort_rows(benchmark, device):
    indices = zipf_tokens((BATCH, LENGTH), VOCAB, device)
    measure(
        benchmark,
        lambda: sort_rows(indices, VOCAB),
        bytes_moved=indices.numel() * (indices.element_size() + 8),
        alternatives={"eager": lambda: indices.flatten().sort(stable=True)},
        shape=tuple(indices.shape),
    )
