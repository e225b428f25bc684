"""Kernels of kernels/residual_mix.py, which has the maths and the launchers.

Each makes two passes over its rows: one for the reduction that a row's norm needs, one to write
what depends on it. The second pass reads y (and the gradient) back from the L2 cache, which holds
the rows of about two programs per SM. Sums and maxima are accumulated per lane, eight elements in
one register (kernels/common/lanes.py): that halves the register pressure, which allows 16 warps.
"""

from nanofuse.kernels.common.fp8 import amax_bits, record_amax, store_scaled
from nanofuse.kernels.common.jit import tl, triton
from nanofuse.kernels.common.lanes import LANE, lane_maxima, lane_sums


@triton.jit
def _load_scalar(
    ptr,  # (1,), or None for 1
):
    if ptr is None:
        return 1.0
    else:
        return tl.load(ptr).to(tl.float32)


@triton.jit
def _load_once(
    ptr,  # block
    ok,  # bool block
):
    """Load what is not read again, evicting it first, so that the L2 cache keeps the rest; 0 where
    not ok."""
    return tl.load(ptr, mask=ok, other=0.0, eviction_policy="evict_first")


@triton.jit
def _mix(
    x_ptr,  # (N, C)
    branch_ptr,  # (N, C) or None
    x0_ptr,  # (N, C) or None
    table_ptrs,  # of each table: (R, C)
    offsets,  # (BM, BC) int32, from the block's first row
    table_rows,  # of each table: (BM,) int64
    cols,  # (BC,)
    ok,  # (BM, BC) bool
    C,
    resid,
    x0_scale,
    table_scales,  # of each table
):
    """One (BM, BC) fp32 block of y; arguments that are None stand for absent terms."""
    # leaves the L2 cache to y, which is read back, and to table rows
    y = _load_once(x_ptr + offsets, ok).to(tl.float32)
    if branch_ptr is not None:
        y += _load_once(branch_ptr + offsets, ok).to(tl.float32)
    y *= resid
    if x0_ptr is not None:
        y += x0_scale * _load_once(x0_ptr + offsets, ok).to(tl.float32)
    for i in tl.static_range(len(table_ptrs)):
        e = tl.load(table_ptrs[i] + table_rows[i][:, None] * C + cols[None, :], mask=ok, other=0.0)
        y += table_scales[i] * e.to(tl.float32)
    return y


