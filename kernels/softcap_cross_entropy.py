"""Softcapped cross-entropy over a padded vocabulary (softcap: Gemma 2, arXiv 2408.00118).

    z = cap * tanh(logits / cap) in fp32
    loss_n = logsumexp(z_n) - z_n[target_n],   logsumexp(z_n) = cap + ln sum exp(z_n - cap)
    dlogits_nv = grad_scale_n * (exp(z_nv - logsumexp(z_n)) - [v = target_n]) * dz/dlogits_nv

A target of IGNORE_INDEX (-1) has loss 0 and no gradient. Any other that is no token of [0,
vocab_size), such as -100, gives NaN for the loss and the whole gradient of its row: it is seen, and
nobody on the host waits for the device to look.

Since |z| <= cap, the exponentials are taken relative to cap instead of the row's maximum, and one
pass over a row suffices. Columns from vocab_size on are padding and do not count. With
r = 1 / (1 + exp(2 x / cap)),

    z - cap = -2 cap r,   dz/dx = 4 r (1 - r),

so an element costs two exponentials and a reciprocal. Losses and gradient are separate kernels, so
the logits are read twice: a tile of the transposed FP8 copy takes several rows, and so many rows of
logits exceed the L2 cache. (One launch that interleaved both kinds of programs, so that the second
read hits in L2, took 1.5 times as long as the two: dev/LOG.md, 2026-11-22.)

Bytes for N rows of V logits of s bytes: forward N*V*s read; the gradient reads them again and
writes N*V*s, or N*V for each FP8 layout. FLOPs: about 12 per logit forward, 25 with the gradient.
"""

from dataclasses import dataclass

import torch

from nanofuse.kernels.common.checks import check_tensor
from nanofuse.kernels.common.fp8 import check_alignment, empty_operand, operand_args
from nanofuse.kernels.common.jit import triton
from nanofuse.kernels.common.tuning import Tile, tuned
from nanofuse.kernels.softcap_cross_entropy_kernels import bwd_kernel, fwd_kernel

IGNORE_INDEX = -1
LOGIT_SOFTCAP = 15.0


@dataclass(frozen=True)
class LossTile:
    """Launch parameters of the gradient's kernel.

    Fields: rows x cols, the tile; blocks, the tiles of a program, side by side along a row; stripe,
    a number of rows (a multiple of `rows`) whose programs have consecutive ids; warps; registers,
    the most per thread (None: the compiler's choice).
    """

    rows: int = 32
    cols: int = 128
    blocks: int = 8
    stripe: int = 256
    warps: int = 8
    registers: int | None = None


FORWARD_TILE = Tile(rows=1, cols=8192, warps=4)
BACKWARD_TILE = LossTile()


def softcap_ref(
    logits,  # (..., V_padded)
    vocab_size,
    softcap=LOGIT_SOFTCAP,
):
    """Logits without their padding, softcapped: (..., vocab_size) in fp32 (fp64 stays fp64)."""
    logits = logits[..., :vocab_size]
    if logits.dtype != torch.float64:
        logits = logits.float()
    return softcap * torch.tanh(logits * (1 / softcap))


