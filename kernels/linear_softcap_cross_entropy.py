"""Softcapped cross-entropy of x @ weight.T without the whole logits matrix in memory.

    loss = softcap_cross_entropy(x @ weight.T, targets)

A fused linear cross-entropy, as in Liger-Kernel (arXiv 2410.10989). The forward pass goes over
chunks of rows: it computes a chunk's logits, overwrites them with their gradient, and multiplies
that with weight and x, which gives the gradients of x and weight for an upstream gradient of 1. The
backward pass multiplies both by the actual upstream gradient.

Memory beyond the inputs and gradients: chunk_rows * V logits and two fp32 matrices of weight's
shape, the chunk's gradient and the sum. FLOPs: 6 N V C, and the loss.
"""

import torch

from nanofuse.kernels.softcap_cross_entropy import (
    LOGIT_SOFTCAP,
    mean_grad_scale,
    softcap_cross_entropy_fwd,
    softcap_cross_entropy_fwd_bwd,
    softcap_cross_entropy_ref,
)


def linear_softcap_cross_entropy_ref(
    x,  # (N, C)
    weight,  # (V_padded, C)
    targets,  # (N,) int64
    vocab_size,
    softcap=LOGIT_SOFTCAP,
    reduction="mean",
):
    """Loss in nats, a scalar; fp32 or fp64."""
    return softcap_cross_entropy_ref(x @ weight.t(), targets, vocab_size, softcap, reduction)


def _product_fp32(a, b):
    """a @ b with an fp32 result; on a CPU, where torch.mm has no out_dtype, the inputs are cast."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


class _LinearSoftcapCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, scale, vocab_size, chunk_rows, softcap, train):
        """Sum of the losses times `scale` (1,). With `train` the gradients of x and weight are
        computed on the way and saved."""
        rows = x.size(0)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        buffer = torch.empty(min(chunk_rows, rows), weight.size(0), dtype=x.dtype, device=x.device)
        if train:
            grad_x = torch.empty_like(x)
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
        for start in range(0, rows, chunk_rows):
            chunk = slice(start, min(start + chunk_rows, rows))
            logits = buffer[: chunk.stop - start]
            torch.mm(x[chunk], weight.t(), out=logits)
            if not train:
                losses, _ = softcap_cross_entropy_fwd(logits, targets[chunk], vocab_size, softcap)
            else:
                losses, _, grad = softcap_cross_entropy_fwd_bwd(
                    logits, targets[chunk], scale, vocab_size, inplace=True, softcap=softcap
                )
                torch.mm(grad, weight, out=grad_x[chunk])
                grad_weight += _product_fp32(grad.t(), x[chunk])
            total += losses.sum()
        if train:
            ctx.save_for_backward(grad_x, grad_weight.to(weight.dtype))
        return total * scale[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * upstream, grad_weight * upstream, *[None] * 6


def linear_softcap_cross_entropy(
    x,  # (N, C) bf16 or fp32
    weight,  # (V_padded, C), dtype of x
    targets,  # (N,) int64 or int32; IGNORE_INDEX positions have loss 0 and do not count in the mean
    vocab_size,
    chunk_rows=8192,
    softcap=LOGIT_SOFTCAP,
    reduction="mean",
):
    """Cross-entropy in nats of the logits x @ weight.T, a scalar in fp32; differentiable.

    The loss is NaN, and so are the gradients of weight and of that row of x, if a target is neither
    in [0, vocab_size) nor IGNORE_INDEX.

    Args:
        chunk_rows: rows whose logits exist at once.
        reduction: "mean" over the targets that count, or "sum".

    Raises:
        ValueError: a reduction other than mean and sum; shapes that do not fit.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"unknown reduction {reduction!r}; choose from mean, sum")
    if x.dim() != 2 or weight.dim() != 2 or x.size(1) != weight.size(1):
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit")
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} and weight is {weight.dtype}")
    if targets.shape != x.shape[:1]:
        raise ValueError(f"targets must be ({x.size(0)},), not {tuple(targets.shape)}")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be positive, got {chunk_rows}")
    scale = torch.ones(1, device=x.device) if reduction == "sum" else mean_grad_scale(targets)
    train = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _LinearSoftcapCrossEntropy.apply(
        x, weight, targets, scale, vocab_size, chunk_rows, softcap, train
    )
