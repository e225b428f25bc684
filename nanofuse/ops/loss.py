"""Cross-entropy of softcapped logits, from the logits or from what lm_head multiplies."""

from typing import Literal

from torch import Tensor

from nanofuse.ops.backend import Backend, runs_kernel


def softcap_cross_entropy(
    logits: Tensor,  # (N, >= V) bf16 or fp32; columns from V on are padding
    targets: Tensor,  # (N,) int64 or int32, in [0, V), or -1: loss 0, not in the mean
    vocab_size: int,
    *,
    softcap: float = 15.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    backend: Backend = "kernel",
) -> Tensor:
    """Cross-entropy of softcap * tanh(logits / softcap) in nats, fp32; differentiable.

    A scalar for "mean" and "sum", (N,) for "none". vocab_size is V. A target that is neither in
    [0, V) nor -1, such as -100, makes the loss and the gradient of its position NaN.

    Source: the softcap is that of Gemma 2, https://arxiv.org/abs/2408.00118.

    Raises:
        RuntimeError, ValueError: see `nanofuse.ops`.
        ValueError: an unknown reduction; shapes or dtypes that do not fit, for the kernel.

    >>> import torch
    >>> from nanofuse import ops
    >>> logits, targets = torch.zeros(3, 8), torch.tensor([1, 4, -1])
    >>> loss = ops.softcap_cross_entropy(logits, targets, 5, backend="eager")
    >>> round(loss.item(), 4)  # ln 5
    1.6094
    """
    kernel = runs_kernel("softcap_cross_entropy", backend, {"logits": logits, "targets": targets})
    from nanofuse.kernels import softcap_cross_entropy as op

    if not kernel:
        return op.softcap_cross_entropy_ref(logits, targets, vocab_size, softcap, reduction)
    from nanofuse.ops.launch import launch

    return launch(op.softcap_cross_entropy, logits, targets, vocab_size, softcap, reduction)


def linear_softcap_cross_entropy(
    x: Tensor,  # (N, C) bf16 or fp32
    weight: Tensor,  # (>= V, C), x's dtype; rows from V on are padding
    targets: Tensor,  # (N,) int64 or int32, in [0, V), or -1: loss 0, not in the mean
    vocab_size: int,
    *,
    chunk_rows: int = 8192,
    softcap: float = 15.0,
    reduction: Literal["mean", "sum"] = "mean",
    backend: Backend = "kernel",
) -> Tensor:
    """`softcap_cross_entropy` of x @ weight.T, a scalar in nats, fp32; differentiable.

    The kernel holds the logits of chunk_rows rows at a time, and makes the gradients in the
    forward pass. A target that is neither in [0, V) nor -1 makes the loss NaN.

    Source: Liger-Kernel, https://arxiv.org/abs/2410.10989.

    Raises:
        RuntimeError, ValueError: see `nanofuse.ops`.
        ValueError: an unknown reduction; shapes or dtypes that do not fit, for the kernel.

    >>> import torch
    >>> from nanofuse import ops
    >>> x, weight, targets = torch.ones(3, 4), torch.ones(8, 4), torch.tensor([1, 4, -1])
    >>> loss = ops.linear_softcap_cross_entropy(x, weight, targets, 5, backend="eager")
    >>> round(loss.item(), 4)  # ln 5
    1.6094
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"unknown reduction {reduction!r}; choose from mean, sum")
    name = "linear_softcap_cross_entropy"
    kernel = runs_kernel(name, backend, {"x": x, "weight": weight, "targets": targets})
    from nanofuse.kernels import linear_softcap_cross_entropy as op

    if not kernel:
        return op.linear_softcap_cross_entropy_ref(
            x, weight, targets, vocab_size, softcap, reduction
        )
    from nanofuse.ops.launch import launch

    return launch(
        op.linear_softcap_cross_entropy,
        x, weight, targets, vocab_size, chunk_rows, softcap, reduction,
    )  # fmt: skip
