"""Kernel of linear_relu_squared, which has the maths, the bytes and the launchers.

It is persistent, and the epilogue of a tile runs inside the product of the next one: each step over
K starts the tensor cores on its terms and, while they multiply, handles `PART` rows of the tile
before. The loop over tiles and the one over K are flattened, so that loads never pause.

The epilogue never feeds the accumulator to store_scaled, which gave wrong bytes on an H200 with
Triton 3.6. The product goes through memory instead: a program stores its tile in bf16 into a
scratch of its own, which stays in the L2 cache, and reads it back in blocks of rows, in the layout
of plain loads that kernels/relu_squared.py has. The scratch holds two tiles in turn, as the
compiler may store a tile before the last rows of the one before it are read.
"""

import triton
import triton.language as tl

from kernels.fp8 import amax_bits, store_scaled
from kernels.lanes import LANE, lane_maxima
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
def _finish_rows(
    product_ptr,  # (PART, BN) bf16, these rows of the tile in the scratch
    y_ptr,
    y_inverse,
    data_ptr,
    transposed_ptr,
    scale,
    peaks,  # (PART, BN / LANE) int32: bits of the largest magnitudes so far
    row,
    col,
    M,
    N,
    PART: tl.constexpr,
    BN: tl.constexpr,
):
    """The epilogue of PART rows from `row` on; returns the new peaks."""
    m, n = tl.arange(0, PART)[:, None], tl.arange(0, BN)[None, :]
    x = tl.load(product_ptr + m * BN + n).to(tl.float32)
    if y_ptr is None:
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        x *= x
    else:
        inside = (row + m < M) & (col + n < N)
        # eight columns a thread, as in x: from loads of sixteen, ptxas crashes below
        offsets = tl.max_contiguous(m * N + n, (1, 8))
        y = tl.load(y_ptr + row.to(tl.int64) * N + col + offsets, mask=inside, other=0.0)
        x *= 2 * tl.sqrt(y.to(tl.float32) * y_inverse)
    store_scaled(x * scale, data_ptr, transposed_ptr, row, col, M, N, PART, BN)
    return tl.maximum(peaks, lane_maxima(amax_bits(x), PART, BN))


@triton.jit
def linear_relu_squared_kernel(
    a_desc,  # (M, K) FP8 in blocks of BM x BK
    b_desc,  # (N, K) FP8 in blocks of BN x BK
    a_inverse_ptr,  # (1,) fp32
    b_inverse_ptr,  # (1,) fp32
    scratch_ptr,  # (programs, 2, BM, BN) bf16
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
    PART: tl.constexpr,  # rows that a step finishes: BM / PART steps are needed, so K >= BK * these
):
    inverse = tl.load(a_inverse_ptr) * tl.load(b_inverse_ptr)
    scale = tl.load(scale_ptr)
    y_inverse = 1.0
    if y_ptr is not None:
        y_inverse = tl.load(y_inverse_ptr)
    first, stride = tl.program_id(0), tl.num_programs(0)
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    scratch_ptr += first * (2 * BM * BN)
    m, n = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    peaks = tl.zeros((PART, BN // LANE), tl.int32)
    tl.assume(K > 0)  # else the loops do not flatten
    # what a step needs of the tile before is computed from `tile`: Triton 3.6 flattens loops that
    # carry it from one tile to the next into wrong code
    for tile in tl.range(first, tiles, stride, flatten=True):
        row, col = _tile_corner(tile, M, N, BM, BN, GROUP)
        before_row, before_col = _tile_corner(tile - stride, M, N, BM, BN, GROUP)
        half = tile // stride % 2 * (BM * BN)
        product = tl.zeros((BM, BN), tl.float32)
        for k in range(0, tl.cdiv(K, BK)):
            a = a_desc.load([row, k * BK])
            b = b_desc.load([col, k * BK])
            if INTERPRETED:  # its dot is right in fp32 only
                a, b = a.to(tl.float32), b.to(tl.float32)
            product = tl.dot(a, b.T, product)
            if (k < BM // PART) & (tile >= stride):
                peaks = _finish_rows(
                    scratch_ptr + (BM * BN - half) + k * (PART * BN), y_ptr, y_inverse, data_ptr,
                    transposed_ptr, scale, peaks, before_row + k * PART, before_col, M, N, PART, BN,
                )  # fmt: skip
        _barrier()  # every thread has read the tile before the last
        tl.store(scratch_ptr + half + m * BN + n, (product * inverse).to(tl.bfloat16))
        _barrier()  # other threads read it back
    last = first + (tiles - 1 - first) // stride * stride
    row, col = _tile_corner(last, M, N, BM, BN, GROUP)
    scratch_ptr += last // stride % 2 * (BM * BN)
    for k in range(0, BM // PART):
        peaks = _finish_rows(
            scratch_ptr + k * (PART * BN), y_ptr, y_inverse, data_ptr, transposed_ptr, scale,
            peaks, row + k * PART, col, M, N, PART, BN,
        )  # fmt: skip
    tl.atomic_max(amax_ptr, tl.max(tl.ravel(peaks), axis=0), sem="relaxed")
