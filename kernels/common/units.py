"""Matrices in units of 32 rows and 128 columns, read by TMA and cast to FP8: parts of kernels in
Gluon for what is no product.

A unit is two parts of ROWS x WIDTH bf16 numbers. One warp loads units into a ring, as far ahead as
it reaches, whatever the others do. kernels/common/pairs.py casts, and says what a pair is.

A slot is given back once what was read of it has been stored elsewhere, never right behind the
read: a barrier between warps does not wait for reads of shared memory that are under way, and TMA
overwrites what these have not fetched yet.
"""

from nanofuse.kernels.common.jit import HAS_GLUON, gl, gluon, hopper, load_block
from nanofuse.kernels.common.pairs import (
    beside,
    cast_pairs,
    columns_of_pairs,
    neighbours,
    rows_of_pairs,
)

ROWS = 32  # of a unit
WIDTH = 64  # columns of a part, of which a unit has two

if HAS_GLUON:
    mbarrier = hopper.mbarrier
    TO_BF16 = gl.constexpr("cvt.rn.bf16x2.f32 $0, $2, $1;")

    def _of_part(register, columns, warps, width):
        lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
        warps = [[16, 0], *([0, x] for x in warps)]
        layout = gl.DistributedLinearLayout
        return gl.constexpr(layout([[0, 1], register, *columns], lanes, warps, [], [32, width]))

    # which element each bit of a register's, a lane's and a warp's number adds
    PART = _of_part([8, 0], [[0, 8]], [16, 32], 64)  # of bf16, as ldmatrix gives it
    PAIRS_OF_PART = _of_part([8, 0], [], [8, 16], 32)  # kernels/common/pairs.py
    PAIRS_OF_UNIT = _of_part([8, 0], [[0, 32]], [8, 16], 64)
else:
    PART = PAIRS_OF_PART = PAIRS_OF_UNIT = None


@gluon.jit
def rounded(
    x,  # fp32 block
):
    """x in bf16, two numbers in one instruction."""
    return gl.inline_asm_elementwise(
        TO_BF16, "=r,f,f", [x], dtype=gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def magnitudes(
    x,  # fp32 block
):
    """The bits of |x|."""
    return x.to(gl.int32, bitcast=True) & 0x7FFFFFFF


@gluon.jit
def load_units(
    first_desc,  # (N, C) in parts of units
    second_desc,  # likewise, or None
    bufs,  # (2 or 4 RING, ROWS, WIDTH)
    full,
    empty,
    blocks,
    units,
    RING: gl.constexpr,
):
    """Load the units of one or two matrices, one after the other, as far as the ring reaches."""
    ROWS: gl.constexpr = first_desc.block_type.shape[0]
    WIDTH: gl.constexpr = first_desc.block_type.shape[1]
    PARTS: gl.constexpr = 2 if second_desc is None else 4
    at = 0
    for block in range(gl.program_id(0), blocks, gl.num_programs(0)):
        for unit in range(units):
            slot = at % RING
            mbarrier.wait(empty.index(slot), ((at // RING) & 1) ^ 1)
            mbarrier.expect(full.index(slot), 2 * PARTS * ROWS * WIDTH)
            for i in gl.static_range(2):
                where = [block * ROWS, (2 * unit + i) * WIDTH]
                load_block(first_desc, where, full.index(slot), bufs.index(PARTS * slot + i))
                if second_desc is not None:
                    at_second = PARTS * slot + 2 + i
                    load_block(second_desc, where, full.index(slot), bufs.index(at_second))
            at += 1


@gluon.jit
def cast_part(
    x,  # (ROWS, WIDTH) fp32, scaled
    peaks,  # int32 block
    DTYPE: gl.constexpr,
):
    """A part in FP8 pairs, and the largest magnitudes so far."""
    left, right = neighbours(x, PAIRS_OF_PART, x.shape[0], x.shape[1])
    peaks = gl.maximum(peaks, gl.maximum(magnitudes(left), magnitudes(right)))
    return cast_pairs(left, right, DTYPE), peaks


@gluon.jit
def stage_unit(
    left,  # (ROWS, WIDTH / 2) int16: FP8 pairs of a part
    right,  # of the part beside it
    by_rows,  # shared memory (ROWS, WIDTH)
    by_cols,  # shared memory (WIDTH, ROWS)
):
    """Put a unit into shared memory, both ways; `write_unit` takes it from there."""
    pairs = beside(left, right, left.shape[0], left.shape[1])
    pairs = gl.convert_layout(pairs, PAIRS_OF_UNIT)
    by_rows.store(pairs)
    by_cols.permute((1, 0)).store(pairs)


@gluon.jit
def write_unit(
    by_rows,  # shared memory (ROWS, WIDTH)
    by_cols,  # shared memory (WIDTH, ROWS)
    data_ptr,  # (N, PAIRS) int16
    transposed_ptr,  # (2 PAIRS, N) int8
    row,
    unit,
    N,
    PAIRS,
    WARPS: gl.constexpr,
):
    """Write a unit's two layouts."""
    ROWS: gl.constexpr = by_rows.shape[0]
    WIDTH: gl.constexpr = by_rows.shape[1]
    pair = unit * WIDTH
    rows_of_pairs(by_rows, data_ptr, row, pair, PAIRS, ROWS, 2 * WIDTH, WARPS)
    columns_of_pairs(by_cols, transposed_ptr, row, pair, N, ROWS, 2 * WIDTH, WARPS)


@gluon.jit
def rooms_of_unit(ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """Shared memory for a unit of FP8 pairs, by rows and by columns."""
    by_rows: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    by_cols: gl.constexpr = gl.NVMMASharedLayout(64, 16, 2)
    return (
        gl.allocate_shared_memory(gl.int16, [ROWS, WIDTH], by_rows),
        gl.allocate_shared_memory(gl.int16, [WIDTH, ROWS], by_cols),
    )


@gluon.jit
def record_peak(
    peaks,  # int32 block, of scaled numbers
    scale,
    amax_ptr,
):
    """Raise amax to the largest magnitude, as it was before it was scaled."""
    peak = gl.max(gl.max(peaks, axis=1), axis=0).to(gl.float32, bitcast=True) / scale
    gl.atomic_max(amax_ptr, peak.to(gl.int32, bitcast=True))
