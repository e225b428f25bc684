"""Kernels of kernels/linear_softcap_cross_entropy.py, which has the maths and the launchers.

The product's kernel is persistent, and its loop over tiles is flattened with the one over C, as in
kernels/linear_relu_squared.py. Few tiles hold a target, so its tanh is stored in a branch, between
tanh and exponential, where a thread holds one fp32 number per element: 128 registers are enough.
What is done to u at the target follows in the kernel that adds up the rows' sums.
"""

from nanofuse.kernels.common.fp8 import cast_stored, record_amax
from nanofuse.kernels.common.jit import tl, triton
from nanofuse.kernels.common.ptx import (
    INTERPRETED,
    LOG2_E,
    fast_exp2,
    fast_reciprocal,
    fast_tanh,
)
from nanofuse.kernels.linear_relu_squared import tile_corner

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exponential(
    t,  # fp32 block: tanh(x / cap), or in EXACT arithmetic r = (1 - tanh(x / cap)) / 2
    CAP: tl.constexpr,
    SHIFT: tl.constexpr,
    EXACT: tl.constexpr,
):
    """e = 2^SHIFT exp(cap tanh(x / cap) - cap), and u = e (1 - tanh(x / cap)^2)."""
    if EXACT:
        e = fast_exp2(SHIFT - t * (2 * CAP * LOG2_E))
        return e, e * (4 * (t - t * t))
    else:
        e = fast_exp2(t * (CAP * LOG2_E) + (SHIFT - CAP * LOG2_E))
        return e, e - t * t * e


