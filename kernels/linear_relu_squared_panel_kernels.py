"""The kernel of kernels/linear_relu_squared.py for Hopper, in FP8, in Gluon.

Results are rounded once, from fp32 to FP8, and amax is that of the fp32 numbers.
kernels/common/panel.py and pairs.py have what it is made of.
"""

import torch

from nanofuse.kernels.common.jit import HAS_GLUON, gl, gluon, hopper, tl
from nanofuse.kernels.common.pairs import (
    BM,
    BN,
    IN_PLACE_4,
    IN_PLACE_8,
    PART_4,
    PART_8,
    TILE_4,
    TILE_8,
    cast_pairs,
    described_pairs,
    neighbours,
    quarters,
    reordered,
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
    kind_of,
    launch_args,
    load_partition,
    onwards,
    rooms_of_panel,
    share_of,
    tile_of,
    tile_product,
)

if HAS_GLUON:
    fence_async_shared, mbarrier = hopper.fence_async_shared, hopper.mbarrier
    KEEP_NAN = gl.constexpr(tl.PropagateNan.ALL)
    ROOTS = gl.constexpr("""{
        .reg .b32 both;
        .reg .b16 low, high;
        cvt.rn.f16x2.e4m3x2 both, $2;
        mov.b32 {low, high}, both;
        cvt.f32.f16 $0, low;
        cvt.f32.f16 $1, high;
        sqrt.approx.ftz.f32 $0, $0;
        sqrt.approx.ftz.f32 $1, $1;
    }""")

OP = "linear_relu_squared_panel"  # and with _bwd
TILE = PanelTile(warps=4)


@gluon.jit
def roots(pairs):
    """fp32 square roots of the left and the right ones of e4m3 pairs."""
    return gl.inline_asm_elementwise(
        ROOTS, "=f,=f,h", [pairs], dtype=(gl.float32, gl.float32), is_pure=True, pack=1
    )


@gluon.jit
def squares(
    x, factor, DTYPE: gl.constexpr, layout: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr
):
    """Squared ReLU of some columns as FP8 pairs, and the bits of the larger one of each."""
    x = gl.maximum(x, 0.0, propagate_nan=KEEP_NAN) * factor
    x *= x
    left, right = neighbours(x, layout, ROWS, COLS)
    # squares have no sign, nor has the NaN that is computed
    bits = gl.maximum(left.to(gl.int32, bitcast=True), right.to(gl.int32, bitcast=True))
    return cast_pairs(left, right, DTYPE), bits


@gluon.jit
def times_roots(
    x,
    y,
    factor,
    DTYPE: gl.constexpr,
    layout: gl.constexpr,
    ROWS: gl.constexpr,
    COLS: gl.constexpr,
):
    """x sqrt(y) factor of some columns as FP8 pairs, and the bits of the larger magnitude of each.
    y is in pairs."""
    left, right = neighbours(x, layout, ROWS, COLS)
    y_left, y_right = roots(gl.convert_layout(y, layout))
    left *= y_left * factor
    right *= y_right * factor
    bits, more = left.to(gl.int32, bitcast=True), right.to(gl.int32, bitcast=True)
    bits = gl.maximum(bits & 0x7FFFFFFF, more & 0x7FFFFFFF)
    return cast_pairs(left, right, DTYPE), bits


