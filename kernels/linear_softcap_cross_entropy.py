"""Softcapped cross-entropy of x w^T, with its gradient made in the product; logits never stored.

    a = x w^T,   z = cap tanh(a / cap),   loss_n = logsumexp(z_n) - z_n[t_n]     x (N, C), w (V, C)

As |z| <= cap, exponentials are taken relative to cap and no maximum is needed, so the epilogue of
the product makes, of a tile of logits,

    e = 2^h exp(z - cap),   f = dz/da = 1 - (z / cap)^2,   u = e f, but 0 at the target

and the sum of e over each row of the tile. It stores u, not the logits. With S_n the sum of e over
the whole row, p_n the share of the target in it, and grad_n the upstream gradient of loss n, that
of the logits is

    grad_n (u_n / S_n - [v = t_n] f_n (1 - p_n)),

whose sums S_n are known only after the product. So they go where rows are scaled anyway:

    dx_n = grad_n (1/S_n (u w)_n - f_n (1 - p_n) w[t_n])
    dw   = u^T (x grad / S), and row t_n receives -grad_n f_n (1 - p_n) x_n

Two products of u, by a provider of products; `linear_softcap_cross_entropy_dx` and `weighted_rows`
scale the rows, and the target's part, the largest one, is added without being rounded to u's dtype:
dx gathers rows of w, and dw is kernels/embedding_grad.py's sum over the sorted targets. A target of
IGNORE_INDEX (-1) has loss 0 and no gradient. Any other that is no token of [0, vocab_size), such as
-100, gives NaN for its loss, its row of dx and all of dw. Columns from vocab_size on are padding:
their u is 0.

FP8. u <= 2^h max(e^(z - cap) f) is a number that only cap decides; h puts it just below the largest
e5m2 number, so that u never clips. For cap 15 h is 20: u loses precision where z < -8.2 and is 0
where z < -10.1, probabilities that sum up to less than V e^(-10.1 - logsumexp): 4e-5 at a
logsumexp of 10.4, that of a new model with V = 32768. The weights 1/S_n of x are taken relative to
the largest one of the batch, so that no value of x grows: it is 0 or loses precision in positions
whose logsumexp is 6 nats or more above the smallest one.

Accuracy. tanh is the hardware's, of 11 bits, a quarter of the error that rounding logits to bf16
costs; in fp32 it is computed by an exponential and a reciprocal. u goes through bf16 to FP8 (double
rounding: kernels/linear_relu_squared.py). Sums are in fp32, in a fixed order. On Hopper a product
in FP8 with its gradient may run on a panel (kernels/common/panel.py), which rounds u once, and adds
up a tile's sums in another order: losses differ from those without gradient in their last bits.

Bytes in FP8: (N + V) C for the operands, 2 N V for u, 8 N V / 128 for the sums of tiles; a product
and softcap_cross_entropy move 2 N V for the logits thrice beside the gradient. FLOPs: 2 N V C.

The public function takes plain tensors, in chunks of rows, as in Liger-Kernel (arXiv 2410.10989):
memory beyond the inputs and gradients is chunk_rows * V for u and two fp32 matrices of w's shape.
"""

import math
from dataclasses import dataclass

import torch

from nanofuse.kernels.common import panel
from nanofuse.kernels.common.checks import check_scalars, check_tensor
from nanofuse.kernels.common.fp8 import (
    E5M2,
    MULTIPLE,
    FP8Operand,
    check_alignment,
)
from nanofuse.kernels.common.jit import TensorDescriptor, triton
from nanofuse.kernels.common.tuning import Tile, sm_count, tuned
from nanofuse.kernels.embedding_grad import embedding_grad, sort_rows
from nanofuse.kernels.linear_relu_squared import LinearTile, plain_name
from nanofuse.kernels.linear_softcap_cross_entropy_kernels import (
    dx_kernel,
    product_kernel,
    rows_kernel,
    weighted_kernel,
)
from nanofuse.kernels.linear_softcap_cross_entropy_panel_kernels import product_panel
from nanofuse.kernels.softcap_cross_entropy import (
    IGNORE_INDEX,
    LOGIT_SOFTCAP,
    mean_grad_scale,
    softcap_cross_entropy_ref,
)

