"""The kernel of kernels/linear_rotary_qk_norm.py, for Hopper, in FP8, in Gluon.

A tile of the product is a head of 128 rows. Of a head's halves a thread of the accumulator has the
same columns, so that a rotation moves nothing; a head's sum of squares takes four lanes.
kernels/common/panel.py has the rest of what it is made of.
"""

from nanofuse.kernels.common.jit import HAS_GLUON, GluonDescriptor, gl, gluon, hopper, store_block
from nanofuse.kernels.common.pairs import BM, BN, halves
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
from nanofuse.kernels.common.rms_norm import RMS_NORM_EPS
from nanofuse.kernels.rotary_qk_norm_kernels import QK_GAIN, VALUE_GATE_SCALE

if HAS_GLUON:
    fence_async_shared, store_wait = hopper.fence_async_shared, hopper.tma.store_wait
    ANGLES = gl.constexpr("""{
        .reg .b16 cosine, sine;
        mov.b32 {cosine, sine}, $2;
        cvt.f32.f16 $0, cosine;
        cvt.f32.f16 $1, sine;
    }""")

OP = "linear_rotary_qk_norm"
TILE = PanelTile(warps=4)


@gluon.jit
def angles_of(
    packed,  # int32 block
):
    """fp32 cosines and sines of the two fp16 halves of int32."""
    return gl.inline_asm_elementwise(
        ANGLES, "=f,=f,r", [packed], dtype=(gl.float32, gl.float32), is_pure=True, pack=1
    )


@gluon.jit
def store_half(
    x,  # (BM, BN / 2) fp32
    desc,
    row,
    col,
    staged,
):
    """Store half a head by way of shared memory, once what lies there is stored."""
    store_wait(0)
    staged.store(x.to(gl.bfloat16))
    fence_async_shared()
    store_block(desc, [row, col], staged)


@gluon.jit
def rotary_partition(
    qkv_desc,
    a_bufs,
    b_bufs,
    a_full,
    a_empty,
    b_full,
    b_empty,
    turns,
    staged,
    rstd_ptr,
    angles_ptr,
    tokens_ptr,
    table_ptr,
    gate_ptr,
    factor,
    first,
    last,
    tiles_n,
    N,
    T,
    R,
    H,
    K,
    GAIN: gl.constexpr,
    GATE_SCALE: gl.constexpr,
    EPS: gl.constexpr,
    WHO: gl.constexpr,
    WARPS: gl.constexpr,
    CHUNKS: gl.constexpr,
    STAGES: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 32])
    HALF: gl.constexpr = BN // 2
    half: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HALF, 32])
    m = gl.arange(0, BM, layout=gl.SliceLayout(1, half))
    n = gl.arange(0, HALF, layout=gl.SliceLayout(0, half))
    first_row = first // tiles_n
    row, col = onwards(first_row, first % tiles_n, WHO, tiles_n)
    for number in range(WHO, last - first, 2):
        acc = tile_product(
            a_bufs, b_bufs, a_full, a_empty, b_full, b_empty, turns, number, row - first_row,
            tiles_n - 1 - col, WHO, CHUNKS, STAGES, BM, BN, layout,
        )  # fmt: skip
        x1, x2 = halves(acc, BM, BN)
        x1, x2 = gl.convert_layout(x1, half), gl.convert_layout(x2, half)
        rows = row * BM + m
        if col < H + K:
            squares = gl.sum(x1 * x1 + x2 * x2, axis=1) * (factor * factor)
            rstd = gl.rsqrt(squares / BN + EPS)
            gl.store(rstd_ptr + col.to(gl.int64) * N + rows, rstd)
            packed = gl.load(angles_ptr + ((rows % T)[:, None] * HALF + n[None, :]))
            cos, sin = angles_of(packed)
            gain = (rstd * (GAIN * factor))[:, None]
            y1 = (x1 * cos + x2 * sin) * gain
            y2 = (x2 * cos - x1 * sin) * gain
        elif table_ptr is not None:
            head = col - (H + K)
            token = gl.load(tokens_ptr + rows).to(gl.int64)
            known = (token >= 0) & (token < R)
            gate = gl.load(gate_ptr + (rows.to(gl.int64) * K + head)).to(gl.float32)
            scale = gl.where(known, GATE_SCALE / (1.0 + gl.exp(-gate)), float("nan"))[:, None]
            e_ptr = table_ptr + (gl.where(known, token, 0) * K + head)[:, None] * BN + n[None, :]
            y1 = x1 * factor + scale * gl.load(e_ptr).to(gl.float32)
            y2 = x2 * factor + scale * gl.load(e_ptr + HALF).to(gl.float32)
        else:
            y1, y2 = x1 * factor, x2 * factor
        store_half(y1, qkv_desc, row * BM, col * BN, staged)
        store_half(y2, qkv_desc, row * BM, col * BN + HALF, staged)
        row, col = onwards(row, col, 2, tiles_n)
    store_wait(0)


