"""FP8 products with an epilogue, for Hopper, in Gluon.

    a b^T          a (M, K), b (N, K), both FP8 and row-major, K at most MOST_TERMS

Gluon is Triton's lower language: layouts, shared memory and the roles of warps are written out. A
program keeps a panel of BM rows of a in shared memory and walks along b's rows, so that of each
tile b's parts alone are loaded: half of what a tile of another product reads. Parts of a that find
no room in the panel come with b's, anew for each tile, spread evenly among the others; from some K
on other kernels are faster. One warp loads, and a second one what some epilogues read
(kernels/common/parts.py). Two groups of four or eight warps take tiles in turn: one multiplies
while the other is in its epilogue (kernels/common/pairs.py).

Barriers. A wait for a parity passes from the end of a phase of that parity to the end of the next
one, so who waits may not be two phases away:

    a_full             of each part that the panel holds
    a_empty            one; either group arrives behind the product of its last tile of the panel
    b_full, b_empty    of the stages of b's parts, and of a's others, in the order of tiles
    y_full, y_empty    of each group's tile of what the epilogue reads; its room is the epilogue's
    turns              of each group, to wait for b's parts: the other one has all of its own
"""

from dataclasses import dataclass, replace

from nanofuse.kernels.common.fp8 import E4M3, E5M2
from nanofuse.kernels.common.jit import HAS_GLUON, GluonDescriptor, gl, gluon, hopper, load_block
from nanofuse.kernels.common.pairs import BM, BN, seen_as
from nanofuse.kernels.common.ptx import INTERPRETED
from nanofuse.kernels.common.tuning import capability, is_forced, sm_count, tuned

if HAS_GLUON:
    mbarrier = hopper.mbarrier
    warpgroup_mma, warpgroup_mma_wait = hopper.warpgroup_mma, hopper.warpgroup_mma_wait

BK = 128  # of a part of the inner dimension
PARTS = 12  # of a panel and of stages, beside the room of an epilogue
MOST_TERMS = 2048
LONG_STAGES = 6  # by default, where a panel does not hold all of a
# of a thread, by a group's warps: before the groups take what the warp that loads gives back, and
# after, at least
REGISTERS = {4: (168, 232), 8: (96, 112)}


@dataclass(frozen=True)
class PanelTile:
    """Warps of a group, 4 or 8, and the stages of b's parts, three or more. The more there are, the
    fewer parts of a long K a panel holds; where others come anew, six are the fastest up to K =
    1,664, and three a third slower (H200)."""

    warps: int
    stages: int = 4


def takes(op, device, rows, cols, terms, most=MOST_TERMS):
    """Whether a product of rows x cols with so many terms, at most `most`, runs here: not where a
    configuration of `op`, which is of its other kernel, is forced."""
    return (
        HAS_GLUON
        and not INTERPRETED.value
        and not is_forced(op)
        and capability(device) == (9, 0)
        and not (rows % BM or cols % BN or terms % BK)
        and rows > 0
        and cols > BN
        and BK < terms <= most
    )


def kind_of(
    x,  # FP8 tensor
):
    """Gluon's name of its dtype."""
    return {E4M3: gl.float8e4nv, E5M2: gl.float8e5}[x.dtype]


def described(
    x,  # FP8 matrix
    block,
):
    """The descriptor of x in blocks, laid out as the tensor cores read them."""
    layout = gl.NVMMASharedLayout.get_default_for(block, kind_of(x))
    return GluonDescriptor.from_tensor(x, block, layout)