OP = "linear_softcap_cross_entropy"
PANEL_TERMS = 1536  # at most; of 1,664 a panel takes 7.4 ms and Triton's kernel 7.3, of 2,048 11.4
# and 8.6 (65,536 rows, 32,768 tokens, H200)
TILE = LinearTile(128, 128, 128, warps=4, stages=3, programs=2)
PLAIN_TILES = {  # without FP8, by the tensors' dtype
    torch.bfloat16: LinearTile(128, 256, 128, warps=8, stages=4),
    torch.float32: LinearTile(64, 64, 128, warps=4, stages=3),
}
ROWS_TILE = Tile(rows=128, cols=32, warps=4)  # cols: partial sums loaded and added at once
WEIGHTED_TILE = Tile(rows=32, cols=256, warps=4)
DX_TILE = Tile(rows=16, cols=512, warps=8)


@dataclass(frozen=True)
class LogitsGrad:
    """The logits' gradient (N, V) in parts: row n is grad_n * (weights_n * u_n, and at_target_n at
    the target), with grad_n the upstream gradient of the loss of row n."""

    u: FP8Operand | torch.Tensor  # (N, V)
    weights: torch.Tensor  # (N,) fp32, >= 0
    at_target: torch.Tensor  # (N,) fp32, <= 0
    largest: torch.Tensor  # (1,) fp32: the largest weight
    targets: torch.Tensor  # (N,) int64 or int32
    vocab_size: int


def linear_softcap_cross_entropy_ref(
    x,  # (N, C)
    weight,  # (V_padded, C)
    targets,  # (N,) int64
    vocab_size,
    softcap=LOGIT_SOFTCAP,
    reduction="mean",
):
    """Loss in nats, a scalar, or (N,) for "none"; fp32 or fp64."""
    return softcap_cross_entropy_ref(x @ weight.t(), targets, vocab_size, softcap, reduction)


def exponent_shift(softcap):
    """h: the power of two that brings the largest possible u just below e5m2's largest number."""
    # the r = (1 - z / cap) / 2 where u = exp(-2 cap r) 4 r (1 - r) is largest
    b = softcap + 1
    r = (b - math.sqrt(b * b - 2 * softcap)) / (2 * softcap)
    bound = math.exp(-2 * softcap * r) * 4 * r * (1 - r)
    return math.floor(math.log2(0.95 * torch.finfo(E5M2).max / bound))


def _plain(x):
    """The row-major matrix of an operand."""
    return x.data if isinstance(x, FP8Operand) else x


def _check(x, w, targets, vocab_size):
    """Raise ValueError for what linear_softcap_cross_entropy_fwd does not take."""
    fp8 = isinstance(x, FP8Operand)
    for name, matrix in (("x", x), ("w", w)):
        if isinstance(matrix, FP8Operand) != fp8 or (not fp8 and matrix.dtype not in PLAIN_TILES):
            raise ValueError(f"{OP}: x and w must both be FP8Operands, bf16 or fp32")
        matrix = _plain(matrix)
        if matrix.dim() != 2 or not matrix.is_contiguous() or not matrix.numel():
            raise ValueError(f"{OP}: {name} must be a contiguous matrix, and not empty")
        check_alignment(OP, **{name: matrix})
    x, w = _plain(x), _plain(w)
    if x.dtype != w.dtype:
        raise ValueError(f"{OP}: x is {x.dtype} and w is {w.dtype}")
    if x.size(1) != w.size(1):
        raise ValueError(f"{OP}: x {tuple(x.shape)} and w {tuple(w.shape)} do not fit")
    sizes = (*x.shape, w.size(0)) if fp8 else x.shape[1:]
    if any(size % MULTIPLE for size in sizes):
        raise ValueError(f"{OP}: sizes must be multiples of {MULTIPLE}, got {tuple(sizes)}")
    check_tensor(OP, "targets", targets, x.shape[:1])
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{OP}: targets must be int64 or int32, not {targets.dtype}")
    if not 0 < vocab_size <= w.size(0):
        raise ValueError(f"{OP}: vocab_size {vocab_size} does not fit {w.size(0)} rows of w")


