"""product_kernel of kernels/linear_softcap_cross_entropy_kernels.py for Hopper, in FP8, in Gluon.
u is rounded once, from fp32 to FP8.
"""

import torch

from nanofuse.kernels.common.jit import HAS_GLUON, gl, gluon, hopper
from nanofuse.kernels.common.pairs import (
    BM,
    BN,
    PART_4,
    PART_8,
    TILE_4,
    TILE_8,
    cast_pairs,
    neighbours,
    quarters,
    scratch_of,
    store_pairs,
    whole,
)
from nanofuse.kernels.common.panel import (
    BK,
    PanelTile,
    barriers,
    described,
    grid,
    launch_args,
    load_partition,
    onwards,
    rooms_of_panel,
    share_of,
    tile_of,
    tile_product,
)
from nanofuse.kernels.common.ptx import EXP2, LOG2_E, TANH

if HAS_GLUON:
    fence_async_shared = hopper.fence_async_shared

OP = "linear_softcap_cross_entropy_panel"
TILE = PanelTile(warps=4)


@gluon.jit
def fast_tanh(x):
    return gl.inline_asm_elementwise(TANH, "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def fast_exp2(x):
    return gl.inline_asm_elementwise(EXP2, "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def gradient(
    x,  # (ROWS, COLS) fp32 accumulator
    factor,
    col,  # first column
    vocab,
    CAP: gl.constexpr,
    SHIFT: gl.constexpr,
    PADDED: gl.constexpr,
    layout: gl.constexpr,
    ROWS: gl.constexpr,
    COLS: gl.constexpr,
):
    """u of some columns as FP8 pairs, and the sums of e over them. e is that of `exponential` in
    linear_softcap_cross_entropy_kernels.py to the last bit: rows_kernel subtracts it."""
    t = fast_tanh(x * factor)
    e = fast_exp2(t * (CAP * LOG2_E) + (SHIFT - CAP * LOG2_E))
    u = e - t * t * e
    if PADDED:
        n = gl.arange(0, COLS, layout=gl.SliceLayout(0, x.type.layout))
        e = gl.where((col + n < vocab)[None, :], e, 0.0)
        u = gl.where((col + n < vocab)[None, :], u, 0.0)
    left, right = neighbours(u, layout, ROWS, COLS)
    return cast_pairs(left, right, gl.float8e5), gl.sum(e, axis=1)


@gluon.jit
def loss_partition(
    a_bufs,
    b_bufs,
    a_full,
    a_empty,
    b_full,
    b_empty,
    turns,
    scratch,
    targets_ptr,
    u_ptr,
    transposed_ptr,
    sums_ptr,
    tanh_ptr,
    inverse,
    first,
    last,
    tiles_n,
    N,
    vocab,
    PAIRS,
    CAP: gl.constexpr,
    SHIFT: gl.constexpr,
    PADDED: gl.constexpr,
    WHO: gl.constexpr,
    WARPS: gl.constexpr,
    CHUNKS: gl.constexpr,
    STAGES: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 32])
    of_tile: gl.constexpr = TILE_8 if WARPS == 8 else TILE_4
    of_part: gl.constexpr = PART_8 if WARPS == 8 else PART_4
    part: gl.constexpr = BN // 4
    m = gl.arange(0, BM, layout=gl.SliceLayout(1, layout))
    n = gl.arange(0, BN, layout=gl.SliceLayout(0, layout))
    factor = inverse / CAP
    first_row = first // tiles_n
    row, col = onwards(first_row, first % tiles_n, WHO, tiles_n)
    for number in range(WHO, last - first, 2):
        target = gl.load(targets_ptr + row * BM + m)
        here = (target >= col * BN) & (target < col * BN + BN)
        target = gl.where(here, target - col * BN, -1).to(gl.int32)  # its column in this tile
        found = gl.max(target, axis=0) >= 0
        acc = tile_product(
            a_bufs, b_bufs, a_full, a_empty, b_full, b_empty, turns, number, row - first_row,
            tiles_n - 1 - col, WHO, CHUNKS, STAGES, BM, BN, layout,
        )  # fmt: skip
        if found:  # few tiles hold a target
            t = fast_tanh(acc * factor)
            of_target = gl.sum(gl.where(target[:, None] == n[None, :], t, 0.0), axis=1)
            gl.store(tanh_ptr + row * BM + m, of_target, mask=here)
        x0, x1, x2, x3 = quarters(acc, BM, BN)
        at = col * BN
        q0, s0 = gradient(x0, factor, at, vocab, CAP, SHIFT, PADDED, of_part, BM, part)
        q1, s1 = gradient(x1, factor, at + part, vocab, CAP, SHIFT, PADDED, of_part, BM, part)
        q2, s2 = gradient(x2, factor, at + 2 * part, vocab, CAP, SHIFT, PADDED, of_part, BM, part)
        q3, s3 = gradient(x3, factor, at + 3 * part, vocab, CAP, SHIFT, PADDED, of_part, BM, part)
        total = gl.convert_layout((s0 + s1) + (s2 + s3), gl.SliceLayout(1, layout))
        gl.store(sums_ptr + col.to(gl.int64) * N + row * BM + m, total)
        pairs = whole(q0, q1, q2, q3, of_tile, BM, BN // 2)
        store_pairs(
            pairs, u_ptr, transposed_ptr, scratch, row * BM, col * (BN // 2), N, PAIRS, BM, BN,
            WARPS,
        )  # fmt: skip
        row, col = onwards(row, col, 2, tiles_n)


@gluon.jit
def loss_panel_kernel(
    a_desc,  # (N, C) FP8
    b_desc,  # (V, C) FP8
    a_inverse_ptr,  # (1,) fp32
    b_inverse_ptr,  # (1,) fp32
    targets_ptr,  # (N,) int64 or int32
    u_ptr,  # (N, V / 2) int16 result
    transposed_ptr,  # (V, N) int8 result
    sums_ptr,  # (V / BN, N) fp32: sum of e over the columns of a tile
    tanh_ptr,  # (N,) fp32: t of the target
    N,
    vocab,
    PAIRS,  # V / 2
    tiles,
    CAP: gl.constexpr,
    SHIFT: gl.constexpr,  # e and u are multiplied by 2^SHIFT
    PADDED: gl.constexpr,  # whether there are columns beyond vocab
    WARPS: gl.constexpr,
    REGISTERS: gl.constexpr,
    CHUNKS: gl.constexpr,
    HELD: gl.constexpr,
    STAGES: gl.constexpr,
):
    BM: gl.constexpr = a_desc.block_type.shape[0]
    BN: gl.constexpr = b_desc.block_type.shape[0]
    a_bufs, b_bufs = rooms_of_panel(a_desc, b_desc, CHUNKS, HELD, STAGES)
    scratch = scratch_of(BM, BN)
    a_full, a_empty = barriers(HELD), barriers(1, 2)
    b_full, b_empty, turns = barriers(STAGES), barriers(STAGES), barriers(2)
    fence_async_shared()
    first, last = share_of(tiles)
    tiles_n = PAIRS // (BN // 2)
    inverse = gl.load(a_inverse_ptr) * gl.load(b_inverse_ptr)
    gl.warp_specialize(
        [
            (loss_partition, (
                a_bufs, b_bufs, a_full, a_empty, b_full, b_empty, turns, scratch.index(0),
                targets_ptr, u_ptr, transposed_ptr, sums_ptr, tanh_ptr, inverse, first, last,
                tiles_n, N, vocab, PAIRS, CAP, SHIFT, PADDED, 0, WARPS, CHUNKS, STAGES, BM, BN,
            )),
            (loss_partition, (
                a_bufs, b_bufs, a_full, a_empty, b_full, b_empty, turns, scratch.index(1),
                targets_ptr, u_ptr, transposed_ptr, sums_ptr, tanh_ptr, inverse, first, last,
                tiles_n, N, vocab, PAIRS, CAP, SHIFT, PADDED, 1, WARPS, CHUNKS, STAGES, BM, BN,
            )),
            (load_partition, (
                a_desc, b_desc, None, a_bufs, b_bufs, None, a_full, a_empty, b_full, b_empty,
                None, None, first, last, tiles_n, CHUNKS, STAGES,
            )),
        ],
        [WARPS, 1],
        [REGISTERS, 24],
    )  # fmt: skip


def product_panel(
    x,  # (N, C) FP8
    w,  # (V, C) FP8
    inverse_scales,  # of x and w, each (1,) fp32
    targets,  # (N,) int64 or int32
    u,  # (N, V) FP8 result
    transposed,  # (V, N) FP8 result
    sums,  # (V / BN, N) fp32
    tanh,  # (N,) fp32
    vocab,
    softcap,
    shift,
):
    """Launch the kernel; sizes are as kernels.common.panel.takes says."""
    (rows, terms), cols = x.shape, w.size(0)
    programs, tiles = grid(x.device, rows, cols)
    loss_panel_kernel[programs](
        described(x, [BM, BK]),
        described(w, [BN, BK]),
        *inverse_scales,
        targets,
        u.view(torch.int16),
        transposed.view(torch.int8),
        sums,
        tanh,
        rows,
        vocab,
        cols // 2,
        tiles,
        CAP=softcap,
        SHIFT=shift,
        PADDED=vocab < cols,
        **launch_args(tile_of(OP, TILE, terms), terms),
    )
