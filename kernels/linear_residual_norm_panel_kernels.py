"""The kernels of kernels/linear_residual_norm.py, for Hopper, in FP8, in Gluon.

The first one adds a tile of the product to the stream and leaves the sums of squares of the tile's
rows; the second one, whose blocks know their rows' sums at once, casts. kernels/common/panel.py,
parts.py and units.py have what they are made of.
"""

import torch

from nanofuse.kernels.common.jit import HAS_GLUON, GluonDescriptor, gl, gluon, hopper
from nanofuse.kernels.common.pairs import BM, BN, quarters
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
from nanofuse.kernels.common.parts import (
    finish_parts,
    in_parts,
    load_parts,
    part_of,
    replace_part,
    rooms_beside,
    rooms_of_parts,
)
from nanofuse.kernels.common.rms_norm import RMS_NORM_EPS
from nanofuse.kernels.common.tuning import sm_count
from nanofuse.kernels.common.units import (
    PAIRS_OF_PART,
    PART,
    ROWS,
    WIDTH,
    cast_part,
    load_units,
    record_peak,
    rooms_of_unit,
    rounded,
    stage_unit,
    write_unit,
)

if HAS_GLUON:
    fence_async_shared, mbarrier = hopper.fence_async_shared, hopper.mbarrier

OP = "linear_residual_norm"
TILE = PanelTile(warps=4, stages=3)
# of the second kernel: units in shared memory, warps, registers of a thread, programs to an SM
RING, WARPS, REGISTERS, PROGRAMS = 8, 8, 80, 2