def linear_softcap_cross_entropy_fwd(
    x,  # (N, C) bf16 or fp32, or FP8Operand, of which the row-major layout
    w,  # (V_padded, C) in x's dtype, or FP8Operand, of which the row-major layout
    targets,  # (N,) int64 or int32; IGNORE_INDEX positions have loss 0
    vocab_size,
    softcap=LOGIT_SOFTCAP,
    train=True,
):
    """Losses (N,) in nats and logsumexp of the softcapped logits (N,), both fp32; and the
    LogitsGrad, None without `train`.

    Raises:
        ValueError: shapes that do not fit, or are empty; C, or in FP8 any size, is no multiple of
            16; dtypes that the kernels do not take; a matrix that is not contiguous or not aligned
            (kernels.common.fp8.check_alignment).
    """
    _check(x, w, targets, vocab_size)
    fp8 = isinstance(x, FP8Operand)
    inverses = (x.inverse_scale, w.inverse_scale) if fp8 else (None, None)
    x, w = _plain(x), _plain(w)
    (rows, width), cols, device = x.shape, w.size(0), x.device
    name, tile = (OP, TILE) if fp8 else (plain_name(OP, x.dtype), PLAIN_TILES[x.dtype])
    config = tuned(name, tile, width)
    u = transposed = None
    if train:
        u = torch.empty(rows, cols, dtype=E5M2 if fp8 else x.dtype, device=device)
        transposed = torch.empty(cols, rows, dtype=E5M2, device=device) if fp8 else None
    losses, lse, weights, at_target, tanh = (
        torch.empty(rows, dtype=torch.float32, device=device) for _ in range(5)
    )
    on_panel = train and fp8 and panel.takes(OP, device, rows, cols, width, PANEL_TERMS)
    blocks = triton.cdiv(cols, panel.BN if on_panel else config.cols)
    sums = torch.empty(blocks, rows, dtype=torch.float32, device=device)
    largest = torch.zeros(1, dtype=torch.float32, device=device)
    depth = config.depth // x.element_size()
    shift, exact = exponent_shift(softcap), x.dtype == torch.float32
    if on_panel:
        results = u, transposed, sums, tanh
        product_panel(x, w, inverses, targets, *results, vocab_size, softcap, shift)
    else:
        product_kernel[(min(triton.cdiv(rows, config.rows) * blocks,
                            config.programs * sm_count(device)),)](
            x_desc=TensorDescriptor.from_tensor(x, [config.rows, depth]),
            w_desc=TensorDescriptor.from_tensor(w, [config.cols, depth]),
            x_inverse_ptr=inverses[0],
            w_inverse_ptr=inverses[1],
            targets_ptr=targets,
            u_ptr=u,
            transposed_ptr=transposed,
            sums_ptr=sums,
            tanh_ptr=tanh,
            N=rows,
            vocab=vocab_size,
            V=cols,
            C=width,
            CAP=softcap,
            SHIFT=shift,
            EXACT=exact,
            PADDED=vocab_size < blocks * config.cols,
            BM=config.rows,
            BN=config.cols,
            BK=depth,
            GROUP=config.group,
            num_warps=config.warps,
            num_stages=config.stages,
            maxnreg=config.registers,
        )  # fmt: skip
    config = tuned("linear_softcap_cross_entropy_rows", ROWS_TILE, width)
    rows_kernel[(triton.cdiv(rows, config.rows),)](
        sums_ptr=sums,
        tanh_ptr=tanh,
        targets_ptr=targets,
        u_ptr=u,
        transposed_ptr=transposed,
        losses_ptr=losses,
        lse_ptr=lse,
        weights_ptr=weights,
        at_target_ptr=at_target,
        largest_ptr=largest.view(torch.int32),
        N=rows,
        V=cols,
        T=blocks,
        vocab=vocab_size,
        CAP=softcap,
        SHIFT=shift,
        EXACT=exact,
        IGNORE=IGNORE_INDEX,
        BM=config.rows,
        BT=config.cols,
        num_warps=config.warps,
    )
    if not train:
        return losses, lse, None
    if fp8:
        u = FP8Operand(u, transposed, torch.ones(1, dtype=torch.float32, device=device))
    return losses, lse, LogitsGrad(u, weights, at_target, largest, targets, vocab_size)


def _check_grad(grad, scale):
    """Raise ValueError unless the rows of a LogitsGrad are contiguous, and scale is a number."""
    rows = grad.weights.shape
    for name in ("weights", "at_target", "targets"):
        check_tensor(OP, name, getattr(grad, name), rows)
    check_scalars(OP, scale=scale)
    if scale.dtype != torch.float32:
        raise ValueError(f"{OP}: scale must be torch.float32, not {scale.dtype}")