def softcap_cross_entropy_ref(
    logits,  # (N, V_padded)
    targets,  # (N,) int64; IGNORE_INDEX positions have loss 0 and do not count in the mean
    vocab_size,
    softcap=LOGIT_SOFTCAP,
    reduction="mean",
):
    """Cross-entropy in nats: a scalar for "mean" and "sum", (N,) for "none"; fp32 or fp64.

    Loss and gradient of a position are NaN if its target is neither in [0, vocab_size) nor ignored.

    Raises:
        ValueError: an unknown reduction.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"unknown reduction {reduction!r}; choose from mean, sum, none")
    z = softcap_ref(logits, vocab_size, softcap)  # (N, V)
    is_target = torch.arange(vocab_size, device=z.device) == targets[:, None]  # (N, V)
    log_sum = softcap + (z - softcap).exp().sum(dim=-1).log()  # (N,)
    # a masked sum, not a gather: torch.compile fuses it, and its gradient needs no scatter
    z_target = torch.where(is_target, z, 0.0).sum(dim=-1)  # (N,)
    counted = targets != IGNORE_INDEX
    losses = torch.where(counted, log_sum - z_target, 0.0)
    is_token = (targets >= 0) & (targets < vocab_size)
    losses = losses * torch.where(is_token | ~counted, 1.0, torch.nan)  # gradients become NaN too
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counted.sum()


def _check(logits, targets, vocab_size):
    if logits.dim() != 2 or (logits.size(1) > 1 and logits.stride(1) != 1):
        raise ValueError("logits must be a matrix with contiguous rows; call .contiguous() on it")
    if targets.shape != logits.shape[:1] or not targets.is_contiguous():
        raise ValueError(f"targets must be ({logits.size(0)},) and contiguous")
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets must be int64 or int32, not {targets.dtype}")
    if not 0 < vocab_size <= logits.size(1):
        raise ValueError(f"vocab_size {vocab_size} does not fit {logits.size(1)} columns")


def _outputs(logits, grad_scale, scaling, inplace):
    """Check the options; allocate the gradient (N, V_padded) or, with a scaling, the FP8Operand;
    the other one is None. And the stride of grad_scale, 0 if it has one element."""
    rows, cols = logits.shape
    if grad_scale.dtype != torch.float32 or grad_scale.shape not in ((1,), (rows,)):
        raise ValueError(f"grad_scale must be (1,) or ({rows},) in fp32")
    scale_stride = 0 if grad_scale.numel() == 1 else grad_scale.stride(0)
    if scaling is None:
        return logits if inplace else torch.empty_like(logits), None, scale_stride
    if inplace:
        raise ValueError("an FP8 operand cannot take the place of the logits: inplace or scaling")
    check_alignment("softcap_cross_entropy", logits=logits)
    return None, empty_operand(rows, cols, scaling, logits.device), scale_stride


def mean_grad_scale(
    targets,  # (N,) integer
):
    """1 / (number of targets that are not IGNORE_INDEX), (1,) fp32: the upstream gradient of every
    row's loss when the loss is their mean."""
    return (targets != IGNORE_INDEX).sum(dtype=torch.float32).reciprocal()[None]


def softcap_cross_entropy_fwd(
    logits,  # (N, V_padded) bf16 or fp32, stride 1 along the rows
    targets,  # (N,) int64 or int32; IGNORE_INDEX positions have loss 0
    vocab_size,
    softcap=LOGIT_SOFTCAP,
):
    """Losses (N,) in nats and logsumexp of the softcapped logits (N,), both fp32.

    The loss is NaN where a target is neither in [0, vocab_size) nor IGNORE_INDEX.

    Raises:
        ValueError: shapes, strides or dtypes that the kernels do not take.
    """
    _check(logits, targets, vocab_size)
    rows, cols = logits.shape
    losses, lse = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    config = tuned("softcap_cross_entropy_fwd", FORWARD_TILE)
    if rows:
        # whether blocks read columns beyond vocab_size: padding, or past the ragged end of a row
        padded = vocab_size < cols or vocab_size % config.cols > 0
        fwd_kernel[(rows,)](
            logits_ptr=logits,
            targets_ptr=targets,
            losses_ptr=losses,
            lse_ptr=lse,
            vocab=vocab_size,
            V=cols,
            logits_stride=logits.stride(0),
            CAP=softcap,
            IGNORE=IGNORE_INDEX,
            PADDED=padded,
            PIECE=config.cols,
            num_warps=config.warps,
        )
    return losses, lse