@gluon.jit
def add_partition(
    y_desc,  # (N, C) in parts
    a_bufs,
    b_bufs,
    x_bufs,  # (2 ROOMS, BM, BN / 4)
    a_full,
    a_empty,
    b_full,
    b_empty,
    x_full,
    x_empty,
    turns,
    squares_ptr,  # (C / BN, N)
    factor,
    first,
    last,
    tiles_n,
    N,
    WHO: gl.constexpr,
    WARPS: gl.constexpr,
    CHUNKS: gl.constexpr,
    STAGES: gl.constexpr,
    ROOMS: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
):
    PART: gl.constexpr = BN // 4
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 32])
    part: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, PART, 32])
    m = gl.arange(0, BM, layout=gl.SliceLayout(1, part))
    first_row = first // tiles_n
    row, col = onwards(first_row, first % tiles_n, WHO, tiles_n)
    for number in range(WHO, last - first, 2):
        acc = tile_product(
            a_bufs, b_bufs, a_full, a_empty, b_full, b_empty, turns, number, row - first_row,
            tiles_n - 1 - col, WHO, CHUNKS, STAGES, BM, BN, layout,
        )  # fmt: skip
        found = quarters(acc, BM, BN)
        squares = gl.zeros((BM, PART), gl.float32, part)
        for i in gl.static_range(4):
            x = part_of(x_bufs, x_full, number // 2, i, WHO, ROOMS, part).to(gl.float32)
            y = rounded(x + gl.convert_layout(found[i], part) * factor)
            replace_part(y, y_desc, x_bufs, x_empty, row, col, number // 2, i, WHO, ROOMS)
            squares += y.to(gl.float32) * y.to(gl.float32)
        gl.store(squares_ptr + (col.to(gl.int64) * N + row * BM) + m, gl.sum(squares, axis=1))
        finish_parts(x_empty, number // 2, WHO, ROOMS)
        row, col = onwards(row, col, 2, tiles_n)


@gluon.jit
def add_panel_kernel(
    a_desc,  # (N, K) FP8
    b_desc,  # (C, K) FP8
    x_desc,  # (N, C) bf16
    y_desc,  # (N, C) bf16 result
    a_inverse_ptr,  # (1,) fp32
    b_inverse_ptr,  # (1,) fp32
    squares_ptr,  # (C / BN, N) fp32 result: of each tile's rows
    N,
    tiles_n,  # C / BN
    tiles,
    WARPS: gl.constexpr,
    REGISTERS: gl.constexpr,
    CHUNKS: gl.constexpr,
    HELD: gl.constexpr,
    STAGES: gl.constexpr,
    ROOMS: gl.constexpr,
):
    BM: gl.constexpr = a_desc.block_type.shape[0]
    BN: gl.constexpr = b_desc.block_type.shape[0]
    a_bufs, b_bufs = rooms_of_panel(a_desc, b_desc, CHUNKS, HELD, STAGES)
    x_bufs = rooms_of_parts(x_desc, ROOMS)
    a_full, a_empty = barriers(HELD), barriers(1, 2)
    b_full, b_empty, turns = barriers(STAGES), barriers(STAGES), barriers(2)
    x_full, x_empty = barriers(2 * ROOMS), barriers(2 * ROOMS)
    fence_async_shared()
    first, last = share_of(tiles)
    factor = gl.load(a_inverse_ptr) * gl.load(b_inverse_ptr)
    gl.warp_specialize(
        [
            (add_partition, (
                y_desc, a_bufs, b_bufs, x_bufs, a_full, a_empty, b_full, b_empty, x_full, x_empty,
                turns, squares_ptr, factor, first, last, tiles_n, N, 0, WARPS, CHUNKS, STAGES,
                ROOMS, BM, BN,
            )),
            (add_partition, (
                y_desc, a_bufs, b_bufs, x_bufs, a_full, a_empty, b_full, b_empty, x_full, x_empty,
                turns, squares_ptr, factor, first, last, tiles_n, N, 1, WARPS, CHUNKS, STAGES,
                ROOMS, BM, BN,
            )),
            (load_partition, (
                a_desc, b_desc, None, a_bufs, b_bufs, None, a_full, a_empty, b_full, b_empty,
                None, None, first, last, tiles_n, CHUNKS, STAGES,
            )),
            (load_parts, (x_desc, x_bufs, x_full, x_empty, first, last, tiles_n, ROOMS)),
        ],
        [WARPS, 1, 1],
        [REGISTERS, 24, 24],
    )  # fmt: skip


@gluon.jit
def norm_partition(
    ys,  # (2 RING, ROWS, WIDTH)
    by_rows,  # (ROWS, WIDTH)
    by_cols,  # (WIDTH, ROWS)
    full,
    empty,
    squares_ptr,  # (C / 128, N)
    rstd_ptr,  # (N,)
    data_ptr,  # (N, C / 2)
    transposed_ptr,  # (C, N)
    amax_ptr,  # (1,)
    scale,
    blocks,
    units,
    N,
    PAIRS,
    DTYPE: gl.constexpr,
    EPS: gl.constexpr,
    RING: gl.constexpr,
    WARPS: gl.constexpr,
):
    ROWS: gl.constexpr = ys.shape[1]
    WIDTH: gl.constexpr = ys.shape[2]
    m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, PART))
    peaks = gl.zeros((ROWS, WIDTH // 2), gl.int32, PAIRS_OF_PART)
    at = 0
    for block in range(gl.program_id(0), blocks, gl.num_programs(0)):
        rows = block * ROWS + m
        squares = gl.zeros((ROWS,), gl.float32, gl.SliceLayout(1, PART))
        for tile in range(units):  # a tile of the product is as wide as a unit
            squares += gl.load(squares_ptr + tile.to(gl.int64) * N + rows)
        rstd = 1.0 / gl.sqrt(squares / (2 * PAIRS) + EPS)
        gl.store(rstd_ptr + rows, rstd)
        rstd = gl.expand_dims(rstd * scale, 1)
        for unit in range(units):
            slot = at % RING
            mbarrier.wait(full.index(slot), (at // RING) & 1)
            left, right = ys.index(2 * slot).load(PART), ys.index(2 * slot + 1).load(PART)
            left, peaks = cast_part(left.to(gl.float32) * rstd, peaks, DTYPE)
            right, peaks = cast_part(right.to(gl.float32) * rstd, peaks, DTYPE)
            stage_unit(left, right, by_rows, by_cols)
            mbarrier.arrive(empty.index(slot), count=1)
            row = block * ROWS
            write_unit(by_rows, by_cols, data_ptr, transposed_ptr, row, unit, N, PAIRS, WARPS)
            at += 1
    record_peak(peaks, scale, amax_ptr)


@gluon.jit
def residual_norm_kernel(
    y_desc,  # (N, C) bf16
    squares_ptr,  # (C / 128, N) fp32
    rstd_ptr,  # (N,) fp32 result
    data_ptr,  # (N, C / 2) int16 result
    transposed_ptr,  # (C, N) int8 result
    scale_ptr,  # (1,) fp32
    amax_ptr,  # (1,) int32
    N,
    PAIRS,  # C / 2
    DTYPE: gl.constexpr,
    EPS: gl.constexpr,
    RING: gl.constexpr,
    WARPS: gl.constexpr,
):
    ROWS: gl.constexpr = y_desc.block_type.shape[0]
    WIDTH: gl.constexpr = y_desc.block_type.shape[1]
    ys = gl.allocate_shared_memory(y_desc.dtype, [2 * RING, ROWS, WIDTH], y_desc.layout)
    by_rows, by_cols = rooms_of_unit(ROWS, WIDTH)
    full, empty = barriers(RING), barriers(RING)
    fence_async_shared()
    scale = gl.load(scale_ptr)
    blocks, units = N // ROWS, PAIRS // WIDTH
    gl.warp_specialize(
        [
            (norm_partition, (
                ys, by_rows, by_cols, full, empty, squares_ptr, rstd_ptr, data_ptr, transposed_ptr,
                amax_ptr, scale, blocks, units, N, PAIRS, DTYPE, EPS, RING, WARPS,
            )),
            (load_units, (y_desc, None, ys, full, empty, blocks, units, RING)),
        ],
        [1],
        [24],
    )  # fmt: skip


def linear_residual_norm_panel(
    a,  # (N, K) FP8
    b,  # (C, K) FP8
    inverse_scales,  # of a and b, each (1,) fp32
    x,  # (N, C) bf16
    y,  # (N, C) bf16 result
    rstd,  # (N,) fp32 result
    data,  # (N, C) FP8 result
    transposed,  # (C, N) FP8 result
    scale,  # (1,) fp32
    amax,  # (1,) int32
):
    """Launch both kernels; sizes are as kernels.common.panel.takes says."""
    (rows, terms), cols, device = a.shape, b.size(0), a.device
    programs, tiles = grid(device, rows, cols)
    tile = tile_of(OP, TILE, terms)
    squares = torch.empty(cols // BN, rows, dtype=torch.float32, device=device)
    add_panel_kernel[programs](
        described(a, [BM, BK]),
        described(b, [BN, BK]),
        in_parts(x),
        in_parts(y),
        *inverse_scales,
        squares,
        rows,
        cols // BN,
        tiles,
        ROOMS=rooms_beside(tile, terms),
        **launch_args(tile, terms),
    )
    units = gl.NVMMASharedLayout(128, 16, 2)
    residual_norm_kernel[(min(PROGRAMS * sm_count(device), rows // ROWS),)](
        GluonDescriptor.from_tensor(y, [ROWS, WIDTH], units),
        squares,
        rstd,
        data.view(torch.int16),
        transposed.view(torch.int8),
        scale,
        amax,
        rows,
        cols // 2,
        DTYPE=kind_of(data),
        EPS=RMS_NORM_EPS,
        RING=RING,
        WARPS=WARPS,
        num_warps=WARPS,
        maxnreg=REGISTERS,
    )