@gluon.jit
def rotary_panel_kernel(
    a_desc,  # (N, C) FP8
    b_desc,  # ((H + 2K) BN, C) FP8
    qkv_desc,  # (N, (H + 2K) BN) bf16 result, in blocks of BM x BN / 2
    a_inverse_ptr,  # (1,) fp32
    b_inverse_ptr,  # (1,) fp32
    rstd_ptr,  # (H + K, N) fp32 result
    angles_ptr,  # (T, BN / 2) int32: a cosine and a sine in fp16
    tokens_ptr,  # (N,), or None
    table_ptr,  # (R, K BN), or None
    gate_ptr,  # (N, K), or None
    N,
    T,
    R,
    H,
    K,
    tiles,
    GAIN: gl.constexpr,
    GATE_SCALE: gl.constexpr,
    EPS: gl.constexpr,
    WARPS: gl.constexpr,
    REGISTERS: gl.constexpr,
    CHUNKS: gl.constexpr,
    HELD: gl.constexpr,
    STAGES: gl.constexpr,
):
    BM: gl.constexpr = a_desc.block_type.shape[0]
    BN: gl.constexpr = b_desc.block_type.shape[0]
    a_bufs, b_bufs = rooms_of_panel(a_desc, b_desc, CHUNKS, HELD, STAGES)
    staged = gl.allocate_shared_memory(qkv_desc.dtype, [2, BM, BN // 2], qkv_desc.layout)
    a_full, a_empty = barriers(HELD), barriers(1, 2)
    b_full, b_empty, turns = barriers(STAGES), barriers(STAGES), barriers(2)
    fence_async_shared()
    first, last = share_of(tiles)
    tiles_n = H + 2 * K
    factor = gl.load(a_inverse_ptr) * gl.load(b_inverse_ptr)
    gl.warp_specialize(
        [
            (rotary_partition, (
                qkv_desc, a_bufs, b_bufs, a_full, a_empty, b_full, b_empty, turns, staged.index(0),
                rstd_ptr, angles_ptr, tokens_ptr, table_ptr, gate_ptr, factor, first, last,
                tiles_n, N, T, R, H, K, GAIN, GATE_SCALE, EPS, 0, WARPS, CHUNKS, STAGES, BM, BN,
            )),
            (rotary_partition, (
                qkv_desc, a_bufs, b_bufs, a_full, a_empty, b_full, b_empty, turns, staged.index(1),
                rstd_ptr, angles_ptr, tokens_ptr, table_ptr, gate_ptr, factor, first, last,
                tiles_n, N, T, R, H, K, GAIN, GATE_SCALE, EPS, 1, WARPS, CHUNKS, STAGES, BM, BN,
            )),
            (load_partition, (
                a_desc, b_desc, None, a_bufs, b_bufs, None, a_full, a_empty, b_full, b_empty,
                None, None, first, last, tiles_n, CHUNKS, STAGES,
            )),
        ],
        [WARPS, 1],
        [REGISTERS, 24],
    )  # fmt: skip


def linear_rotary_qk_norm_panel(
    x,  # (N, C) FP8
    w,  # ((H + 2K)*D, C) FP8
    inverse_scales,  # of x and w, each (1,) fp32
    qkv,  # (N, (H + 2K)*D) bf16 result
    rstd,  # (H + K, N) fp32 result
    angles,  # (T, D / 2) int32
    tokens,  # (N,) integer, or None
    table,  # (R, K*D), or None
    gate,  # (N, K), or None
    num_heads,
    kv_heads,
):
    """Launch the kernel; sizes are as kernels.linear_rotary_qk_norm.takes says."""
    (rows, terms), cols = x.shape, w.size(0)
    programs, tiles = grid(x.device, rows, cols)
    layout = gl.NVMMASharedLayout(128, 16, 2)
    rotary_panel_kernel[programs](
        described(x, [BM, BK]),
        described(w, [BN, BK]),
        GluonDescriptor.from_tensor(qkv, [BM, BN // 2], layout),
        *inverse_scales,
        rstd,
        angles,
        tokens,
        table,
        gate,
        rows,
        len(angles),
        0 if table is None else table.size(0),
        num_heads,
        kv_heads,
        tiles,
        GAIN=QK_GAIN,
        GATE_SCALE=VALUE_GATE_SCALE,
        EPS=RMS_NORM_EPS,
        **launch_args(tile_of(OP, TILE, terms), terms),
    )
