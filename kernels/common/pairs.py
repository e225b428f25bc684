"""Tiles of a product cast to FP8 in pairs and stored in both layouts: an epilogue in Gluon.

The accumulator's layout keeps neighbouring columns in one thread. An epilogue casts them to FP8
together and moves them as one 16-bit number, so that no thread computes an element twice and
stmatrix, which knows no bytes, can store and transpose them. A thread's pairs are 4 s + t of each
eight, of lane t, with s of 0 and 1; in shared memory they lie as 2 t + s, where stmatrix expects a
thread's numbers, and each eight is put in order when it is read.
"""

import torch

from nanofuse.kernels.common.jit import HAS_GLUON, GluonDescriptor, gl, gluon

BM, BN = 128, 128  # of a tile

if HAS_GLUON:
    PUBLIC_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


def described_pairs(
    x,  # (M, N) FP8, row-major
):
    """The descriptor of x as int16 pairs of neighbours, in blocks of a tile."""
    layout = gl.NVMMASharedLayout(128, 16, 2)
    return GluonDescriptor.from_tensor(x.view(torch.int16), [BM, BN // 2], layout)


def _layouts(registers, high, rest, lanes, warps, shape):
    """The layouts for groups of four and of eight warps: which element each bit of a register's, a
    lane's and a warp's number adds. Bit `high` is a register's of four warps, a warp's of eight."""
    if not HAS_GLUON:
        return None, None
    layout = gl.DistributedLinearLayout
    return (
        gl.constexpr(layout([*registers, high, *rest], lanes, warps, [], shape)),
        gl.constexpr(layout([*registers, *rest], lanes, [*warps, high], [], shape)),
    )


def _of_accumulator(pairs, register, lanes):
    """Of (BM, pairs) pairs as the accumulator's threads have them."""
    rest = [[0, 8 << i] for i in range(6) if 8 << i < pairs]
    lanes = [*lanes, [1, 0], [2, 0], [4, 0]]
    return _layouts([register, [8, 0]], [64, 0], rest, lanes, [[16, 0], [32, 0]], [BM, pairs])


TILE_4, TILE_8 = _of_accumulator(BN // 2, [0, 1], [[0, 2], [0, 4]])  # 2 t + s
PART_4, PART_8 = _of_accumulator(BN // 8, [0, 1], [[0, 2], [0, 4]])
IN_PLACE_4, IN_PLACE_8 = _of_accumulator(BN // 2, [0, 4], [[0, 1], [0, 2]])  # 4 s + t
# of a transposed tile: a lane has 16 rows of a pair, and eight lanes 64 rows of two, in all banks
COLUMNS_4, COLUMNS_8 = _layouts(
    [[0, 1], [0, 2], [0, 4], [0, 8]],
    [16, 0],
    [[32, 0]],
    [[0, 16], [0, 32], [1, 0], [0, 64], [2, 0]],
    [[4, 0], [8, 0]],
    [BN // 2, BM],
)

if HAS_GLUON:  # of tiles of 32 rows, of which a lane has eight
    COLUMNS_32 = gl.constexpr(
        gl.DistributedLinearLayout(
            [[0, 1], [0, 2], [0, 4]],
            [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
            [[8, 0], [16, 0], [32, 0]],
            [],
            [BN // 2, 32],
        )
    )


@gluon.jit
def halves(x, ROWS: gl.constexpr, COLS: gl.constexpr):
    """The left and the right half of the columns; nothing moves."""
    return gl.split(gl.permute(gl.reshape(x, (ROWS, 2, COLS // 2)), (0, 2, 1)))


@gluon.jit
def quarters(x, ROWS: gl.constexpr, COLS: gl.constexpr):
    """Four times COLS / 4 columns, from the left; nothing moves."""
    left, right = halves(x, ROWS, COLS)
    x0, x1 = halves(left, ROWS, COLS // 2)
    x2, x3 = halves(right, ROWS, COLS // 2)
    return x0, x1, x2, x3


@gluon.jit
def beside(left, right, ROWS: gl.constexpr, COLS: gl.constexpr):
    """(ROWS, 2 COLS): the columns of one, then those of the other; nothing moves."""
    return gl.reshape(gl.permute(gl.join(left, right), (0, 2, 1)), (ROWS, 2 * COLS))


@gluon.jit
def whole(x0, x1, x2, x3, layout: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr):
    """(ROWS, COLS) of its quarters; nothing moves."""
    left, right = beside(x0, x1, ROWS, COLS // 4), beside(x2, x3, ROWS, COLS // 4)
    return gl.convert_layout(beside(left, right, ROWS, COLS // 2), layout)


@gluon.jit
def reordered(pairs, ROWS: gl.constexpr, COLS: gl.constexpr):
    """Pair 8 g + 4 s + t of each row as number 8 g + 2 t + s; nothing moves."""
    pairs = gl.permute(gl.reshape(pairs, (ROWS, COLS // 8, 2, 4)), (0, 1, 3, 2))
    return gl.reshape(pairs, (ROWS, COLS))


@gluon.jit
def neighbours(x, layout: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr):
    """The even columns and the odd ones, reordered, which a thread has together; nothing moves."""
    left, right = gl.split(gl.reshape(x, (ROWS, COLS // 2, 2)))
    left, right = reordered(left, ROWS, COLS // 2), reordered(right, ROWS, COLS // 2)
    return gl.convert_layout(left, layout), gl.convert_layout(right, layout)


if HAS_GLUON:
    # two pairs in 32 bits: of pairs in 16 bits half a tile came out stale (dev/LOG.md)
    CAST = """{{
        .reg .b16 first, second;
        cvt.rn.satfinite.{0}x2.f32 first, $3, $1;
        cvt.rn.satfinite.{0}x2.f32 second, $4, $2;
        mov.b32 $0, {{first, second}};
    }}"""
    TO_E4M3, TO_E5M2 = gl.constexpr(CAST.format("e4m3")), gl.constexpr(CAST.format("e5m2"))
    IN_ORDER = gl.constexpr(
        "prmt.b32 $0, $4, $5, 0x5410; prmt.b32 $1, $6, $7, 0x5410; "
        "prmt.b32 $2, $4, $5, 0x7632; prmt.b32 $3, $6, $7, 0x7632;"
    )
    PARTED = gl.constexpr("prmt.b32 $0, $2, $3, 0x6420; prmt.b32 $1, $2, $3, 0x7531;")


@gluon.jit
def cast_pairs(
    left,  # fp32 block
    right,  # of the same shape
    DTYPE: gl.constexpr,
):
    """int16: both in FP8 (saturated; NaN stays NaN), the left one in the low byte."""
    CAST: gl.constexpr = TO_E5M2 if DTYPE == gl.float8e5 else TO_E4M3
    return gl.inline_asm_elementwise(
        CAST, "=r,f,f,f,f", [left, right], dtype=gl.int16, is_pure=True, pack=2
    )


@gluon.jit
def seen_as(
    buf,  # shared memory
    DTYPE: gl.constexpr,
    SHAPE: gl.constexpr,
    layout: gl.constexpr,
):
    """The same bytes as another tensor."""
    if PUBLIC_REINTERPRET:
        return buf.reinterpret(DTYPE, SHAPE, layout)
    else:
        return buf._reinterpret(DTYPE, SHAPE, layout)


@gluon.jit
def scratch_of(BM: gl.constexpr, BN: gl.constexpr):
    """Room for a tile of FP8 pairs, for each group."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    return gl.allocate_shared_memory(gl.int16, [2, BM, BN // 2], layout)


@gluon.jit
def rows_of_pairs(
    scratch,  # as pairs were stored there
    data_ptr,  # (M, N / 2) int16
    row,  # first row of the tile
    pair,  # first pair of columns
    PAIRS,  # N / 2
    BM: gl.constexpr,
    BN: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Store a tile row-major, 16 bytes a lane and 128 of a line by eight of them."""
    by_rows: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    lines = gl.inline_asm_elementwise(
        IN_ORDER,
        "=&r,=&r,=&r,=r,r,r,r,r",
        [scratch.load(by_rows)],
        dtype=gl.int16,
        is_pure=True,
        pack=8,
    )
    m = gl.arange(0, BM, layout=gl.SliceLayout(1, by_rows))
    p = gl.arange(0, BN // 2, layout=gl.SliceLayout(0, by_rows))
    corner = data_ptr + (row.to(gl.int64) * PAIRS + pair)
    gl.store(corner + (m[:, None] * PAIRS + p[None, :]), lines)


@gluon.jit
def columns_of_pairs(
    turned,  # as pairs were stored there, transposed
    transposed_ptr,  # (N, M) int8
    row,  # first row of the tile
    pair,  # first pair of columns
    M,
    BM: gl.constexpr,
    BN: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Store a tile transposed."""
    by_cols: gl.constexpr = COLUMNS_32 if BM == 32 else COLUMNS_8 if WARPS == 8 else COLUMNS_4
    left, right = gl.inline_asm_elementwise(
        PARTED,
        "=&r,=r,r,r",
        [turned.load(by_cols)],
        dtype=(gl.int8, gl.int8),
        is_pure=True,
        pack=4,
    )
    p = gl.arange(0, BN // 2, layout=gl.SliceLayout(1, by_cols))
    p = (p & ~7) + ((p & 1) << 2) + ((p >> 1) & 3)
    m = gl.arange(0, BM, layout=gl.SliceLayout(0, by_cols))
    corner = transposed_ptr + (pair.to(gl.int64) * 2 * M + row)
    offsets = p.to(gl.int64)[:, None] * (2 * M) + m[None, :]
    gl.store(corner + offsets, left)
    gl.store(corner + M + offsets, right)


@gluon.jit
def store_pairs(
    pairs,  # (BM, BN / 2) int16: a tile in FP8, reordered
    data_ptr,  # (M, N / 2) int16
    transposed_ptr,  # (N, M) int8
    scratch,  # of this group
    row,  # first row of the tile
    pair,  # first pair of columns
    M,
    PAIRS,  # N / 2
    BM: gl.constexpr,
    BN: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Store a tile row-major and transposed, by way of the same memory."""
    scratch.store(pairs)
    rows_of_pairs(scratch, data_ptr, row, pair, PAIRS, BM, BN, WARPS)
    sides: gl.constexpr = gl.NVMMASharedLayout(64 if BM == 32 else 128, 16, 2)
    turned = seen_as(scratch, gl.int16, (BN // 2, BM), sides)
    turned.permute((1, 0)).store(pairs)
    columns_of_pairs(turned, transposed_ptr, row, pair, M, BM, BN, WARPS)
