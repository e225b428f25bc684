"""Squared ReLU (Primer, https://arxiv.org/abs/2109.08668): y = max(x, 0)^2, dx = 2*max(x, 0)*dy.

Forward and backward write a plain result in x's dtype, or an FP8 operand in both layouts
(kernels/common/fp8.py). The fused model computes them in GEMM epilogues instead
(kernels/linear_relu_squared.py); this kernel is what those are measured against.

Bytes per element of s bytes: s read forward and 2*s backward (x and dy); s written for a plain
result, 2 for an operand. At s = 2 with the operand alone: 4 forward, 6 backward. FLOPs: 2.
"""

import torch
import torch.nn.functional as F

from nanofuse.kernels.common.fp8 import check_alignment, empty_operand, operand_args, store_fp8
from nanofuse.kernels.common.jit import tl, triton
from nanofuse.kernels.common.tuning import Tile, tuned

TILE = Tile(rows=32, cols=256, warps=8)


def relu_squared_ref(
    x,  # (..., D)
):
    """Elementwise max(x, 0)^2 in x's shape and dtype."""
    return F.relu(x).square()


@triton.jit
def _relu_squared_kernel(
    x_ptr,  # (M, N), rows x_stride apart
    dy_ptr,  # (M, N), rows dy_stride apart; None in the forward pass
    out_ptr,  # (M, N), or None
    data_ptr,  # (M, N) FP8, or None
    transposed_ptr,  # (N, M) FP8, or None
    scale_ptr,  # (1,) fp32, or None
    amax_ptr,  # (1,) int32, or None
    M,
    N,
    x_stride,
    dy_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    row, col = tl.program_id(0) * BM, tl.program_id(1) * BN
    m, n = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    inside = (row + m < M) & (col + n < N)
    row64 = row.to(tl.int64)
    x = tl.load(x_ptr + row64 * x_stride + col + (m * x_stride + n), mask=inside, other=0.0)
    positive = tl.maximum(x.to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL)
    if dy_ptr is None:
        out = positive * positive
    else:
        dy = tl.load(dy_ptr + row64 * dy_stride + col + (m * dy_stride + n), mask=inside, other=0.0)
        out = 2 * positive * dy.to(tl.float32)
    if out_ptr is not None:
        tl.store(out_ptr + row64 * N + col + (m * N + n), out, mask=inside)
    if data_ptr is not None:
        store_fp8(out, data_ptr, transposed_ptr, scale_ptr, amax_ptr, row, col, M, N, BM, BN)


def _launch(op, x, dy, scaling):
    for name, matrix in (("x", x), ("dy", dy)):
        if matrix is not None and (matrix.dim() != 2 or matrix.stride(1) != 1):
            raise ValueError(f"{op}: {name} must be a matrix with contiguous rows")
    if dy is not None and dy.shape != x.shape:
        raise ValueError(f"{op}: dy is {tuple(dy.shape)}, x {tuple(x.shape)}")
    if scaling is not None:
        check_alignment(op, x=x, dy=dy)
    rows, cols = x.shape
    if scaling is None:
        out, operand = torch.empty(rows, cols, dtype=x.dtype, device=x.device), None
    else:
        out, operand = None, empty_operand(rows, cols, scaling, x.device)
    data, transposed, scale, amax = operand_args(operand, scaling)
    config = tuned(op, TILE, cols)
    grid = (triton.cdiv(rows, config.rows), triton.cdiv(cols, config.cols))
    _relu_squared_kernel[grid](
        x_ptr=x,
        dy_ptr=dy,
        out_ptr=out,
        data_ptr=data,
        transposed_ptr=transposed,
        scale_ptr=scale,
        amax_ptr=amax,
        M=rows,
        N=cols,
        x_stride=x.stride(0),
        dy_stride=0 if dy is None else dy.stride(0),
        BM=config.rows,
        BN=config.cols,
        num_warps=config.warps,
    )
    return out if operand is None else operand


def relu_squared_fwd(
    x,  # (M, N) bf16 or fp32, stride 1 along the rows
    scaling=None,
):
    """y = max(x, 0)^2, (M, N) in x's dtype; under `scaling` (a kernels.common.fp8.Scaling) an
    FP8Operand, rounded from fp32 and not from the plain y.

    Raises:
        ValueError: x is not a matrix with contiguous rows, or with a scaling not aligned
            (kernels.common.fp8.check_alignment).
    """
    return _launch("relu_squared", x, None, scaling)


def relu_squared_bwd(
    dy,  # (M, N) bf16 or fp32, stride 1 along the rows
    x,  # (M, N) bf16 or fp32, stride 1 along the rows
    scaling=None,
):
    """dx = 2*max(x, 0)*dy, (M, N) in x's dtype or an FP8Operand; see relu_squared_fwd.

    Raises:
        ValueError: dy or x is not a matrix with contiguous rows, or not aligned with a scaling; or
            their shapes differ.
    """
    return _launch("relu_squared_bwd", x, dy, scaling)


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x,  # (M, N)
    ):
        ctx.save_for_backward(x)
        return relu_squared_fwd(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx,
        dy,  # (M, N), any strides
    ):
        return relu_squared_bwd(dy.contiguous(), *ctx.saved_tensors)


def relu_squared(
    x,  # (..., D) bf16 or fp32, contiguous
):
    """Elementwise max(x, 0)^2 in x's shape and dtype; differentiable.

    Raises:
        ValueError: x is not contiguous.
    """
    if not x.is_contiguous():
        raise ValueError("relu_squared takes a contiguous tensor; call .contiguous() on it")
    return _ReluSquared.apply(x.view(-1, x.size(-1))).view(x.shape)