def grid(device, rows, cols):
    """Programs of a product, and its tiles."""
    tiles = (rows // BM) * (cols // BN)
    return (min(sm_count(device), tiles),), tiles


def tile_of(
    op,
    default,  # PanelTile
    terms,
):
    """The PanelTile of `op` for so many terms: the tuned one, else the default, with more stages
    where parts of a come anew."""
    if held_parts(default, terms) * BK < terms:
        default = replace(default, stages=LONG_STAGES)
    return tuned(op, default, terms)


def held_parts(
    config,  # PanelTile
    terms,
):
    """Parts of a that a panel holds."""
    return min(terms // BK, PARTS - config.stages)


def launch_args(
    config,  # PanelTile
    terms,
):
    """The keywords that a configuration gives to a kernel's launch."""
    before, after = REGISTERS[config.warps]
    return {
        "WARPS": config.warps,
        "REGISTERS": after,
        "CHUNKS": terms // BK,
        "HELD": held_parts(config, terms),
        "STAGES": config.stages,
        "num_warps": config.warps,
        "maxnreg": before,
    }


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr = 1):
    """COUNT barriers, each of whose phases ends with so many arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def share_of(tiles):
    """First tile of this program, and the one after its last: adjacent ones, row after row."""
    programs, me = gl.num_programs(0), gl.program_id(0)
    first = (me.to(gl.int64) * tiles // programs).to(gl.int32)
    return first, ((me + 1).to(gl.int64) * tiles // programs).to(gl.int32)


@gluon.jit
def onwards(row, col, steps, tiles_n):
    """Row and column of a tile so many further, fewer than two rows."""
    col += steps
    wraps = col >= tiles_n
    return gl.where(wraps, row + 1, row), gl.where(wraps, col - tiles_n, col)


@gluon.jit
def rooms_of_panel(
    a_desc, b_desc, CHUNKS: gl.constexpr, HELD: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Shared memory of the parts that the panel holds, (HELD, BM, BK), and of the stages, (STAGES,
    BN, BK). Where parts of a come there, too, both are all of it, in a's type and in b's, first the
    panel."""
    BM: gl.constexpr = a_desc.block_type.shape[0]
    BK: gl.constexpr = a_desc.block_type.shape[1]
    BN: gl.constexpr = b_desc.block_type.shape[0]
    of_a: gl.constexpr = a_desc.layout
    if HELD == CHUNKS:
        a_bufs = gl.allocate_shared_memory(a_desc.dtype, [HELD, BM, BK], of_a)
        return a_bufs, gl.allocate_shared_memory(b_desc.dtype, [STAGES, BN, BK], b_desc.layout)
    else:
        gl.static_assert(BM == BN)
        # two parts that come anew, one behind the other, take four stages
        gl.static_assert(STAGES > 3 or (STAGES == 3 and 2 * HELD >= CHUNKS))
        both = gl.allocate_shared_memory(b_desc.dtype, [HELD + STAGES, BN, BK], b_desc.layout)
        return seen_as(both, a_desc.dtype, (HELD + STAGES, BM, BK), of_a), both


@gluon.jit
def load_partition(
    a_desc,  # (M, K) in blocks of BM x BK
    b_desc,  # (N, K) in blocks of BN x BK
    y_desc,  # (M, N / 2) int16 in blocks of BM x BN / 2: what the epilogue reads, or None
    a_bufs,  # of rooms_of_panel
    b_bufs,
    y_bufs,  # (2, BM, BN / 2), one for each group, or None
    a_full,
    a_empty,
    b_full,
    b_empty,
    y_full,
    y_empty,
    first,
    last,
    tiles_n,
    CHUNKS: gl.constexpr,
    STAGES: gl.constexpr,
):
    BM: gl.constexpr = a_desc.block_type.shape[0]
    BK: gl.constexpr = a_desc.block_type.shape[1]
    BN: gl.constexpr = b_desc.block_type.shape[0]
    STREAMED: gl.constexpr = CHUNKS - a_full.shape[0]
    FIRST: gl.constexpr = b_bufs.shape[0] - STAGES
    first_row = first // tiles_n
    row, col = first_row, first % tiles_n
    for tile in range(first, last):
        opens = (tile == first) | (col == 0)  # a panel
        mbarrier.wait(a_empty.index(0), ((row - first_row) & 1) ^ 1, pred=opens)
        for k in range(CHUNKS):
            streamed = k * STREAMED // CHUNKS  # of the parts before this one
            streams = (k + 1) * STREAMED // CHUNKS > streamed
            held, holds = k - streamed, opens & (streams == 0)
            at_a, at_b = [row * BM, k * BK], [col * BN, k * BK]
            mbarrier.expect(a_full.index(held), BM * BK, pred=holds)
            load_block(a_desc, at_a, a_full.index(held), a_bufs.index(held), pred=holds)
            at = (tile - first) * (CHUNKS + STREAMED) + k + streamed
            stage = at % STAGES
            mbarrier.wait(b_empty.index(stage), ((at // STAGES) & 1) ^ 1)
            mbarrier.expect(b_full.index(stage), BN * BK)
            load_block(b_desc, at_b, b_full.index(stage), b_bufs.index(FIRST + stage))
            if STREAMED > 0:
                stage, phase = (at + 1) % STAGES, (at + 1) // STAGES
                room = a_bufs.index(FIRST + stage)
                mbarrier.wait(b_empty.index(stage), (phase & 1) ^ 1, pred=streams)
                mbarrier.expect(b_full.index(stage), BM * BK, pred=streams)
                load_block(a_desc, at_a, b_full.index(stage), room, pred=streams)
        if y_desc is not None:  # after b's parts, which wait for less
            who, times = (tile - first) & 1, (tile - first) // 2
            mbarrier.wait(y_empty.index(who), (times & 1) ^ 1)
            mbarrier.expect(y_full.index(who), BM * BN)
            load_block(y_desc, [row * BM, col * (BN // 2)], y_full.index(who), y_bufs.index(who))
        row, col = onwards(row, col, 1, tiles_n)


@gluon.jit
def tile_product(
    a_bufs,
    b_bufs,
    a_full,
    a_empty,
    b_full,
    b_empty,
    turns,
    number,  # of the tile among the program's
    panel,  # of the tile, likewise
    after,  # how many tiles of its panel follow
    WHO: gl.constexpr,
    CHUNKS: gl.constexpr,
    STAGES: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    layout: gl.constexpr,
):
    """(BM, BN) fp32: the tile's product, by group WHO."""
    STREAMED: gl.constexpr = CHUNKS - a_full.shape[0]
    FIRST: gl.constexpr = b_bufs.shape[0] - STAGES
    mbarrier.wait(turns.index(WHO), (number // 2 + WHO + 1) & 1, pred=number > 0)
    acc = gl.zeros((BM, BN), gl.float32, layout)
    for k in range(CHUNKS):
        streamed = k * STREAMED // CHUNKS  # of the parts before this one
        streams = (k + 1) * STREAMED // CHUNKS > streamed
        at = number * (CHUNKS + STREAMED) + (k + streamed)
        stage, room = at % STAGES, k - streamed
        mbarrier.wait(a_full.index(room), panel & 1, pred=streams == 0)
        mbarrier.wait(b_full.index(stage), (at // STAGES) & 1)
        if STREAMED > 0:
            other, phase = (at + 1) % STAGES, (at + 1) // STAGES
            mbarrier.wait(b_full.index(other), phase & 1, pred=streams)
            room = gl.where(streams, FIRST + other, room)
        b = b_bufs.index(FIRST + stage).permute((1, 0))
        acc = warpgroup_mma(a_bufs.index(room), b, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(b_empty.index((at + STAGES - 1) % STAGES), count=1, pred=k > 0)
        if STREAMED > 0:
            before = streamed > (k - 1) * STREAMED // CHUNKS  # the part before was streamed
            pred = before & (k > 0)
            mbarrier.arrive(b_empty.index((at + STAGES - 2) % STAGES), count=1, pred=pred)
    mbarrier.arrive(turns.index(1 - WHO), count=1)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    last = (number + 1) * (CHUNKS + STREAMED) - 1
    mbarrier.arrive(b_empty.index(last % STAGES), count=1)
    if STREAMED > 0:  # the last part was
        mbarrier.arrive(b_empty.index((last - 1) % STAGES), count=1)
    if after < 2:  # no tile of this panel is left for this group
        mbarrier.arrive(a_empty.index(0), count=1)
        if (after == 0) & (number == 0):  # nor was there one for the other group
            mbarrier.arrive(a_empty.index(0), count=1)
    return acc
