"""FP8 operands: what a matrix product in FP8 takes, and the jit helpers that write them.

    q = fp8(clamp(x * scale)),   x ~ q * inverse_scale,   amax = max |x|

Hopper's FP8 products want both operands with the reduced dimension contiguous, so a tensor that
feeds a forward or dgrad product and a wgrad product is written twice, row-major and transposed, by
the kernel that makes it. Its scale is known beforehand: static where the values are bounded,
else delayed, from the amax that the same kernels record (formats: arXiv 2209.05433; delayed
scaling: NVIDIA Transformer Engine, https://docs.nvidia.com/deeplearning/transformer-engine).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

E4M3 = torch.float8_e4m3fn  # activations and weights
E5M2 = torch.float8_e5m2  # gradients
E4M3_MAX = 448.0
E5M2_MAX = 57344.0


@dataclass(frozen=True)
class Scaling:
    """How one tensor is quantised: dtype, scale, and the running maximum that kernels record.

    Fields: dtype (E4M3 or E5M2); scale, inverse_scale and amax, each a (1,) fp32 tensor on the
    tensor's device. Kernels read scale, raise amax to max|x| and never touch the other two.
    """

    dtype: torch.dtype
    scale: torch.Tensor  # (1,) fp32
    inverse_scale: torch.Tensor  # (1,) fp32
    amax: torch.Tensor  # (1,) fp32

    @classmethod
    def from_bound(cls, bound, dtype=E4M3, device="cuda"):
        """Scaling that maps magnitudes up to `bound` (a float > 0) onto the whole range of dtype.

        Raises:
            ValueError: bound is not positive.
        """
        if not bound > 0:
            raise ValueError(f"the bound of an FP8 scale must be positive, got {bound}")
        scale = torch.finfo(dtype).max / bound
        full = [torch.full((1,), x, device=device) for x in (scale, 1 / scale, 0.0)]
        return cls(dtype, *full)


@dataclass(frozen=True)
class FP8Operand:
    """A quantised (M, K) matrix in both layouts; `data` or `transposed` may be None if unused."""

    data: torch.Tensor | None  # (M, K) FP8, contiguous
    transposed: torch.Tensor | None  # (K, M) FP8, contiguous
    inverse_scale: torch.Tensor  # (1,) fp32

    def dequantize(self):
        """The (M, K) matrix in fp32."""
        data = self.transposed.t() if self.data is None else self.data
        return data.float() * self.inverse_scale


def empty_operand(rows, cols, scaling, device):
    """Unwritten FP8Operand of a (rows, cols) matrix."""
    data = torch.empty(rows, cols, dtype=scaling.dtype, device=device)
    transposed = torch.empty(cols, rows, dtype=scaling.dtype, device=device)
    return FP8Operand(data, transposed, scaling.inverse_scale)


def operand_args(operand, scaling):
    """Kernel arguments (data, transposed, scale, amax as int32) of an operand; None four times."""
    if operand is None:
        return None, None, None, None
    return operand.data, operand.transposed, scaling.scale, scaling.amax.view(torch.int32)


@triton.jit
def cast_fp8(
    x,  # fp32 block, already times the scale
    dtype: tl.constexpr,
):
    """x in FP8, saturating; NaN stays NaN."""
    limit: tl.constexpr = 448.0 if dtype == tl.float8e4nv else 57344.0
    return tl.clamp(x, -limit, limit, propagate_nan=tl.PropagateNan.ALL).to(dtype)


@triton.jit
def record_amax(
    amax_ptr,  # (1,) int32: the bits of a non-negative fp32
    x,  # fp32 block
):
    """Raise amax to max|x|. On bits of non-negative floats integer order is float order, with NaN
    above Inf, so NaN shows; a maximum does not depend on the order, so it is deterministic."""
    bits = tl.max(tl.ravel(tl.abs(x).to(tl.int32, bitcast=True)), axis=0)
    if bits > tl.load(amax_ptr):  # a stale value costs an atomic too many, no more
        tl.atomic_max(amax_ptr, bits, sem="relaxed")


@triton.jit
def store_fp8(
    x,  # (BM, BN) fp32, zero outside of the matrix
    data_ptr,  # (M, N) FP8
    transposed_ptr,  # (N, M) FP8, or None
    scale_ptr,  # (1,) fp32
    amax_ptr,  # (1,) int32
    row,  # first row of the block
    col,  # first column of the block
    M,
    N,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Quantise one block of a matrix and store it in both layouts."""
    record_amax(amax_ptr, x)
    q = cast_fp8(x * tl.load(scale_ptr), data_ptr.dtype.element_ty)
    m, n = tl.arange(0, BM), tl.arange(0, BN)
    m_ok, n_ok = row + m < M, col + n < N
    base = data_ptr + row.to(tl.int64) * N + col
    tl.store(base + m[:, None] * N + n[None, :], q, mask=m_ok[:, None] & n_ok[None, :])
    if transposed_ptr is not None:
        base = transposed_ptr + col.to(tl.int64) * M + row
        offsets = n[:, None].to(tl.int64) * M + m[None, :]
        tl.store(base + offsets, tl.trans(q), mask=n_ok[:, None] & m_ok[None, :])
