"""Kernel of linear_relu_squared, which has the maths, the bytes and the launchers.

It is persistent: a program computes one tile of the product after another (the loop over tiles and
the one over K are flattened, so that the next tile's loads are under way during an epilogue). The
epilogue never feeds the accumulator to store_scaled, which gave wrong bytes on an H200 with Triton
3.6. The product goes through memory instead: a program stores its tile in bf16 into a scratch of
its own, which stays in the L2 cache, and reads it back in blocks of rows, in the layout of plain
loads that kernels/relu_squared.py has.
"""

import triton
import triton.language as tl

from kernels.fp8 import amax_bits, larger_magnitude, store_scaled
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
def linear_relu_squared_kernel(
    a_desc,  # (M, K) FP8 in blocks of BM x BK
    b_desc,  # (N, K) FP8 in blocks of BN x BK
    a_inverse_ptr,  # (1,) fp32
    b_inverse_ptr,  # (1,) fp32
    scratch_ptr,  # (programs, BM, BN) bf16
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
    PART: tl.constexpr,  # rows that the epilogue handles at once
):
    inverse = tl.load(a_inverse_ptr) * tl.load(b_inverse_ptr)
    scale = tl.load(scale_ptr)
    if y_ptr is not None:
        y_inverse = tl.load(y_inverse_ptr)
    scratch_ptr += tl.program_id(0) * (BM * BN)
    first, tiles = tl.program_id(0), tl.cdiv(M, BM) * tl.cdiv(N, BN)
    m, n = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    part = tl.arange(0, PART)[:, None]
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
        _barrier()  # every thread has read the last tile
        tl.store(scratch_ptr + m * BN + n, (product * inverse).to(tl.bfloat16))
        _barrier()  # other threads read it back
        amax = tl.zeros((PART, BN), tl.float32)
        for i in tl.static_range(0, BM, PART):
            x = tl.load(scratch_ptr + (i + part) * BN + n).to(tl.float32)
            if y_ptr is None:
                x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
                x *= x
            else:
                inside = (row + i + part < M) & (col + n < N)
                # eight columns a thread, as in x: from loads of sixteen, ptxas crashes below
                offsets = tl.max_contiguous(part * N + n, (1, 8))
                y = tl.load(
                    y_ptr + (row + i).to(tl.int64) * N + col + offsets, mask=inside, other=0.0
                )
                x *= 2 * tl.sqrt(y.to(tl.float32) * y_inverse)
            amax = larger_magnitude(amax, x)
            store_scaled(x * scale, data_ptr, transposed_ptr, row + i, col, M, N, PART, BN)
        peak = tl.maximum(peak, tl.max(tl.ravel(amax_bits(amax)), axis=0))
    tl.atomic_max(amax_ptr, peak, sem="relaxed")  # the order does not show: deterministic