# The lambdas of all layers are adjacent in memory, so their alignment differs by layer. Triton
# specialises what is in a tuple all the same: with tables there are two variants of the kernel.
@triton.jit(do_not_specialize_on_alignment=("resid_ptr", "x0_lambda_ptr"))
def residual_mix_fwd_kernel(
    x_ptr,  # (N, C)
    branch_ptr,  # (N, C) or None
    x0_ptr,  # (N, C) or None
    rows_ptrs,  # of each table: (N,) int32
    table_ptrs,  # of each table: (R, C)
    resid_ptr,  # (1,) or None
    x0_lambda_ptr,  # (1,) or None
    table_lambda_ptrs,  # of each table: (1,)
    y_ptr,  # (N, C)
    normed_ptr,  # (N, C) or None
    rstd_ptr,  # (N,) fp32
    data_ptr,  # (N, C) FP8 or None
    transposed_ptr,  # (C, N) FP8 or None
    scale_ptr,  # (1,) fp32 or None
    amax_ptr,  # (1,) int32 or None
    N,
    C,
    eps,
    BM: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0) * BM
    m = tl.arange(0, BM)
    rows = row + m
    row_ok = rows < N
    resid = _load_scalar(resid_ptr)
    x0_scale = _load_scalar(x0_lambda_ptr)
    table_rows = ()
    table_scales = ()
    for i in tl.static_range(len(table_ptrs)):
        table_rows += (tl.load(rows_ptrs[i] + rows, mask=row_ok, other=0).to(tl.int64),)
        table_scales += (_load_scalar(table_lambda_ptrs[i]),)
    base = row.to(tl.int64) * C  # within the block 32 bits are enough
    x_ptr += base
    y_ptr += base
    if branch_ptr is not None:
        branch_ptr += base
    if x0_ptr is not None:
        x0_ptr += base
    if normed_ptr is not None:
        normed_ptr += base
    squares = tl.zeros((BM, BC // LANE), tl.float32)
    for col in tl.range(0, C, BC, num_stages=STAGES):
        cols = col + tl.arange(0, BC)
        ok = row_ok[:, None] & (cols < C)[None, :]
        offsets = m[:, None] * C + cols[None, :]
        y = _mix(
            x_ptr, branch_ptr, x0_ptr, table_ptrs, offsets, table_rows, cols, ok, C,
            resid, x0_scale, table_scales,
        ).to(y_ptr.dtype.element_ty)  # fmt: skip
        tl.store(y_ptr + offsets, y, mask=ok)
        y = y.to(tl.float32)
        squares += lane_sums(y * y, BM, BC)
    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=1) / C + eps)
    tl.store(rstd_ptr + rows, rstd, mask=row_ok)
    tl.debug_barrier()  # other threads read y back below
    if data_ptr is not None:
        scale = tl.load(scale_ptr)
        peak = tl.zeros((BM, BC // LANE), tl.int32)
    # one stage: pipelined, the compiler computes the body once per register layout of the stores
    for col in tl.range(0, C, BC, num_stages=1):
        cols = col + tl.arange(0, BC)
        ok = row_ok[:, None] & (cols < C)[None, :]
        offsets = m[:, None] * C + cols[None, :]
        normed = _load_once(y_ptr + offsets, ok).to(tl.float32) * rstd[:, None]
        if normed_ptr is not None:
            tl.store(normed_ptr + offsets, normed.to(normed_ptr.dtype.element_ty), mask=ok)
        if data_ptr is not None:
            peak = tl.maximum(peak, lane_maxima(amax_bits(normed), BM, BC))
            store_scaled(normed * scale, data_ptr, transposed_ptr, row, col, N, C, BM, BC)
    if data_ptr is not None:
        record_amax(amax_ptr, peak.to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize_on_alignment=("stream_scale_ptr", "resid_ptr"))
def residual_mix_bwd_kernel(
    grad_normed_ptr,  # (N, C)
    grad_stream_ptr,  # (N, C) or None
    stream_scale_ptr,  # (1,) or None
    y_ptr,  # (N, C)
    rstd_ptr,  # (N,) fp32
    x_ptr,  # (N, C) or None; not read if WITH_Y
    resid_ptr,  # (1,) or None
    grad_y_ptr,  # (N, C)
    grad_branch_ptr,  # (N, C) resid * grad_y, or None
    resid_partial_ptr,  # (programs,) fp32: a program's share of sum(grad_y * x), or None
    data_ptr,  # (N, C) FP8 or None
    transposed_ptr,  # (C, N) FP8 or None
    scale_ptr,  # (1,) fp32 or None
    amax_ptr,  # (1,) int32 or None
    N,
    C,
    WITH_Y: tl.constexpr,  # x is y
    BM: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0) * BM
    m = tl.arange(0, BM)
    rows = row + m
    row_ok = rows < N
    resid = _load_scalar(resid_ptr)
    stream_scale = _load_scalar(stream_scale_ptr)
    base = row.to(tl.int64) * C  # within the block 32 bits are enough
    grad_normed_ptr += base
    y_ptr += base
    grad_y_ptr += base
    if grad_stream_ptr is not None:
        grad_stream_ptr += base
    if grad_branch_ptr is not None:
        grad_branch_ptr += base
    if x_ptr is not None:
        x_ptr += base
    products = tl.zeros((BM, BC // LANE), tl.float32)
    for col in tl.range(0, C, BC, num_stages=STAGES):
        cols = col + tl.arange(0, BC)
        ok = row_ok[:, None] & (cols < C)[None, :]
        offsets = m[:, None] * C + cols[None, :]
        h = tl.load(grad_normed_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
        products += lane_sums(h * y, BM, BC)
    rstd = tl.load(rstd_ptr + rows, mask=row_ok, other=0.0)
    y_scale = rstd * rstd * rstd * (tl.sum(products, axis=1) / C)
    products = tl.zeros((BM, BC // LANE), tl.float32)
    if data_ptr is not None:
        scale = tl.load(scale_ptr)
        peak = tl.zeros((BM, BC // LANE), tl.int32)
    n = tl.arange(0, BC)
    if grad_stream_ptr is not None:  # not in the cache, unlike h and y: prefetched by one block
        ok = row_ok[:, None] & (n < C)[None, :]
        following = _load_once(grad_stream_ptr + m[:, None] * C + n[None, :], ok)
    # one stage, for the same reason as in the forward kernel
    for col in tl.range(0, C, BC, num_stages=1):
        cols = col + n
        ok = row_ok[:, None] & (cols < C)[None, :]
        offsets = m[:, None] * C + cols[None, :]
        h = _load_once(grad_normed_ptr + offsets, ok).to(tl.float32)
        y = _load_once(y_ptr + offsets, ok).to(tl.float32)
        g = h * rstd[:, None] - y * y_scale[:, None]
        if grad_stream_ptr is not None:
            g += stream_scale * following.to(tl.float32)
            ahead = row_ok[:, None] & (cols + BC < C)[None, :]
            following = _load_once(grad_stream_ptr + offsets + BC, ahead)
        tl.store(grad_y_ptr + offsets, g.to(grad_y_ptr.dtype.element_ty), mask=ok)
        if WITH_Y:
            products += lane_sums(g * y, BM, BC)
        elif x_ptr is not None:
            x = _load_once(x_ptr + offsets, ok).to(tl.float32)
            products += lane_sums(g * x, BM, BC)
        g *= resid
        if grad_branch_ptr is not None:
            tl.store(grad_branch_ptr + offsets, g.to(grad_branch_ptr.dtype.element_ty), mask=ok)
        if data_ptr is not None:
            peak = tl.maximum(peak, lane_maxima(amax_bits(g), BM, BC))
            store_scaled(g * scale, data_ptr, transposed_ptr, row, col, N, C, BM, BC)
    if data_ptr is not None:
        record_amax(amax_ptr, peak.to(tl.float32, bitcast=True))
    if resid_partial_ptr is not None:
        tl.store(resid_partial_ptr + tl.program_id(0), tl.sum(tl.sum(products, axis=1), axis=0))
