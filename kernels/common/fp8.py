"""FP8 operands of matrix products, and the jit helpers with which kernels write them.

    q = fp8(clamp(x * scale)),   x ~ q * inverse_scale,   amax = max |x|

Hopper's FP8 tensor cores need both operands contiguous along the reduction dimension. A tensor that
feeds a forward or dgrad GEMM and a wgrad GEMM is reduced over a different dimension in each, so the
kernel that produces it writes it in two layouts, row-major and transposed. Its scale is known
before the kernel runs: static where the values are bounded, else delayed, that is, derived from the
amax that the same kernel recorded in earlier steps (formats: arXiv 2209.05433; delayed scaling:
NVIDIA Transformer Engine, https://docs.nvidia.com/deeplearning/transformer-engine).
"""

from dataclasses import dataclass

import torch

from nanofuse.kernels.common.jit import tl, triton

E4M3 = torch.float8_e4m3fn  # activations and weights
E5M2 = torch.float8_e5m2  # gradients
MULTIPLE = 16  # both sizes of an FP8 operand must be multiples of it
ALIGNMENT = 16  # Triton specialises kernels on addresses (in bytes) and integers divisible by it


@dataclass(frozen=True)
class Scaling:
    """How one tensor is quantised: dtype, scale, and the running amax that kernels record.

    Fields: dtype (E4M3 or E5M2); scale, inverse_scale and amax, each a (1,) fp32 tensor on the
    tensor's device. Kernels read scale, raise amax to max(amax, max|x|) and write nothing else.
    cuBLAS requires inverse_scale at an address that is a multiple of 16 bytes.
    """

    dtype: torch.dtype
    scale: torch.Tensor  # (1,) fp32
    inverse_scale: torch.Tensor  # (1,) fp32
    amax: torch.Tensor  # (1,) fp32

    @classmethod
    def from_bound(cls, bound, dtype=E4M3, device="cuda"):
        """Scaling that maps the range [-bound, bound] (bound: a float > 0) onto the range of dtype.

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
    """A quantised (M, K) matrix, row-major and transposed."""

    data: torch.Tensor  # (M, K) FP8, contiguous
    transposed: torch.Tensor  # (K, M) FP8, contiguous
    inverse_scale: torch.Tensor  # (1,) fp32

    def dequantize(self):
        """The (M, K) matrix in fp32."""
        return self.data.float() * self.inverse_scale


def empty_operand(rows, cols, scaling, device):
    """FP8Operand of a (rows, cols) matrix, with uninitialised data.

    Raises:
        ValueError: rows or cols is not a multiple of 16.
    """
    if rows % MULTIPLE or cols % MULTIPLE:
        raise ValueError(f"an FP8 operand's sizes must be multiples of 16, got {rows} x {cols}")
    data = torch.empty(rows, cols, dtype=scaling.dtype, device=device)
    transposed = torch.empty(cols, rows, dtype=scaling.dtype, device=device)
    return FP8Operand(data, transposed, scaling.inverse_scale)


def check_alignment(op, **tensors):
    """Check that the matrices a kernel reads before it writes FP8 allow 16-byte vector loads.

    Where Triton cannot prove addresses and row strides to be multiples of 16 it falls back to one
    load per element; tensor descriptors and cuBLAS refuse such operands. A tensor that is None is
    skipped.

    Raises:
        ValueError: an address that is not a multiple of 16 bytes, or a row stride that is not a
            multiple of 16 elements.
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
    """The four arguments with which a kernel writes `operand`: data, transposed, scale, and amax
    viewed as int32; four times None without an operand."""
    if operand is None:
        return None, None, None, None
    return operand.data, operand.transposed, scaling.scale, scaling.amax.view(torch.int32)


@triton.jit
def amax_bits(
    x,  # fp32 block
):
    """Bits of |x| as int32: their integer order is the order of magnitudes, with NaN above Inf."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def record_amax(
    amax_ptr,  # (1,) int32: the bits of a non-negative fp32
    x,  # fp32 block
):
    """Raise amax to max|x|, NaN and Inf included. Deterministic despite the atomic: a maximum does
    not depend on the order of its updates."""
    bits = tl.max(tl.ravel(amax_bits(x)), axis=0)
    if bits > tl.load(amax_ptr):  # a stale read only costs a redundant atomic
        tl.atomic_max(amax_ptr, bits, sem="relaxed")


@triton.jit
def cast_stored(
    x,  # bf16 or fp16 block
    dtype: tl.constexpr,
):
    """x in an FP8 dtype, cast after the conversion to the store's register layout, not before it.

    The conversion goes through shared memory. With 16-bit elements it may use stmatrix, which also
    transposes; FP8 elements would move byte by byte, and Triton 3.6 moves them wrongly in some
    layouts (dev/LOG.md, 2026-11-22). Triton places a layout conversion before a widening cast and
    after a narrowing one, so the cast to fp32 in between keeps it on the 16-bit elements.
    """
    return x.to(tl.float32).to(dtype)


@triton.jit
def store_scaled(
    x,  # (BM, BN) fp32, already multiplied by the scale
    data_ptr,  # (M, N) FP8
    transposed_ptr,  # (N, M) FP8
    row,  # first row of the block
    col,  # first column of the block
    M,
    N,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Cast one block of a matrix to FP8 and store it row-major and transposed.

    Fast only where the matrices that x was computed from pass check_alignment.
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
    """Quantise a program's only block: record its amax and store it row-major and transposed."""
    record_amax(amax_ptr, x)
    store_scaled(x * tl.load(scale_ptr), data_ptr, transposed_ptr, row, col, M, N, BM, BN)