def weighted_rows(
    x,  # (N, C) bf16 or fp32, or FP8Operand, of which the transposed layout
    grad,  # LogitsGrad
    scale,  # (1,) or () fp32: upstream gradient of every loss
):
    """x's rows times scale * weights, for the product that gives dw: (N, C) in x's dtype, or an
    FP8Operand with the transposed layout alone.

    Raises:
        ValueError: a matrix that is not contiguous, not of N rows or not aligned; a scale that is
            not one fp32 number.
    """
    fp8 = isinstance(x, FP8Operand)
    matrix = x.transposed if fp8 else x
    check_tensor(OP, "x", matrix, None)
    rows = grad.weights.numel()
    if matrix.dim() != 2 or matrix.size(1 if fp8 else 0) != rows:
        raise ValueError(f"{OP}: x must have {rows} rows, not {tuple(matrix.shape)}")
    check_alignment(OP, **({"x": matrix} if fp8 else {}))
    _check_grad(grad, scale)
    out = torch.empty_like(matrix)
    inverse = torch.empty(1, dtype=torch.float32, device=matrix.device) if fp8 else None
    width = matrix.size(0 if fp8 else 1)
    config = tuned("linear_softcap_cross_entropy_weighted", WEIGHTED_TILE, width)
    grid = (
        triton.cdiv(n, b) for n, b in zip(matrix.shape, (config.rows, config.cols), strict=True)
    )
    weighted_kernel[tuple(grid)](
        x_ptr=matrix,
        weights_ptr=grad.weights,
        scale_ptr=scale,
        largest_ptr=grad.largest if fp8 else None,
        x_inverse_ptr=x.inverse_scale if fp8 else None,
        inverse_ptr=inverse,
        out_ptr=out,
        R=matrix.size(0),
        K=matrix.size(1),
        BR=config.rows,
        BK=config.cols,
        num_warps=config.warps,
    )
    return FP8Operand(None, out, inverse) if fp8 else out


def linear_softcap_cross_entropy_dx(
    product,  # (N, C) u w; overwritten
    w,  # (V_padded, C), or FP8Operand, of which the row-major layout
    grad,  # LogitsGrad
    scale,  # (1,) or () fp32: upstream gradient of every loss
):
    """The gradient of x, (N, C), in place of the product.

    Raises:
        ValueError: tensors that are not contiguous or do not fit; a scale that is not one fp32
            number.
    """
    matrix, (rows, cols) = _plain(w), product.shape
    check_tensor(OP, "product", product, (grad.weights.numel(), matrix.size(1)))
    check_tensor(OP, "w", matrix, (_plain(grad.u).size(1), cols))
    _check_grad(grad, scale)
    config = tuned("linear_softcap_cross_entropy_dx", DX_TILE, cols)
    dx_kernel[(triton.cdiv(rows, config.rows), triton.cdiv(cols, config.cols))](
        grad_ptr=product,
        w_ptr=matrix,
        w_inverse_ptr=w.inverse_scale if isinstance(w, FP8Operand) else None,
        targets_ptr=grad.targets,
        weights_ptr=grad.weights,
        at_target_ptr=grad.at_target,
        scale_ptr=scale,
        N=rows,
        C=cols,
        vocab=grad.vocab_size,
        BM=config.rows,
        BC=config.cols,
        num_warps=config.warps,
    )
    return product


def linear_softcap_cross_entropy_dw(
    x,  # (N, C) bf16 or fp32, or FP8Operand, of which the row-major layout
    grad,  # LogitsGrad
    scale,  # (1,) or () fp32: upstream gradient of every loss
    out,  # (V_padded, C) fp32 or bf16, added to
):
    """Add the targets' part of the gradient of w to `out`, the rest of which is a product.

    Raises:
        ValueError: as kernels.embedding_grad.embedding_grad; a scale that is not one fp32 number.
    """
    _check_grad(grad, scale)
    factors = grad.at_target * scale
    if isinstance(x, FP8Operand):
        factors *= x.inverse_scale
    return embedding_grad(_plain(x), sort_rows(grad.targets, out.size(0)), out, factors)


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
        if train:
            grad_x = torch.empty_like(x)
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
        for start in range(0, rows, chunk_rows):
            chunk = slice(start, min(start + chunk_rows, rows))
            losses, _, grad = linear_softcap_cross_entropy_fwd(
                x[chunk], weight, targets[chunk], vocab_size, softcap, train
            )
            total += losses.sum()
            if train:
                product = torch.mm(grad.u, weight, out=grad_x[chunk])
                linear_softcap_cross_entropy_dx(product, weight, grad, scale)
                grad_weight += _product_fp32(grad.u.t(), weighted_rows(x[chunk], grad, scale))
                linear_softcap_cross_entropy_dw(x[chunk], grad, scale, grad_weight)
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
        chunk_rows: rows whose u exists at once.
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
    spare = -x.size(1) % MULTIPLE  # columns of zeros change nothing
    x, weight = (torch.nn.functional.pad(t, (0, spare)).contiguous() for t in (x, weight))
    return _LinearSoftcapCrossEntropy.apply(
        x, weight, targets.contiguous(), scale, vocab_size, chunk_rows, softcap, train
    )
