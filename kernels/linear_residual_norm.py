"""A GEMM whose result joins the residual stream, and the RMSNorm of the sum; FP8, on Hopper.

    y      = x + a w^T                                  a (N, K), w (C, K), x (N, C)
    normed = y / sqrt(mean(y^2) + eps)

The attention's last linear layer with the residual add and the norm after it. The product runs on
a panel (kernels/common/panel.py), which adds the stream in its epilogue and leaves, of each row, a
sum of squares for every 128 columns; a second kernel, which knows its rows' norms when it begins,
reads y once and writes the norm as an FP8 operand. `takes` says what the op wants. In all other
cases a product and kernels/residual_mix.py do the same, and their backward pass is this op's: it is
defined by its results, y and rstd.

Accuracy. The product accumulates in fp32 (fast accumulation of FP8, as cuBLAS's); y is rounded
once, to bf16, where a product apart is rounded before it is added, too. The norm is that of the
rounded y. amax is the largest scaled magnitude, unscaled, as in
kernels/residual_mix_tma_kernels.py.

FLOPs: 2*N*C*K. Bytes: K*(N + C) for the operands, and 2*N*C each for x, for y to be written, for y
to be read, and for both FP8 layouts; apart 2*N*C more. The sums of squares are N*C / 32 each way.
"""

import torch

from nanofuse.kernels.common import panel
from nanofuse.kernels.common.checks import check_tensor
from nanofuse.kernels.common.fp8 import (
    E4M3,
    FP8Operand,
    check_alignment,
    empty_operand,
    operand_args,
)
from nanofuse.kernels.common.rms_norm import rms_norm_ref
from nanofuse.kernels.linear_residual_norm_panel_kernels import OP, linear_residual_norm_panel

MOST_TERMS = 1664  # more were not measured


def linear_residual_norm_ref(
    a,  # (..., K)
    w,  # (C, K)
    x,  # (..., C) residual stream
):
    """y and its RMSNorm, both (..., C) in x's dtype."""
    y = x + a @ w.t()
    return y, rms_norm_ref(y)


def fits(device, rows, cols, terms):
    """Whether this op computes an FP8 product of rows x cols on this device: on Hopper, of sizes in
    multiples of 128, more than 128 columns, and more than 128 and at most 1,664 terms."""
    return panel.takes("residual_norm_fwd", device, rows, cols, terms, MOST_TERMS)


def takes(
    a,  # FP8Operand (N, K), or a tensor
    w,  # FP8Operand (C, K), or a tensor
    x,  # (N, C)
):
    """Whether this op computes the product of a and w: e4m3, and a bf16 stream, where it `fits`."""
    return (
        isinstance(a, FP8Operand)
        and a.data.dtype == w.data.dtype == E4M3
        and a.data.size(1) == w.data.size(1)
        and x.dtype == torch.bfloat16
        and fits(a.data.device, *a.data.shape[:1], *w.data.shape)
    )


def linear_residual_norm_fwd(
    a,  # FP8Operand (N, K)
    w,  # FP8Operand (C, K)
    x,  # (N, C) bf16 stream
    scaling,
):
    """The stream with the product added, and its norm.

    Args:
        scaling: kernels.common.fp8.Scaling of normed as an FP8 operand.

    Returns:
        y (N, C) bf16; rstd (N,) fp32, its inverse root mean squares; and normed, an FP8Operand: as
        kernels.residual_mix.residual_mix_fwd of x and the product.

    Raises:
        ValueError: what `takes` says no to; tensors that are not contiguous or do not fit together.
    """
    if not takes(a, w, x):
        raise ValueError(f"{OP}: takes() refuses these operands, of this device")
    (rows, _), cols, device = a.data.shape, w.data.size(0), a.data.device
    check_tensor(OP, "a", a.data, None)
    check_tensor(OP, "w", w.data, None)
    check_tensor(OP, "x", x, (rows, cols), torch.bfloat16)
    check_alignment(OP, a=a.data, w=w.data, x=x)
    y = torch.empty_like(x)
    rstd = torch.empty(rows, dtype=torch.float32, device=device)
    normed = empty_operand(rows, cols, scaling, device)
    linear_residual_norm_panel(
        a.data, w.data, (a.inverse_scale, w.inverse_scale), x, y, rstd,
        *operand_args(normed, scaling),
    )  # fmt: skip
    return y, rstd, normed
