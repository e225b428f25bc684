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
MULTIPLE = 16  # what FP8 matrix products ask of both sizes
ALIGNMENT = 16  # of addresses in bytes and of integers: what Triton specialises kernels on


@dataclass(frozen=True)
class Scaling:
    """How one tensor is quantised: dtype, scale, and the running maximum that kernels record.

    Fields: dtype (E4M3 or E5M2); scale, inverse_scale and amax, each a (1,) fp32 tensor on the
    tensor's device. Kernels read scale, raise amax to max|x| and never touch the other two. cuBLAS
    wants inverse_scale at a multiple of 16 bytes.
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
    """A quantised (M, K) matrix in both layouts."""

    data: torch.Tensor  # (M, K) FP8, contiguous
    transposed: torch.Tensor  # (K, M) FP8, contiguous
    inverse_scale: torch.Tensor  # (1,) fp32

    def dequantize(self):
        """The (M, K) matrix in fp32."""
        return self.data.float() * self.inverse_scale


def empty_operand(rows, cols, scaling, device):
    """Unwritten FP8Operand of a (rows, cols) matrix.

    Raises:
        ValueError: sizes that no FP8 product takes.
    """
    if rows % MULTIPLE or cols % MULTIPLE:
        raise ValueError(f"an FP8 operand's sizes must be multiples of 16, got {rows} x {cols}")
    data = torch.empty(rows, cols, dtype=scaling.dtype, device=device)
    transposed = torch.empty(cols, rows, dtype=scaling.dtype, device=device)
    return FP8Operand(data, transposed, scaling.inverse_scale)


def check_alignment(op, **tensors):
    """Refuse what a kernel that writes FP8 may not read; None is skipped.

    Where Triton does not know addresses and row strides as multiples of 16, it loads value by
    value, and products refuse such operands.

    Raises:
        ValueError: a tensor that starts elsewhere, or rows at another stride.
    """
    for name, x in tensors.items():
        if x is None:
            continue
        if x.data_ptr() % ALIGNMENT or (x.size(0) > 1 and x.stride(0) % ALIGNMENT):
            raise ValueError(
                f"{op}: {name} must start at a multiple of {ALIGNMENT} bytes, and its row stride "
                f"must be a multiple of {ALIGNMENT} elements; call .clone() on it"
            )


def operand_args(operand, scaling):
    """Kernel arguments (data, transposed, scale, amax as int32) of an operand; None four times."""
    if operand is None:
        return None, None, None, None
    return operand.data, operand.transposed, scaling.scale, scaling.amax.view(torch.int32)


@triton.jit
def amax_bits(
    x,  # fp32 block
):
    """Bits of |x| as int32. On them integer order is float order, with NaN above Inf."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def record_amax(
    amax_ptr,  # (1,) int32: the bits of a non-negative fp32
    x,  # fp32 block
):
    """Raise amax to max|x|, NaN and Inf included. The order of atomic maxima does not show in the
    result, so it is deterministic."""
    bits = tl.max(tl.ravel(amax_bits(x)), axis=0)
    if bits > tl.load(amax_ptr):  # a stale value costs an atomic too many, no more
        tl.atomic_max(amax_ptr, bits, sem="relaxed")


@triton.jit
def cast_stored(
    x,  # bf16 or fp16 block
    dtype: tl.constexpr,
):
    """x in an FP8 dtype, cast where it is stored: on the way there 16 bits a value change threads.

    stmatrix transposes 16-bit values on their way through shared memory; FP8 bytes would be moved
    one by one, and Triton 3.6 moves them wrongly in some layouts (dev/LOG.md, 2026-11-22). The
    detour over fp32 makes it so: Triton changes layouts before a widening cast, and after a
    narrowing one.
    """
    return x.to(tl.float32).to(dtype)


@triton.jit
def store_scaled(
    x,  # (BM, BN) fp32, already times the scale
    data_ptr,  # (M, N) FP8
    transposed_ptr,  # (N, M) FP8
    row,  # first row of the block
    col,  # first column of the block
    M,
    N,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Cast one block of a matrix to FP8 and store it in both layouts.

    What x is computed from should pass check_alignment, for speed.
    """
    dtype: tl.constexpr = data_ptr.dtype.element_ty
    q = x.to(dtype)  # saturates (cvt.rn.satfinite) and keeps NaN
    m, n = tl.arange(0, BM), tl.arange(0, BN)
    inside = (row + m < M)[:, None] & (col + n < N)[None, :]
    offsets = row.to(tl.int64) * N + col + (m[:, None] * N + n[None, :])
    tl.store(data_ptr + offsets, q, mask=inside, eviction_policy="evict_first")
    q = cast_stored(tl.trans(q.to(tl.float16)), dtype)  # fp16 holds every FP8 value
    inside = (col + n < N)[:, None] & (row + m < M)[None, :]
    lines = (col + n).to(tl.int64) * M + row  # 32 bits overflow at 2^31 / BN rows
    tl.store(transposed_ptr + lines[:, None] + m[None, :], q, mask=inside)


@triton.jit
def store_fp8(
    x,  # (BM, BN) fp32, zero outside of the matrix
    data_ptr,  # (M, N) FP8
    transposed_ptr,  # (N, M) FP8
    scale_ptr,  # (1,) fp32
    amax_ptr,  # (1,) int32
    row,  # first row of the block
    col,  # first column of the block
    M,
    N,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Quantise the only block of a program: record its maximum and store it in both layouts."""
    record_amax(amax_ptr, x)
    store_scaled(x * tl.load(scale_ptr), data_ptr, transposed_ptr, row, col, M, N, BM, BN)