@triton.jit
def product_kernel(
    x_desc,  # (N, C) in blocks of BM x BK; FP8, bf16 or fp32
    w_desc,  # (V, C) in blocks of BN x BK
    x_inverse_ptr,  # (1,) fp32 inverse scale of x, or None without FP8
    w_inverse_ptr,  # (1,) fp32 inverse scale of w, or None without FP8
    targets_ptr,  # (N,) int64 or int32
    u_ptr,  # (N, V) result: FP8, or x's dtype; None for losses alone
    transposed_ptr,  # (V, N) FP8, or None
    sums_ptr,  # (tiles of a row, N) fp32: sum of e over the columns of a tile
    tanh_ptr,  # (N,) fp32: t of the target, of targets that are tokens
    N,
    vocab,
    V,
    C,
    CAP: tl.constexpr,
    SHIFT: tl.constexpr,  # e and u are multiplied by 2^SHIFT
    EXACT: tl.constexpr,  # tanh by exp2 and a reciprocal
    PADDED: tl.constexpr,  # whether blocks reach beyond vocab
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    inverse = 1.0  # multiplies the accumulator
    if x_inverse_ptr is not None:
        inverse = tl.load(x_inverse_ptr) * tl.load(w_inverse_ptr)
    first, tiles = tl.program_id(0), tl.cdiv(N, BM) * tl.cdiv(V, BN)
    m, n = tl.arange(0, BM), tl.arange(0, BN)
    tl.assume(C > 0)  # otherwise the compiler does not flatten the loops
    for tile in tl.range(first, tiles, tl.num_programs(0), flatten=True):
        row, col = tile_corner(tile, N, V, BM, BN, GROUP)
        product = tl.zeros((BM, BN), tl.float32)
        for k in range(0, tl.cdiv(C, BK)):
            x = x_desc.load([row, k * BK])
            w = w_desc.load([col, k * BK]).T
            if INTERPRETED:  # the interpreter's tl.dot is right in fp32 only
                x, w = x.to(tl.float32), w.to(tl.float32)
            product = tl.dot(x, w, product, input_precision="ieee")
        if EXACT:
            t = fast_reciprocal(1.0 + fast_exp2(product * (inverse * (2 * LOG2_E / CAP))))
        else:
            t = fast_tanh(product * (inverse / CAP))
        row_ok = row + m < N
        target = tl.load(targets_ptr + row + m, mask=row_ok, other=-1)
        here = (target >= col) & (target < col + BN)
        target = tl.where(here, target - col, -1).to(tl.int32)  # its column in this tile
        if tl.max(target, axis=0) >= 0:  # few tiles hold a target
            of_target = tl.sum(tl.where(target[:, None] == n[None, :], t, 0.0), axis=1)
            tl.store(tanh_ptr + row + m, of_target, mask=here)
        e, u = exponential(t, CAP, SHIFT, EXACT)
        if PADDED:
            e = tl.where((col + n < vocab)[None, :], e, 0.0)
            u = tl.where((col + n < vocab)[None, :], u, 0.0)
        sums = tl.sum(e, axis=1)
        tl.store(sums_ptr + (col // BN).to(tl.int64) * N + row + m, sums, mask=row_ok)
        if u_ptr is not None:
            inside = row_ok[:, None] & (col + n < V)[None, :]
            corner, offsets = row.to(tl.int64) * V + col, m[:, None] * V + n[None, :]
            dtype: tl.constexpr = u_ptr.dtype.element_ty
            if transposed_ptr is None:
                tl.store(u_ptr + corner + offsets, u.to(dtype), mask=inside)
            else:
                u = u.to(tl.bfloat16)
                tl.store(u_ptr + corner + offsets, cast_stored(u, dtype), mask=inside)
                inside = (col + n < V)[:, None] & row_ok[None, :]
                lines = (col + n).to(tl.int64) * N + row
                transposed = cast_stored(tl.trans(u), dtype)
                tl.store(transposed_ptr + lines[:, None] + m[None, :], transposed, mask=inside)


@triton.jit
def rows_kernel(
    sums_ptr,  # (T, N) fp32
    tanh_ptr,  # (N,) fp32
    targets_ptr,  # (N,) int64 or int32
    u_ptr,  # (N, V), or None
    transposed_ptr,  # (V, N), or None
    losses_ptr,  # (N,) fp32
    lse_ptr,  # (N,) fp32
    weights_ptr,  # (N,) fp32
    at_target_ptr,  # (N,) fp32
    largest_ptr,  # (1,) int32: the bits of the largest weight
    N,
    V,
    T,
    vocab,
    CAP: tl.constexpr,
    SHIFT: tl.constexpr,
    EXACT: tl.constexpr,
    IGNORE: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
):
    """Losses of BM rows, and what their gradients need; clears u at the targets."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    row_ok = row < N
    total = tl.zeros((BM,), tl.float32)
    for start in range(0, T, BT):
        t = start + tl.arange(0, BT)
        address = sums_ptr + t.to(tl.int64)[:, None] * N + row[None, :]
        part = tl.load(address, mask=(t < T)[:, None] & row_ok[None, :], other=0.0)
        total += tl.sum(part, axis=0)
    total = tl.where(row_ok, total, 1.0)
    target = tl.load(targets_ptr + row, mask=row_ok, other=IGNORE)
    is_token = (target >= 0) & (target < vocab)
    t = tl.load(tanh_ptr + row, mask=row_ok & is_token, other=0.0)
    # e is what the total contains of the target, to the last bits, so total - e is accurate
    e, _ = exponential(t, CAP, SHIFT, EXACT)
    slope = 4 * (t - t * t) if EXACT else 1.0 - t * t
    rest = tl.maximum(total - e, 0.0, propagate_nan=tl.PropagateNan.ALL)
    loss = tl.log(1.0 + rest / e)
    unknown = tl.where(target == IGNORE, 0.0, float("nan"))
    weight = tl.where(is_token, 1.0 / total, unknown)
    at_target = tl.where(is_token, -slope * (rest / total), unknown)
    tl.store(losses_ptr + row, tl.where(is_token, loss, unknown), mask=row_ok)
    tl.store(lse_ptr + row, tl.log(total) + (CAP - SHIFT * LN_2), mask=row_ok)
    tl.store(weights_ptr + row, weight, mask=row_ok)
    tl.store(at_target_ptr + row, at_target, mask=row_ok)
    record_amax(largest_ptr, tl.where(row_ok, weight, 0.0))
    if u_ptr is not None:
        zero = tl.zeros((BM,), tl.float32).to(u_ptr.dtype.element_ty)
        tl.store(u_ptr + row.to(tl.int64) * V + target, zero, mask=row_ok & is_token)
        if transposed_ptr is not None:
            lines = target.to(tl.int64) * N
            tl.store(transposed_ptr + lines + row, zero, mask=row_ok & is_token)


@triton.jit
def weighted_kernel(
    x_ptr,  # (R, K): FP8 (C, N), else (N, C)
    weights_ptr,  # (N,) fp32
    scale_ptr,  # (1,) fp32
    largest_ptr,  # (1,) fp32, or None without FP8
    x_inverse_ptr,  # (1,) fp32, or None without FP8
    inverse_ptr,  # (1,) fp32 inverse scale of the result, or None without FP8
    out_ptr,  # (R, K)
    R,
    K,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """Position n of x times weight n; in FP8 relative to the largest weight, which the inverse
    scale of the result makes good, with `scale`."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = (r < R)[:, None] & (k < K)[None, :]
    offsets = r.to(tl.int64)[:, None] * K + k[None, :]
    scale = tl.load(scale_ptr)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if largest_ptr is None:
        weight = tl.load(weights_ptr + r, mask=r < R, other=0.0)
        weight = tl.where(weight == 0.0, 0.0, weight * scale)[:, None]  # the scale may be Inf
    else:
        largest = tl.load(largest_ptr)  # 0 if no position counts
        weight = tl.load(weights_ptr + k, mask=k < K, other=0.0)
        weight = tl.where(weight == 0.0, 0.0, weight / largest)[None, :]
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            inverse = tl.where(largest == 0.0, 1.0, largest * scale) * tl.load(x_inverse_ptr)
            tl.store(inverse_ptr, inverse)
    tl.store(out_ptr + offsets, (x * weight).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def dx_kernel(
    grad_ptr,  # (N, C): u @ w; overwritten by the gradient of x
    w_ptr,  # (V, C): FP8, or a dtype
    w_inverse_ptr,  # (1,) fp32, or None without FP8
    targets_ptr,  # (N,) int64 or int32
    weights_ptr,  # (N,) fp32
    at_target_ptr,  # (N,) fp32
    scale_ptr,  # (1,) fp32
    N,
    C,
    vocab,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """scale * (weight n * row n of u @ w + at_target n * row target n of w)."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    row_ok = m < N
    target = tl.load(targets_ptr + m, mask=row_ok, other=-1)
    is_token = (target >= 0) & (target < vocab)
    scale = tl.load(scale_ptr)
    weight = tl.load(weights_ptr + m, mask=row_ok, other=0.0)
    at_target = tl.load(at_target_ptr + m, mask=row_ok, other=0.0)
    # the scale is Inf where no position counts
    weight = tl.where(weight == 0.0, 0.0, weight * scale)
    at_target = tl.where(at_target == 0.0, 0.0, at_target * scale)
    if w_inverse_ptr is not None:
        at_target *= tl.load(w_inverse_ptr)
    inside = row_ok[:, None] & (c < C)[None, :]
    address = grad_ptr + m.to(tl.int64)[:, None] * C + c[None, :]
    g = tl.load(address, mask=inside, other=0.0).to(tl.float32)
    source = w_ptr + target.to(tl.int64)[:, None] * C + c[None, :]
    w = tl.load(source, mask=inside & is_token[:, None], other=0.0).to(tl.float32)
    g = g * weight[:, None] + w * at_target[:, None]
    tl.store(address, g.to(grad_ptr.dtype.element_ty), mask=inside)
