"""Kernel of kernels/linear_relu_squared.py, which has the maths, the bytes and the launchers.

A persistent GEMM: each program computes a sequence of tiles, and the loop over tiles is flattened
with the one over K, so that the loads of the next tile are in flight during an epilogue. The
epilogue works in registers, on the accumulator. With FP8 its result goes through shared memory to
the store's register layout as bf16 and is cast there (kernels.common.fp8.cast_stored).
"""

from nanofuse.kernels.common.fp8 import amax_bits, cast_stored, record_amax
from nanofuse.kernels.common.jit import tl, triton
from nanofuse.kernels.common.ptx import INTERPRETED, fast_sqrt

FOLD = tl.constexpr(16)  # columns that the running maxima fold into one: adjacent or strided ones


@triton.jit
def _tile_corner(
    tile,
    M,
    N,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GROUP: tl.constexpr,
):
    """First row and column of tile number `tile`; the order is grouped for L2 reuse: GROUP tiles
    of one column follow each other before the next column starts."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = tile // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    inner = tile % (GROUP * tiles_n)
    return (group * GROUP + inner % height) * BM, (inner // height) * BN


@triton.jit
def linear_relu_squared_kernel(
    a_desc,  # (M, K) in blocks of BM x BK; FP8, bf16 or fp32
    b_desc,  # (N, K) in blocks of BN x BK; backward without FP8 (K, N) in blocks of BK x BN
    a_inverse_ptr,  # (1,) fp32 inverse scale of a, or None without FP8
    b_inverse_ptr,  # (1,) fp32 inverse scale of b, or None without FP8
    y_inverse_ptr,  # (1,) fp32 inverse scale of y, or None without FP8 or y
    y_ptr,  # (M, N) result of the forward pass; None in the forward pass
    data_ptr,  # (M, N) result: FP8, or a's dtype
    transposed_ptr,  # (N, M) FP8, or None without FP8
    scale_ptr,  # (1,) fp32, or None without FP8
    amax_ptr,  # (1,) int32, or None without FP8
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    factor = 1.0 if y_ptr is None else 2.0  # multiplies the accumulator
    if transposed_ptr is not None:
        scale = tl.load(scale_ptr)
        factor *= tl.load(a_inverse_ptr) * tl.load(b_inverse_ptr)
        # running maxima over the tiles, folded along columns that one lane holds: no shuffles
        if y_ptr is None:
            factor *= tl.sqrt(scale)
            peaks = tl.zeros((BM, FOLD), tl.int32)  # accumulator layout: a lane's columns are apart
        else:
            factor *= scale * tl.sqrt(tl.load(y_inverse_ptr))
            peaks = tl.zeros((BM, BN // FOLD), tl.int32)  # y's layout: they are adjacent
    first, tiles = tl.program_id(0), tl.cdiv(M, BM) * tl.cdiv(N, BN)
    m, n = tl.arange(0, BM), tl.arange(0, BN)
    tl.assume(K > 0)  # otherwise the compiler does not flatten the loops
    for tile in tl.range(first, tiles, tl.num_programs(0), flatten=True):
        row, col = _tile_corner(tile, M, N, BM, BN, GROUP)
        product = tl.zeros((BM, BN), tl.float32)
        for k in range(0, tl.cdiv(K, BK)):
            a = a_desc.load([row, k * BK])
            if transposed_ptr is None and y_ptr is not None:
                b = b_desc.load([k * BK, col])
            else:
                b = b_desc.load([col, k * BK]).T
            if INTERPRETED:  # the interpreter's tl.dot is right in fp32 only
                a, b = a.to(tl.float32), b.to(tl.float32)
            product = tl.dot(a, b, product, input_precision="ieee")
        inside = (row + m < M)[:, None] & (col + n < N)[None, :]
        corner, offsets = row.to(tl.int64) * N + col, m[:, None] * N + n[None, :]
        if y_ptr is None:
            x = tl.maximum(product, 0.0, propagate_nan=tl.PropagateNan.ALL) * factor
            x *= x
        else:
            y = tl.load(y_ptr + corner + offsets, mask=inside, other=0.0)
            x = product * fast_sqrt(y.to(tl.float32)) * factor
        if transposed_ptr is None:
            x = x.to(data_ptr.dtype.element_ty)
            tl.store(data_ptr + corner + offsets, x, mask=inside)
        else:
            narrow = x.to(tl.bfloat16)
            if y_ptr is not None:
                x = narrow.to(tl.float32)  # widened in the register layout of y and of the stores
            bits = tl.reshape(amax_bits(x), (BM, BN // FOLD, FOLD))
            peaks = tl.maximum(peaks, tl.max(bits, axis=1 if y_ptr is None else 2))
            dtype: tl.constexpr = data_ptr.dtype.element_ty
            tl.store(data_ptr + corner + offsets, cast_stored(narrow, dtype), mask=inside)
            inside = (col + n < N)[:, None] & (row + m < M)[None, :]
            lines = (col + n).to(tl.int64) * M + row
            transposed = cast_stored(tl.trans(narrow), dtype)
            tl.store(transposed_ptr + lines[:, None] + m[None, :], transposed, mask=inside)
    if transposed_ptr is not None:
        record_amax(amax_ptr, peaks.to(tl.float32, bitcast=True) / scale)
