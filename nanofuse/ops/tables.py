"""Embedding tables: rows of bigrams, embeddings with smear, and their gradient."""

import torch
from torch import Tensor

from nanofuse.ops.backend import Backend, runs_kernel


def bigram_rows(
    tokens: Tensor,  # (B, T) integer
    num_rows: int,
    *,
    backend: Backend = "kernel",
) -> Tensor:
    """Row of a hashed bigram table for every position, (B, T) int32 in [0, num_rows) for any token.

        row_t = ((36313 * tok_t) XOR (27191 * tok_{t-1})) mod (num_rows - 1),  row_0 = num_rows - 1

    Source: https://github.com/karpathy/nanochat/pull/747.

    Raises:
        RuntimeError, ValueError: see `nanofuse.ops`.
        ValueError: num_rows is less than 2.

    >>> import torch
    >>> from nanofuse import ops
    >>> ops.bigram_rows(torch.tensor([[1, 2, 1]]), 100, backend="eager")
    tensor([[99, 52, 98]], dtype=torch.int32)
    """
    kernel = runs_kernel("bigram_rows", backend, {"tokens": tokens})
    from nanofuse.kernels import bigram_rows as op

    if not kernel:
        return op.bigram_rows_ref(tokens, num_rows).int()
    from nanofuse.ops.launch import launch

    return launch(op.bigram_rows, tokens, num_rows)


def embed_smear(
    tokens: Tensor,  # (B, T) integer, in [0, V)
    table: Tensor,  # (V, C) bf16 or fp32, token embeddings
    gate_weight: Tensor,  # (1, G), G <= C
    smear_lambda: Tensor,  # (1,)
    *,
    backend: Backend = "kernel",
) -> Tensor:
    """Normalised embeddings, each with a part of the previous position's; differentiable.

        n_t = rms_norm(table[token_t]),   s_t = sigmoid(gate_weight . n_t[:G])
        y_t = n_t + smear_lambda * s_t * n_{t-1},   y_0 = n_0

    The result is (B, T, C) in the table's dtype.

    Source: https://github.com/karpathy/nanochat (at dc54a1a).

    Raises:
        RuntimeError, ValueError: see `nanofuse.ops`.
        ValueError: a gate wider than the table, for the kernel.
        IndexError: a token outside of the table, for "eager". The kernel gives NaN at its position
            and at the next one.

    >>> import torch
    >>> from nanofuse import ops
    >>> table, gate = torch.ones(5, 8), torch.zeros(1, 4)
    >>> y = ops.embed_smear(torch.tensor([[3, 4]]), table, gate, torch.ones(1), backend="eager")
    >>> [round(v, 4) for v in y[0, :, 0].tolist()]
    [1.0, 1.5]
    """
    tensors = {"table": table, "gate_weight": gate_weight, "smear_lambda": smear_lambda}
    kernel = runs_kernel("embed_smear", backend, {"tokens": tokens, **tensors})
    from nanofuse.kernels import embed_smear as op

    if not kernel:
        return op.embed_smear_ref(tokens, **tensors)
    from nanofuse.ops.launch import launch

    return launch(op.embed_smear, tokens, **tensors)


@torch.no_grad()
def embedding_grad(
    grad_rows: Tensor,  # (N, C) bf16 or fp32, gradients of the looked-up rows
    indices: Tensor,  # (N,) or (B, T) integer, the row that each looked up
    table_grad: Tensor,  # (R, C) bf16 or fp32, added to in place
    *,
    backend: Backend = "kernel",
) -> Tensor:
    """Add the gradient of an embedding table, in an order that is always the same.

    Returns table_grad. The kernel sums in fp32 and rounds once; "eager" sums in table_grad's
    dtype. Indices outside of [0, R) are skipped.

    Source: this project; the usual way is torch.nn.functional.embedding's backward pass.

    Raises:
        RuntimeError, ValueError: see `nanofuse.ops`.
        ValueError: shapes that do not fit together; indices that are not integers.

    >>> import torch
    >>> from nanofuse import ops
    >>> rows, indices = torch.ones(3, 2), torch.tensor([0, 2, 0])
    >>> ops.embedding_grad(rows, indices, torch.zeros(3, 2), backend="eager")
    tensor([[2., 2.],
            [0., 0.],
            [1., 1.]])
    """
    tensors = {"indices": indices, "table_grad": table_grad}
    kernel = runs_kernel("embedding_grad", backend, {"grad_rows": grad_rows, **tensors})
    from nanofuse.kernels import embedding_grad as op

    if not kernel:
        indices = indices.flatten()
        inside = (indices >= 0) & (indices < table_grad.size(0))
        total = op.embedding_grad_ref(grad_rows[inside], indices[inside], table_grad)
        return table_grad.copy_(total)
    from nanofuse.ops.launch import launch_in_place

    order = op.sort_rows(indices, table_grad.size(0))
    launch_in_place(
        lambda table, rows: op.embedding_grad(rows, order, table), [table_grad], grad_rows
    )
    return table_grad
