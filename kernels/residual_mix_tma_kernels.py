"""Kernels of kernels/residual_mix.py for Hopper, in FP8, in Gluon: backward, and the norm forward.

A program takes blocks of ROWS whole rows, whose units are loaded ahead (kernels/common/units.py).
Its warps walk along a block twice, once for the sums of its rows and once to write, and read memory
once.
"""

import torch

from nanofuse.kernels.common.jit import HAS_GLUON, GluonDescriptor, gl, gluon, hopper, store_block
from nanofuse.kernels.common.pairs import beside, store_pairs
from nanofuse.kernels.common.panel import barriers, kind_of
from nanofuse.kernels.common.ptx import INTERPRETED
from nanofuse.kernels.common.rms_norm import RMS_NORM_EPS
from nanofuse.kernels.common.tuning import capability, is_forced, sm_count
from nanofuse.kernels.common.units import (
    PAIRS_OF_PART,
    PAIRS_OF_UNIT,
    PART,
    ROWS,
    WIDTH,
    cast_part,
    load_units,
    record_peak,
    rounded,
)

if HAS_GLUON:
    fence_async_shared, mbarrier = hopper.fence_async_shared, hopper.mbarrier
    store_wait = hopper.tma.store_wait

# units in shared memory: of what is read twice and of what is read once, forward and backward
FWD_RING, FWD_SHORT = 16, 3
RING, SHORT = 12, 3
WARPS, REGISTERS = 8, 128


def takes(
    op,
    x,  # (N, C)
    *others,  # (N, C) each, or None
):
    """Whether a kernel here takes the matrices: not where one is None, nor where a configuration of
    `op`, which is of its other kernel, is forced."""
    rows, cols = x.shape
    return (
        HAS_GLUON
        and not INTERPRETED.value
        and not is_forced(op)
        and capability(x.device) == (9, 0)
        and all(t is not None and t.dtype == torch.bfloat16 for t in (x, *others))
        and not (rows % ROWS or cols % (2 * WIDTH))
        and rows > 0
        and cols <= 2 * WIDTH * RING
    )


@gluon.jit
def load_scalar(
    ptr,  # (1,), or None for 1
):
    if ptr is None:
        return 1.0
    else:
        return gl.load(ptr).to(gl.float32)