@gluon.jit
def relu_partition(
    a_bufs,
    b_bufs,
    y_bufs,
    a_full,
    a_empty,
    b_full,
    b_empty,
    y_full,
    y_empty,
    turns,
    bufs,
    data_ptr,
    transposed_ptr,
    amax_ptr,
    factor,
    scale,
    first,
    last,
    tiles_n,
    M,
    PAIRS,
    DTYPE: gl.constexpr,
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
    in_place: gl.constexpr = IN_PLACE_8 if WARPS == 8 else IN_PLACE_4
    part: gl.constexpr = BN // 4
    peaks = gl.zeros((BM,), gl.int32, gl.SliceLayout(1, of_part))
    first_row = first // tiles_n
    row, col = onwards(first_row, first % tiles_n, WHO, tiles_n)
    for number in range(WHO, last - first, 2):
        acc = tile_product(
            a_bufs, b_bufs, a_full, a_empty, b_full, b_empty, turns, number, row - first_row,
            tiles_n - 1 - col, WHO, CHUNKS, STAGES, BM, BN, layout,
        )  # fmt: skip
        x0, x1, x2, x3 = quarters(acc, BM, BN)
        if y_bufs is None:
            scratch = bufs.index(WHO)
            q0, bits0 = squares(x0, factor, DTYPE, of_part, BM, part)
            q1, bits1 = squares(x1, factor, DTYPE, of_part, BM, part)
            q2, bits2 = squares(x2, factor, DTYPE, of_part, BM, part)
            q3, bits3 = squares(x3, factor, DTYPE, of_part, BM, part)
        else:
            scratch = y_bufs.index(WHO)
            mbarrier.wait(y_full.index(WHO), (number // 2) & 1)
            y = reordered(scratch.load(in_place), BM, BN // 2)
            y0, y1, y2, y3 = quarters(y, BM, BN // 2)
            q0, bits0 = times_roots(x0, y0, factor, DTYPE, of_part, BM, part)
            q1, bits1 = times_roots(x1, y1, factor, DTYPE, of_part, BM, part)
            q2, bits2 = times_roots(x2, y2, factor, DTYPE, of_part, BM, part)
            q3, bits3 = times_roots(x3, y3, factor, DTYPE, of_part, BM, part)
        bits = gl.maximum(gl.maximum(bits0, bits1), gl.maximum(bits2, bits3))
        peaks = gl.maximum(peaks, gl.max(bits, axis=1))
        pairs = whole(q0, q1, q2, q3, of_tile, BM, BN // 2)
        store_pairs(
            pairs, data_ptr, transposed_ptr, scratch, row * BM, col * (BN // 2), M, PAIRS, BM, BN,
            WARPS,
        )  # fmt: skip
        if y_bufs is not None:
            fence_async_shared()  # the next y may come
            mbarrier.arrive(y_empty.index(WHO), count=1)
        row, col = onwards(row, col, 2, tiles_n)
    peak = gl.max(peaks, axis=0).to(gl.float32, bitcast=True) / scale
    gl.atomic_max(amax_ptr, peak.to(gl.int32, bitcast=True))


@gluon.jit
def relu_panel_kernel(
    a_desc,  # (M, K) FP8
    b_desc,  # (N, K) FP8
    y_desc,  # (M, N / 2) int16; None in the forward pass
    a_inverse_ptr,  # (1,) fp32
    b_inverse_ptr,  # (1,) fp32
    y_inverse_ptr,  # (1,) fp32, or None without y
    data_ptr,  # (M, N / 2) int16 result
    transposed_ptr,  # (N, M) int8 result
    scale_ptr,  # (1,) fp32
    amax_ptr,  # (1,) int32
    M,
    PAIRS,  # N / 2
    tiles,
    DTYPE: gl.constexpr,
    WARPS: gl.constexpr,
    REGISTERS: gl.constexpr,
    CHUNKS: gl.constexpr,
    HELD: gl.constexpr,
    STAGES: gl.constexpr,
):
    BM: gl.constexpr = a_desc.block_type.shape[0]
    BN: gl.constexpr = b_desc.block_type.shape[0]
    a_bufs, b_bufs = rooms_of_panel(a_desc, b_desc, CHUNKS, HELD, STAGES)
    bufs, y_bufs, y_full, y_empty = None, None, None, None
    scale = gl.load(scale_ptr)
    factor = gl.load(a_inverse_ptr) * gl.load(b_inverse_ptr)
    if y_desc is None:
        bufs = scratch_of(BM, BN)
        factor *= gl.sqrt(scale)
    else:
        y_bufs = gl.allocate_shared_memory(y_desc.dtype, [2, BM, BN // 2], y_desc.layout)
        y_full, y_empty = barriers(2), barriers(2)
        factor *= 2.0 * scale * gl.sqrt(gl.load(y_inverse_ptr))
    a_full, a_empty = barriers(HELD), barriers(1, 2)
    b_full, b_empty, turns = barriers(STAGES), barriers(STAGES), barriers(2)
    fence_async_shared()
    first, last = share_of(tiles)
    tiles_n = PAIRS // (BN // 2)
    gl.warp_specialize(
        [
            (relu_partition, (
                a_bufs, b_bufs, y_bufs, a_full, a_empty, b_full, b_empty, y_full, y_empty, turns,
                bufs, data_ptr, transposed_ptr, amax_ptr, factor, scale, first, last, tiles_n, M,
                PAIRS, DTYPE, 0, WARPS, CHUNKS, STAGES, BM, BN,
            )),
            (relu_partition, (
                a_bufs, b_bufs, y_bufs, a_full, a_empty, b_full, b_empty, y_full, y_empty, turns,
                bufs, data_ptr, transposed_ptr, amax_ptr, factor, scale, first, last, tiles_n, M,
                PAIRS, DTYPE, 1, WARPS, CHUNKS, STAGES, BM, BN,
            )),
            (load_partition, (
                a_desc, b_desc, y_desc, a_bufs, b_bufs, y_bufs, a_full, a_empty, b_full, b_empty,
                y_full, y_empty, first, last, tiles_n, CHUNKS, STAGES,
            )),
        ],
        [WARPS, 1],
        [REGISTERS, 24],
    )  # fmt: skip


def linear_relu_squared_panel(
    a,  # (M, K) FP8
    b,  # (N, K) FP8
    y,  # (M, N) FP8, or None forward
    inverse_scales,  # of a, b and y, each (1,) fp32; y's None forward
    data,  # (M, N) FP8 result
    transposed,  # (N, M) FP8 result
    scale,  # (1,) fp32
    amax,  # (1,) int32
):
    """Launch the kernel; sizes are as kernels.common.panel.takes says."""
    (rows, terms), cols = a.shape, b.size(0)
    programs, tiles = grid(a.device, rows, cols)
    name = OP if y is None else f"{OP}_bwd"
    relu_panel_kernel[programs](
        described(a, [BM, BK]),
        described(b, [BN, BK]),
        None if y is None else described_pairs(y),
        *inverse_scales,
        data.view(torch.int16),
        transposed.view(torch.int8),
        scale,
        amax,
        rows,
        cols // 2,
        tiles,
        DTYPE=kind_of(data),
        **launch_args(tile_of(name, TILE, terms), terms),
    )
