"""Kernel of linear_relu_squared, which has the maths, the bytes and the launchers.

It is persistent: a program computes one tile of the product after another, and the loop over tiles
and the one over K are flattened, so that the next tile's loads are under way during an epilogue.
The epilogue works on the accumulator and writes the row-major FP8 tile. For the transposed one it
reads those bytes back from the L2 cache, in the layout of plain loads: fed with an accumulator
store_scaled gave wrong bytes on an H200 with Triton 3.6, and bytes are the least to move.
"""

import triton
import triton.language as tl

from kernels.fp8 import amax_bits, store_transposed
from kernels.ptx import INTERPRETED


@triton.jit
def _barrier():
    """tl.debug_barrier, which keeps Triton 3.6 from pipelining the loop that it stands in."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "bar.sync 0; mov.b32 $0, 0;",
            "=r,~{memory}",
            [],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _tile_corner(
    tile,
    M,
    N,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GROUP: tl.constexpr,
):
    """First row and column of a tile; GROUP tiles of a column follow each other, for the L2."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = tile // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    inner = tile % (GROUP * tiles_n)
    return (group * GROUP + inner % height) * BM, (inner // height) * BN


@triton.jit
def _transpose(
    data_ptr,  # (M, N) FP8
    transposed_ptr,  # (N, M) FP8
    row,
    col,
    M,
    N,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Copy BM x BN bytes of data into its transpose."""
    i, n = tl.arange(0, BM // 4)[:, None], tl.arange(0, BN // 4)[None, :]
    inside = (row // 4 + i < M // 4) & (col // 4 + n < N // 4)
    words = data_ptr.to(tl.pointer_type(tl.uint32), bitcast=True)
    words += row.to(tl.int64) * (N // 4) + col // 4
    offsets, stride = i * N + n, N // 4
    row0 = tl.load(words + offsets, mask=inside, other=0, cache_modifier=".cg")
    row1 = tl.load(words + stride + offsets, mask=inside, other=0, cache_modifier=".cg")
    row2 = tl.load(words + 2 * stride + offsets, mask=inside, other=0, cache_modifier=".cg")
    row3 = tl.load(words + 3 * stride + offsets, mask=inside, other=0, cache_modifier=".cg")
    store_transposed(row0, row1, row2, row3, transposed_ptr, row, col, M, N, BM, BN)


@triton.jit
def linear_relu_squared_kernel(
    a_desc,  # (M, K) FP8 in blocks of BM x BK
    b_desc,  # (N, K) FP8 in blocks of BN x BK
    a_inverse_ptr,  # (1,) fp32
    b_inverse_ptr,  # (1,) fp32
    y_ptr,  # (M, N) FP8 squared ReLU; None in the forward pass
    y_inverse_ptr,  # (1,) fp32, with y
    data_ptr,  # (M, N) FP8
    transposed_ptr,  # (N, M) FP8
    scale_ptr,  # (1,) fp32
    amax_ptr,  # (1,) int32
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PART: tl.constexpr,  # rows that are transposed at once
):
    inverse = tl.load(a_inverse_ptr) * tl.load(b_inverse_ptr)
    scale = tl.load(scale_ptr)
    if y_ptr is not None:
        y_inverse = tl.load(y_inverse_ptr)
    first, tiles = tl.program_id(0), tl.cdiv(M, BM) * tl.cdiv(N, BN)
    m, n = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    tl.assume(K > 0)  # else the loops do not flatten
    peak = 0  # bits of the largest magnitude
    for tile in tl.range(first, tiles, tl.num_programs(0), flatten=True):
        row, col = _tile_corner(tile, M, N, BM, BN, GROUP)
        product = tl.zeros((BM, BN), tl.float32)
        for k in range(0, tl.cdiv(K, BK)):
            a = a_desc.load([row, k * BK])
            b = b_desc.load([col, k * BK])
            if INTERPRETED:  # its dot is right in fp32 only
                a, b = a.to(tl.float32), b.to(tl.float32)
            product = tl.dot(a, b.T, product)
        inside = (row + m < M) & (col + n < N)
        corner = row.to(tl.int64) * N + col
        offsets = m * N + n
        if y_ptr is None:
            x = tl.maximum(product * inverse, 0.0, propagate_nan=tl.PropagateNan.ALL)
            x *= x
            bits = amax_bits(x)
        else:
            y = tl.load(y_ptr + corner + offsets, mask=inside, other=0.0)
            x = product * (2 * inverse * tl.sqrt(y.to(tl.float32) * y_inverse))
            # the compiler moves these to the layout of y: half of each is half as much
            bits = (amax_bits(x) >> 16).to(tl.int16)
        peak = tl.maximum(peak, tl.max(tl.max(bits, axis=1), axis=0))
        q = (x * scale).to(data_ptr.dtype.element_ty)
        tl.store(data_ptr + corner + offsets, q, mask=inside)
        _barrier()  # other threads read it back
        for i in tl.static_range(0, BM, PART):
            _transpose(data_ptr, transposed_ptr, row + i, col, M, N, PART, BN)
    if y_ptr is not None:
        peak <<= 16
    tl.atomic_max(amax_ptr, peak, sem="relaxed")  # the order does not show: deterministic