@gluon.jit
def bwd_partition(
    grad_desc, hy, gs, scratch, hy_full, hy_empty, g_full, g_empty, rstd_ptr, partial_ptr, data_ptr,
    transposed_ptr, amax_ptr, resid, stream_scale, scale, blocks, units, N, PAIRS,
    DTYPE: gl.constexpr, WITH_Y: gl.constexpr, RING: gl.constexpr, SHORT: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = grad_desc.block_type.shape[0]
    WIDTH: gl.constexpr = grad_desc.block_type.shape[1]
    m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, PART))
    peaks = gl.zeros((ROWS, WIDTH // 2), gl.int32, PAIRS_OF_PART)
    of_resid = gl.zeros((ROWS, WIDTH), gl.float32, PART)
    at = 0
    for block in range(gl.program_id(0), blocks, gl.num_programs(0)):
        row = block * ROWS
        rstd = gl.load(rstd_ptr + row + m)
        products = gl.zeros((ROWS, WIDTH), gl.float32, PART)
        for unit in range(units):
            slot = (at + unit) % RING
            mbarrier.wait(hy_full.index(slot), ((at + unit) // RING) & 1)
            for i in gl.static_range(2):
                h = hy.index(4 * slot + i).load(PART).to(gl.float32)
                products += h * hy.index(4 * slot + 2 + i).load(PART).to(gl.float32)
        y_scale = rstd * rstd * rstd * (gl.sum(products, axis=1) / (2 * PAIRS))
        for unit in range(units):
            slot, of_g = at % RING, at % SHORT
            mbarrier.wait(g_full.index(of_g), (at // SHORT) & 1)
            found = ()
            for i in gl.static_range(2):
                h = hy.index(4 * slot + i).load(PART).to(gl.float32)
                y = hy.index(4 * slot + 2 + i).load(PART).to(gl.float32)
                x = gs.index(2 * of_g + i).load(PART).to(gl.float32) * stream_scale
                x += h * gl.expand_dims(rstd, 1) - y * gl.expand_dims(y_scale, 1)
                if WITH_Y:
                    of_resid += x * y
                hy.index(4 * slot + i).store(rounded(x))
                pairs, peaks = cast_part(x * (resid * scale), peaks, DTYPE)
                found += (pairs,)
            fence_async_shared()
            for i in gl.static_range(2):
                store_block(grad_desc, [row, (2 * unit + i) * WIDTH], hy.index(4 * slot + i))
            mbarrier.arrive(g_empty.index(of_g), count=1)
            pairs = beside(found[0], found[1], ROWS, WIDTH // 2)
            store_pairs(
                gl.convert_layout(pairs, PAIRS_OF_UNIT), data_ptr, transposed_ptr, scratch, row,
                unit * WIDTH, N, PAIRS, ROWS, 2 * WIDTH, WARPS,
            )  # fmt: skip
            store_wait(0)
            mbarrier.arrive(hy_empty.index(slot), count=1)
            at += 1
    if WITH_Y:
        gl.store(partial_ptr + gl.program_id(0), gl.sum(gl.sum(of_resid, axis=1), axis=0))
    record_peak(peaks, scale, amax_ptr)


@gluon.jit(do_not_specialize_on_alignment=("stream_scale_ptr", "resid_ptr"))
def residual_mix_bwd_tma_kernel(
    h_desc,  # (N, C) bf16: gradient of normed
    y_desc,  # (N, C) bf16
    g_desc,  # (N, C) bf16: gradient of y from its other uses
    grad_desc,  # (N, C) bf16 result
    rstd_ptr,  # (N,) fp32
    stream_scale_ptr,  # (1,), or None
    resid_ptr,  # (1,), or None
    partial_ptr,  # (programs,) fp32: shares of sum(grad_y * y), or None
    data_ptr,  # (N, C / 2) int16 result
    transposed_ptr,  # (C, N) int8 result
    scale_ptr,  # (1,) fp32
    amax_ptr,  # (1,) int32
    N,
    PAIRS,  # C / 2
    DTYPE: gl.constexpr,
    RING: gl.constexpr,
    SHORT: gl.constexpr,
    WARPS: gl.constexpr,
):
    ROWS: gl.constexpr = h_desc.block_type.shape[0]
    WIDTH: gl.constexpr = h_desc.block_type.shape[1]
    WITH_Y: gl.constexpr = partial_ptr is not None
    hy = gl.allocate_shared_memory(h_desc.dtype, [4 * RING, ROWS, WIDTH], h_desc.layout)
    gs = gl.allocate_shared_memory(g_desc.dtype, [2 * SHORT, ROWS, WIDTH], g_desc.layout)
    scratch = gl.allocate_shared_memory(gl.int16, [ROWS, WIDTH], gl.NVMMASharedLayout(128, 16, 2))
    hy_full, hy_empty, g_full, g_empty = (
        barriers(RING), barriers(RING), barriers(SHORT), barriers(SHORT),
    )  # fmt: skip
    fence_async_shared()
    scale, resid, stream_scale = (
        gl.load(scale_ptr), load_scalar(resid_ptr), load_scalar(stream_scale_ptr),
    )  # fmt: skip
    blocks, units = N // ROWS, PAIRS // WIDTH
    gl.warp_specialize(
        [
            (bwd_partition, (
                grad_desc, hy, gs, scratch, hy_full, hy_empty, g_full, g_empty, rstd_ptr,
                partial_ptr, data_ptr, transposed_ptr, amax_ptr, resid, stream_scale, scale, blocks,
                units, N, PAIRS, DTYPE, WITH_Y, RING, SHORT, WARPS,
            )),
            (load_units, (h_desc, y_desc, hy, hy_full, hy_empty, blocks, units, RING)),
            (load_units, (g_desc, None, gs, g_full, g_empty, blocks, units, SHORT)),
        ],
        [1, 1],
        [24, 24],
    )  # fmt: skip


@gluon.jit
def fwd_partition(
    y_desc, xs, bs, scratch, x_full, x_empty, b_full, b_empty, rstd_ptr, data_ptr, transposed_ptr,
    amax_ptr, scale, blocks, units, N, PAIRS,
    DTYPE: gl.constexpr, EPS: gl.constexpr, RING: gl.constexpr, SHORT: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = y_desc.block_type.shape[0]
    WIDTH: gl.constexpr = y_desc.block_type.shape[1]
    m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, PART))
    peaks = gl.zeros((ROWS, WIDTH // 2), gl.int32, PAIRS_OF_PART)
    at = 0
    for block in range(gl.program_id(0), blocks, gl.num_programs(0)):
        row = block * ROWS
        squares = gl.zeros((ROWS, WIDTH), gl.float32, PART)
        for unit in range(units):
            slot, of_b = (at + unit) % RING, (at + unit) % SHORT
            mbarrier.wait(x_full.index(slot), ((at + unit) // RING) & 1)
            mbarrier.wait(b_full.index(of_b), ((at + unit) // SHORT) & 1)
            for i in gl.static_range(2):
                y = xs.index(2 * slot + i).load(PART).to(gl.float32)
                y = rounded(y + bs.index(2 * of_b + i).load(PART).to(gl.float32))
                xs.index(2 * slot + i).store(y)
                squares += y.to(gl.float32) * y.to(gl.float32)
            fence_async_shared()
            for i in gl.static_range(2):
                store_block(y_desc, [row, (2 * unit + i) * WIDTH], xs.index(2 * slot + i))
            mbarrier.arrive(b_empty.index(of_b), count=1)
        rstd = 1.0 / gl.sqrt(gl.sum(squares, axis=1) / (2 * PAIRS) + EPS)
        gl.store(rstd_ptr + row + m, rstd)
        rstd = gl.expand_dims(rstd * scale, 1)
        store_wait(0)
        for unit in range(units):
            slot = at % RING
            found = ()
            for i in gl.static_range(2):
                y = xs.index(2 * slot + i).load(PART).to(gl.float32) * rstd
                pairs, peaks = cast_part(y, peaks, DTYPE)
                found += (pairs,)
            pairs = beside(found[0], found[1], ROWS, WIDTH // 2)
            store_pairs(
                gl.convert_layout(pairs, PAIRS_OF_UNIT), data_ptr, transposed_ptr, scratch, row,
                unit * WIDTH, N, PAIRS, ROWS, 2 * WIDTH, WARPS,
            )  # fmt: skip
            mbarrier.arrive(x_empty.index(slot), count=1)
            at += 1
    record_peak(peaks, scale, amax_ptr)


@gluon.jit
def residual_norm_fwd_tma_kernel(
    x_desc,  # (N, C) bf16
    branch_desc,  # (N, C) bf16
    y_desc,  # (N, C) bf16 result
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
    SHORT: gl.constexpr,
    WARPS: gl.constexpr,
):
    ROWS: gl.constexpr = x_desc.block_type.shape[0]
    WIDTH: gl.constexpr = x_desc.block_type.shape[1]
    xs = gl.allocate_shared_memory(x_desc.dtype, [2 * RING, ROWS, WIDTH], x_desc.layout)
    bs = gl.allocate_shared_memory(x_desc.dtype, [2 * SHORT, ROWS, WIDTH], x_desc.layout)
    scratch = gl.allocate_shared_memory(gl.int16, [ROWS, WIDTH], gl.NVMMASharedLayout(128, 16, 2))
    x_full, x_empty, b_full, b_empty = (
        barriers(RING), barriers(RING), barriers(SHORT), barriers(SHORT),
    )  # fmt: skip
    fence_async_shared()
    scale = gl.load(scale_ptr)
    blocks, units = N // ROWS, PAIRS // WIDTH
    gl.warp_specialize(
        [
            (fwd_partition, (
                y_desc, xs, bs, scratch, x_full, x_empty, b_full, b_empty, rstd_ptr, data_ptr,
                transposed_ptr, amax_ptr, scale, blocks, units, N, PAIRS, DTYPE, EPS, RING, SHORT,
                WARPS,
            )),
            (load_units, (x_desc, None, xs, x_full, x_empty, blocks, units, RING)),
            (load_units, (branch_desc, None, bs, b_full, b_empty, blocks, units, SHORT)),
        ],
        [1, 1],
        [24, 24],
    )  # fmt: skip


def launch_args(
    matrices,  # (N, C) bf16 each
    data,  # (N, C) FP8
):
    """Programs, descriptors of the matrices, and what both kernels' launches end with."""
    rows, cols = data.shape
    layout = gl.NVMMASharedLayout(128, 16, 2)
    descriptors = (GluonDescriptor.from_tensor(x, [ROWS, WIDTH], layout) for x in matrices)
    options = {"DTYPE": kind_of(data), "WARPS": WARPS, "num_warps": WARPS, "maxnreg": REGISTERS}
    return min(sm_count(data.device), rows // ROWS), descriptors, (rows, cols // 2), options


def residual_norm_fwd_tma(
    x,  # (N, C)
    branch,  # (N, C)
    y,  # (N, C) result
    rstd,  # (N,) fp32 result
    data,  # (N, C) FP8 result
    transposed,  # (C, N) FP8 result
    scale,  # (1,) fp32
    amax,  # (1,) int32
):
    """Launch the forward kernel."""
    programs, descriptors, sizes, options = launch_args((x, branch, y), data)
    residual_norm_fwd_tma_kernel[(programs,)](
        *descriptors,
        rstd,
        data.view(torch.int16),
        transposed.view(torch.int8),
        scale,
        amax,
        *sizes,
        EPS=RMS_NORM_EPS,
        RING=FWD_RING,
        SHORT=FWD_SHORT,
        **options,
    )


def residual_mix_bwd_tma(
    grad_normed,  # (N, C)
    y,  # (N, C)
    rstd,  # (N,) fp32
    grad_stream,  # (N, C)
    stream_scale,  # (1,), or None
    resid_lambda,  # (1,), or None
    grad_y,  # (N, C) result
    with_y,  # whether sum(grad_y * y) is wanted
    data,  # (N, C) FP8 result
    transposed,  # (C, N) FP8 result
    scale,  # (1,) fp32
    amax,  # (1,) int32
):
    """Launch the kernel; returns the shares of sum(grad_y * y), or None."""
    matrices = grad_normed, y, grad_stream, grad_y
    programs, descriptors, sizes, options = launch_args(matrices, data)
    partial = torch.empty(programs, dtype=torch.float32, device=y.device) if with_y else None
    residual_mix_bwd_tma_kernel[(programs,)](
        *descriptors,
        rstd,
        stream_scale,
        resid_lambda,
        partial,
        data.view(torch.int16),
        transposed.view(torch.int8),
        scale,
        amax,
        *sizes,
        RING=RING,
        SHORT=SHORT,
        **options,
    )
    return partial
