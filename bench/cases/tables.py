"""Cases of the lookup tables: the rows of bigrams, and the gradients of the tables."""

import torch

from nanofuse.bench.cases.case import BIGRAM_FACTOR, Case, looked_up, randn, rows_of_tokens, sizes
from nanofuse.bench.harness import zipf_tokens
from nanofuse.kernels.bigram_rows import bigram_rows
from nanofuse.kernels.embedding_grad import embedding_grad, sort_rows


def bigram_rows_case(rows, device):
    vocab = sizes(device).vocab
    tokens = zipf_tokens(rows_of_tokens(rows), vocab, device)
    args = tokens, BIGRAM_FACTOR * vocab
    return Case(lambda: bigram_rows(*args), tuple(tokens.shape), tokens, args=args)


def sort_rows_case(rows, device):
    vocab = sizes(device).vocab
    tokens = zipf_tokens(rows_of_tokens(rows), vocab, device)
    written = 8 * tokens.numel()  # rows and order, int32
    return Case(
        lambda: sort_rows(tokens, vocab),
        tuple(tokens.shape),
        tokens,
        written,
        False,
        args=(tokens,),
    )


def table_inputs(rows, device, table_rows, dtype):
    """Gradient rows (N, C) bf16, and a gradient table (R, C) that is not zero."""
    width = sizes(device).width
    return randn(device, rows, width), torch.randn(table_rows, width, device=device).to(dtype)


def embedding_grad_case(rows, device, pattern="zipf", dtype=torch.bfloat16):
    """Into a table of tokens, sorted before: that is done once per micro-step for all tables."""
    vocab = sizes(device).vocab
    tokens = {
        "zipf": lambda: zipf_tokens((rows,), vocab, device),
        "all equal": lambda: torch.zeros(rows, dtype=torch.int64, device=device),
        "never repeated": lambda: torch.randperm(rows, device=device),
    }[pattern]()
    grad, table = table_inputs(rows, device, max(vocab, rows), dtype)
    order = sort_rows(tokens, table.size(0))
    touched = looked_up(table, tokens)
    return Case(
        lambda: embedding_grad(grad, order, table),
        (*grad.shape, pattern, table.size(0)),
        (grad, touched),
        touched,
        returns_new=False,
        args=(grad, tokens, table),
    )


def bigram_table_case(rows, device, dtype=torch.bfloat16):
    """Hashing, sorting and sums."""
    vocab = sizes(device).vocab
    tokens = zipf_tokens(rows_of_tokens(rows), vocab, device)
    grad, table = table_inputs(rows, device, BIGRAM_FACTOR * vocab, dtype)
    indices = bigram_rows(tokens, table.size(0)).flatten()
    touched = looked_up(table, indices)

    def run():
        order = sort_rows(bigram_rows(tokens, table.size(0)), table.size(0))
        return embedding_grad(grad, order, table)

    shape = (*grad.shape, "bigram", table.size(0))
    args = grad, indices, table
    return Case(run, shape, (grad, touched), touched, returns_new=False, args=args)
