"""Quantisation to FP8, one scale per tensor (formats: https://arxiv.org/abs/2209.05433).

    q = fp8(clamp(x * scale)),   x ~ q / scale

`quantize_ref` derives the scale from the tensor itself (dynamic scaling: one pass for the amax, one
for the cast). `quantize` is given the scale by a Scaling, and writes the row-major and the
transposed layout and records the amax in one pass. Bytes for n elements of s bytes: n*s read, 2*n
written. FLOPs: 3 per element.
"""

import torch

from nanofuse.kernels.common.checks import check_tensor
from nanofuse.kernels.common.fp8 import check_alignment, empty_operand, operand_args, store_fp8
from nanofuse.kernels.common.jit import tl, triton
from nanofuse.kernels.common.tuning import Tile, tuned

AMAX_FLOOR = 1e-12  # keeps the scale of an all-zero tensor finite
TILE = Tile(rows=64, cols=128, warps=8)


def quantize_ref(
    x,  # any shape, bf16 or fp32
    dtype,
):
    """x quantised to FP8 in its shape, and the inverse scale () fp32 that dequantises it.

    Args:
        dtype: torch.float8_e4m3fn (forward operands) or torch.float8_e5m2 (gradients).
    """
    fp8_max = torch.finfo(dtype).max
    amax = x.abs().amax().float().clamp_min(AMAX_FLOOR)
    scaled = x.float() * (fp8_max / amax)
    return scaled.clamp(-fp8_max, fp8_max).to(dtype), amax / fp8_max


def quantize_by_scaling_ref(
    x,  # (M, N) bf16 or fp32
    scaling,
):
    """What `quantize` does, in plain PyTorch.

    Raises:
        ValueError: M or N is no multiple of 16.
    """
    operand = empty_operand(*x.shape, scaling, x.device)
    limit = torch.finfo(scaling.dtype).max
    operand.data.copy_((x.float() * scaling.scale).clamp(-limit, limit).to(scaling.dtype))
    operand.transposed.copy_(operand.data.t())
    if x.numel():
        scaling.amax.copy_(torch.maximum(scaling.amax, x.abs().amax().float()))
    return operand


@triton.jit
def _quantize_kernel(
    x_ptr,  # (M, N), rows x_stride apart
    data_ptr,  # (M, N) FP8
    transposed_ptr,  # (N, M) FP8
    scale_ptr,  # (1,) fp32
    amax_ptr,  # (1,) int32
    M,
    N,
    x_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    row, col = tl.program_id(0) * BM, tl.program_id(1) * BN
    m, n = tl.arange(0, BM), tl.arange(0, BN)
    inside = (row + m < M)[:, None] & (col + n < N)[None, :]
    base = x_ptr + row.to(tl.int64) * x_stride + col
    x = tl.load(base + m[:, None] * x_stride + n[None, :], mask=inside, other=0.0)
    store_fp8(
        x.to(tl.float32), data_ptr, transposed_ptr, scale_ptr, amax_ptr, row, col, M, N, BM, BN
    )


def quantize(
    x,  # (M, N) bf16 or fp32, stride 1 along the rows
    scaling,
    out=None,
):
    """Quantise x into an FP8Operand, row-major and transposed; raises scaling.amax to max|x|.

    Args:
        scaling: kernels.common.fp8.Scaling.
        out: FP8Operand of this shape and scaling to overwrite; None for a new one.

    Raises:
        ValueError: x is not a matrix with contiguous rows, or not aligned
            (kernels.common.fp8.check_alignment); an `out` that does not fit.
    """
    if x.dim() != 2 or x.stride(1) != 1:
        raise ValueError("quantize takes a matrix with contiguous rows; call .contiguous() on it")
    check_alignment("quantize", x=x)
    rows, cols = x.shape
    operand = empty_operand(rows, cols, scaling, x.device) if out is None else out
    check_tensor("quantize", "out", operand.data, (rows, cols), scaling.dtype)
    check_tensor("quantize", "out.transposed", operand.transposed, (cols, rows), scaling.dtype)
    config = tuned("quantize", TILE, cols)
    grid = (triton.cdiv(rows, config.rows), triton.cdiv(cols, config.cols))
    data, transposed, scale, amax = operand_args(operand, scaling)
    _quantize_kernel[grid](
        x_ptr=x,
        data_ptr=data,
        transposed_ptr=transposed,
        scale_ptr=scale,
        amax_ptr=amax,
        M=rows,
        N=cols,
        x_stride=x.stride(0),
        BM=config.rows,
        BN=config.cols,
        num_warps=config.warps,
    )
    return operand