def softcap_cross_entropy_bwd(
    logits,  # (N, V_padded) bf16 or fp32, stride 1 along the rows
    targets,  # (N,) int64 or int32
    lse,  # (N,) fp32, from softcap_cross_entropy_fwd
    grad_scale,  # (N,) or (1,) fp32: upstream gradient of each loss; need not be 0 in ignored rows
    vocab_size,
    scaling=None,
    inplace=False,
    softcap=LOGIT_SOFTCAP,
):
    """Gradient of the logits, (N, V_padded): a tensor in their dtype, or an FP8Operand.

    Rows whose target is neither in [0, vocab_size) nor IGNORE_INDEX are NaN, but for the padding.

    Args:
        scaling: kernels.common.fp8.Scaling of the gradient as an FP8 operand; None for a tensor.
        inplace: write the tensor over the logits.

    Raises:
        ValueError: shapes, strides or dtypes that the kernels do not take; with a scaling, logits
            that are not aligned (kernels.common.fp8.check_alignment), or inplace.
    """
    _check(logits, targets, vocab_size)
    check_tensor("softcap_cross_entropy", "lse", lse, targets.shape, torch.float32)
    grad, operand, scale_stride = _outputs(logits, grad_scale, scaling, inplace)
    rows, cols = logits.shape
    config = tuned("softcap_cross_entropy_bwd", BACKWARD_TILE)
    data, transposed, scale, amax = operand_args(operand, scaling)
    tasks = config.stripe // config.rows * triton.cdiv(cols, config.cols * config.blocks)
    if rows:
        padded = vocab_size < cols or vocab_size % config.cols > 0
        bwd_kernel[(triton.cdiv(rows, config.stripe) * tasks,)](
            logits_ptr=logits,
            targets_ptr=targets,
            lse_ptr=lse,
            grad_scale_ptr=grad_scale,
            grad_ptr=grad,
            data_ptr=data,
            transposed_ptr=transposed,
            fp8_scale_ptr=scale,
            amax_ptr=amax,
            N=rows,
            vocab=vocab_size,
            V=cols,
            logits_stride=logits.stride(0),
            grad_stride=cols if grad is None else grad.stride(0),
            scale_stride=scale_stride,
            CAP=softcap,
            IGNORE=IGNORE_INDEX,
            PADDED=padded,
            BM=config.rows,
            BN=config.cols,
            BLOCKS=config.blocks,
            STRIPE=config.stripe,
            num_warps=config.warps,
            maxnreg=config.registers,
        )
    return grad if operand is None else operand


def softcap_cross_entropy_fwd_bwd(
    logits,  # (N, V_padded) bf16 or fp32, stride 1 along the rows
    targets,  # (N,) int64 or int32
    grad_scale,  # (N,) or (1,) fp32: upstream gradient of each loss
    vocab_size,
    scaling=None,
    inplace=False,
    softcap=LOGIT_SOFTCAP,
):
    """softcap_cross_entropy_fwd and _bwd in one call: losses (N,), logsumexp (N,), and the gradient
    (N, V_padded), a tensor or an FP8Operand.

    Raises:
        ValueError: as `softcap_cross_entropy_bwd`.
    """
    losses, lse = softcap_cross_entropy_fwd(logits, targets, vocab_size, softcap)
    return (
        losses,
        lse,
        softcap_cross_entropy_bwd(
            logits, targets, lse, grad_scale, vocab_size, scaling, inplace, softcap
        ),
    )


class _SoftcapCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, vocab_size, softcap):
        losses, lse = softcap_cross_entropy_fwd(logits, targets, vocab_size, softcap)
        ctx.save_for_backward(logits, targets, lse)
        ctx.vocab_size, ctx.softcap = vocab_size, softcap
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_losses):
        logits, targets, lse = ctx.saved_tensors
        grad = softcap_cross_entropy_bwd(
            logits, targets, lse, grad_losses, ctx.vocab_size, softcap=ctx.softcap
        )
        return grad, None, None, None


def softcap_cross_entropy(
    logits,  # (N, V_padded) bf16 or fp32, stride 1 along the rows
    targets,  # (N,) int64 or int32; IGNORE_INDEX positions have loss 0 and do not count in the mean
    vocab_size,
    softcap=LOGIT_SOFTCAP,
    reduction="mean",
):
    """Cross-entropy in nats: a scalar for "mean" and "sum", (N,) for "none"; fp32; differentiable.

    Loss and gradient of a position are NaN if its target is neither in [0, vocab_size) nor ignored.

    Raises:
        ValueError: an unknown reduction; logits or targets that the kernels do not take.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"unknown reduction {reduction!r}; choose from mean, sum, none")
    losses = _SoftcapCrossEntropy.apply(logits, targets, vocab_size, softcap)
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (targets != IGNORE_INDEX).sum()
