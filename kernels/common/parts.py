"""A quarter of a tile at a time, between memory and a product's epilogue, in Gluon.

An epilogue that reads a bf16 matrix of its result's sizes has two or three rooms in shared memory
for each group of warps (kernels/common/panel.py). A part, of BM rows and BN / 4 columns, arrives
there by TMA, `part_of` reads it, and `replace_part` stores something in its place, which leaves by
TMA; when that is gone the room is free. `finish_parts` ends a tile.

Barriers, of each room: full, when a part is there, and empty, when what replaced it is gone. A
phase is one part, and a group's parts take its rooms in turn. One warp loads the parts of all tiles
in their order, so that those of one group wait behind the other's.
"""

from nanofuse.kernels.common.jit import (
    HAS_GLUON,
    GluonDescriptor,
    gl,
    gluon,
    hopper,
    load_block,
    store_block,
)
from nanofuse.kernels.common.pairs import BM, BN
from nanofuse.kernels.common.panel import BK, held_parts, onwards

MEMORY = 226 * 2**10  # bytes for panel, stages and rooms; the rest of 227 KiB is for barriers
ROOMS = 3  # at most: a part arrives, one is read, one leaves
PART_BYTES = 2 * BM * BN // 4
GROUPS = 2

if HAS_GLUON:
    fence_async_shared, mbarrier = hopper.fence_async_shared, hopper.mbarrier
    store_wait = hopper.tma.store_wait


def rooms_beside(tile, terms):
    """The rooms of a group that fit beside panel and stages, at least two.

    Args:
        tile: PanelTile.
        terms: of the product.
    """
    left = MEMORY - (held_parts(tile, terms) + tile.stages) * BN * BK
    return min(ROOMS, left // (GROUPS * PART_BYTES))


def in_parts(
    x,  # (N, C) bf16
):
    """The descriptor of x in parts."""
    return GluonDescriptor.from_tensor(x, [BM, BN // 4], gl.NVMMASharedLayout(64, 16, 2))


@gluon.jit
def rooms_of_parts(desc, ROOMS: gl.constexpr):
    """Shared memory for the parts of both groups."""
    BM: gl.constexpr = desc.block_type.shape[0]
    PART: gl.constexpr = desc.block_type.shape[1]
    return gl.allocate_shared_memory(desc.dtype, [2 * ROOMS, BM, PART], desc.layout)


@gluon.jit
def load_parts(
    desc,  # (N, C) in parts
    bufs,  # (2 ROOMS, BM, BN / 4)
    full,
    empty,
    first,
    last,
    tiles_n,
    ROOMS: gl.constexpr,
):
    """Load the parts of all tiles, for either group as far as its rooms reach."""
    BM: gl.constexpr = desc.block_type.shape[0]
    PART: gl.constexpr = desc.block_type.shape[1]
    row, col = first // tiles_n, first % tiles_n
    for number in range(last - first):
        for i in range(4):
            at = 4 * (number // 2) + i
            room = (number & 1) * ROOMS + at % ROOMS
            mbarrier.wait(empty.index(room), ((at // ROOMS) & 1) ^ 1)
            mbarrier.expect(full.index(room), 2 * BM * PART)
            where = [row * BM, (4 * col + i) * PART]
            load_block(desc, where, full.index(room), bufs.index(room))
        row, col = onwards(row, col, 1, tiles_n)


@gluon.jit
def part_of(
    bufs,  # (2 ROOMS, BM, BN / 4)
    full,
    turn,
    i,
    WHO: gl.constexpr,
    ROOMS: gl.constexpr,
    layout: gl.constexpr,
):
    """Part i, (BM, BN / 4) bf16, of what was loaded for the tile of group WHO's `turn`."""
    at = 4 * turn + i
    room = WHO * ROOMS + at % ROOMS
    mbarrier.wait(full.index(room), (at // ROOMS) & 1)
    return bufs.index(room).load(layout)


@gluon.jit
def replace_part(
    x,  # (BM, BN / 4) bf16
    desc,  # (N, C) in parts
    bufs,  # (2 ROOMS, BM, BN / 4)
    empty,
    row,
    col,
    turn,
    i,
    WHO: gl.constexpr,
    ROOMS: gl.constexpr,
):
    """Store x in place of what `part_of` gave, and free the room of the part before."""
    BM: gl.constexpr = desc.block_type.shape[0]
    PART: gl.constexpr = desc.block_type.shape[1]
    at = 4 * turn + i
    room = WHO * ROOMS + at % ROOMS
    bufs.index(room).store(x)
    fence_async_shared()
    store_block(desc, [row * BM, (4 * col + i) * PART], bufs.index(room))
    if i > 0:
        store_wait(1)  # of the part before
        mbarrier.arrive(empty.index(WHO * ROOMS + (at - 1) % ROOMS), count=1)


@gluon.jit
def finish_parts(empty, turn, WHO: gl.constexpr, ROOMS: gl.constexpr):
    """Free the room of a tile's last part."""
    store_wait(0)
    mbarrier.arrive(empty.index(WHO * ROOMS + (4 * turn + 3) % ROOMS), count=1)
