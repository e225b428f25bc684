"""A quarter of a tile at a time, between memory and a product's epilogue, in Gluon.

An epilogue that reads a bf16 matrix of its result's sizes has rooms in shared memory for each group
of warps (kernels/common/panel.py), of BM rows and BN / 4 columns. A part arrives there by TMA, is
read, and what replaces it leaves from there by TMA; then its room is free.
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
from nanofuse.kernels.common.panel import BK

MEMORY = 226 * 2**10  # bytes of what a panel keeps in shared memory, beside barriers

if HAS_GLUON:
    fence_async_shared, mbarrier = hopper.fence_async_shared, hopper.mbarrier
    store_wait = hopper.tma.store_wait


def rooms_beside(terms, stages):
    """Rooms of a group that fit beside a panel and b's stages: three, in which parts arrive, are
    read and leave, or two, as a part is waited for while the one before leaves.

    Raises:
        ValueError: fewer fit.
    """
    left = MEMORY - BM * terms - stages * BN * BK
    rooms = min(3, left // (2 * 2 * BM * BN // 4))
    if rooms < 2:
        raise ValueError(f"{stages} stages leave too little beside a panel of {terms} terms")
    return rooms


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
def load_part(desc, bufs, full, empty, row, col, number, i, ROOMS: gl.constexpr):
    """Load a tile's part i, once its room is free; `number` is the tile's among the program's."""
    BM: gl.constexpr = desc.block_type.shape[0]
    PART: gl.constexpr = desc.block_type.shape[1]
    at = 4 * (number // 2) + i
    room = (number & 1) * ROOMS + at % ROOMS
    mbarrier.wait(empty.index(room), ((at // ROOMS) & 1) ^ 1)
    mbarrier.expect(full.index(room), 2 * BM * PART)
    load_block(desc, [row * BM, (4 * col + i) * PART], full.index(room), bufs.index(room))


@gluon.jit
def part_of(bufs, full, turn, i, WHO: gl.constexpr, ROOMS: gl.constexpr, layout: gl.constexpr):
    """Part i, (BM, BN / 4) bf16, of what was loaded for the tile of group WHO's `turn`."""
    at = 4 * turn + i
    room = WHO * ROOMS + at % ROOMS
    mbarrier.wait(full.index(room), (at // ROOMS) & 1)
    return bufs.index(room).load(layout)


@gluon.jit
def replace_part(x, desc, bufs, empty, row, col, turn, i, WHO: gl.constexpr, ROOMS: gl.constexpr):
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
