"""Kernels of kernels/softcap_cross_entropy.py, which has the maths and the launchers.

The loss kernel is bound by the special-function units (16 results per cycle and SM, three per
logit), so four adjacent logits share one reciprocal: 1/a = (1/abcd) * cd * b. The gradient kernel
is bound by instruction issue, and computes a reciprocal per logit.
"""

from nanofuse.kernels.common.fp8 import amax_bits, record_amax, store_scaled
from nanofuse.kernels.common.jit import tl, triton
from nanofuse.kernels.common.lanes import LANE, lane_maxima
from nanofuse.kernels.common.ptx import LOG2_E, fast_exp2, fast_reciprocal

SATURATION = tl.constexpr(10.5)  # beyond it tanh is 1 in fp32; (1 + exp(2 * 10.5))^4 < 1e37


@triton.jit
def _gaps(
    x,  # (BM, BN) fp32
    CAP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """r = 1 / (1 + exp(2 x / cap)) = (cap - softcap(x)) / (2 cap), (BM, BN) fp32."""
    x = tl.minimum(x, SATURATION * CAP, propagate_nan=tl.PropagateNan.ALL)
    q = 1.0 + fast_exp2(x * (2 * LOG2_E / CAP))
    a, b = tl.split(tl.reshape(q, (BM, BN // 4, 2, 2)))  # (BM, BN / 4, 2)
    u, v = tl.split(a * b)  # (BM, BN / 4)
    inverse = fast_reciprocal(u * v)
    inverse = tl.join(inverse * v, inverse * u)  # 1 / (a * b)
    return tl.reshape(tl.join(inverse * b, inverse * a), (BM, BN))


@triton.jit
def _exp_sum(
    row_ptr,  # (V,) logits of one row
    col,  # first column of the piece
    vocab,
    V,
    CAP: tl.constexpr,
    PADDED: tl.constexpr,
    BN: tl.constexpr,
):
    """Sum of exp(softcap(x) - cap) over BN columns of one row, a scalar."""
    n = (col + tl.arange(0, BN))[None, :]
    x = tl.load(row_ptr + n, mask=n < V, other=0.0).to(tl.float32)
    if PADDED:  # padding may hold NaN or Inf, which the shared reciprocal would spread
        x = tl.where(n < vocab, x, 0.0)
    e = fast_exp2(_gaps(x, CAP, 1, BN) * (-2 * CAP * LOG2_E))
    if PADDED:
        e = tl.where(n < vocab, e, 0.0)
    return tl.sum(tl.ravel(e), axis=0)


@triton.jit
def _target_gap(
    row_ptr,  # (V,) logits of one row
    target,
    vocab,
    CAP: tl.constexpr,
):
    """cap - softcap(the target's logit), a scalar; NaN for a target that is no token."""
    is_token = (target >= 0) & (target < vocab)
    x = tl.load(row_ptr + target, mask=is_token, other=float("nan")).to(tl.float32)
    x = tl.minimum(x, SATURATION * CAP, propagate_nan=tl.PropagateNan.ALL)
    return 2 * CAP / (1.0 + tl.exp2(x * (2 * LOG2_E / CAP)))


@triton.jit
def fwd_kernel(
    logits_ptr,  # (N, V), rows logits_stride apart
    targets_ptr,  # (N,)
    losses_ptr,  # (N,) fp32
    lse_ptr,  # (N,) fp32
    vocab,
    V,
    logits_stride,
    CAP: tl.constexpr,
    IGNORE: tl.constexpr,
    PADDED: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Loss and logsumexp of one row."""
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * logits_stride
    target = tl.load(targets_ptr + row)
    gap = _target_gap(row_ptr, target, vocab, CAP)
    total = 0.0
    for col in range(0, vocab, PIECE):
        total += _exp_sum(row_ptr, col, vocab, V, CAP, PADDED, PIECE)
    log_sum = tl.log(total)
    tl.store(lse_ptr + row, CAP + log_sum)
    tl.store(losses_ptr + row, tl.where(target == IGNORE, 0.0, log_sum + gap))


@triton.jit
def bwd_kernel(
    logits_ptr,  # (N, V), rows logits_stride apart
    targets_ptr,  # (N,)
    lse_ptr,  # (N,) fp32
    grad_scale_ptr,  # (N,) fp32, scale_stride apart
    grad_ptr,  # (N, V), rows grad_stride apart, or None
    data_ptr,  # (N, V) FP8, or None
    transposed_ptr,  # (V, N) FP8
    fp8_scale_ptr,  # (1,) fp32
    amax_ptr,  # (1,) int32
    N,
    vocab,
    V,
    logits_stride,
    grad_stride,
    scale_stride,
    CAP: tl.constexpr,
    IGNORE: tl.constexpr,
    PADDED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BLOCKS: tl.constexpr,
    STRIPE: tl.constexpr,
):
    """Gradient of BLOCKS tiles of BM x BN, side by side; programs are ordered down the columns of a
    stripe of STRIPE rows before they go on to the next columns."""
    tall: tl.constexpr = STRIPE // BM
    tasks = tall * tl.cdiv(V, BN * BLOCKS)
    task = tl.program_id(0) % tasks
    row = (tl.program_id(0) // tasks) * STRIPE + task % tall * BM
    if row >= N:
        return
    first = task // tall * (BN * BLOCKS)
    m, n = tl.arange(0, BM), tl.arange(0, BN)
    m_ok = row + m < N
    lse = tl.load(lse_ptr + row + m, mask=m_ok, other=CAP)
    target = tl.load(targets_ptr + row + m, mask=m_ok, other=IGNORE)
    is_token = (target >= 0) & (target < vocab)  # before int32 wraps it
    target = tl.where(is_token | (target == IGNORE), target, vocab).to(tl.int32)
    upstream = tl.load(grad_scale_ptr + (row + m) * scale_stride, mask=m_ok, other=0.0)
    upstream = 4 * tl.where(target == IGNORE, 0.0, upstream)
    upstream = tl.where(target == vocab, float("nan"), upstream)
    # upstream * exp(e) is computed as exp(e + log |upstream|); the sign is applied at the store
    sign = tl.where(upstream < 0, -1.0, 1.0)
    upstream = tl.abs(upstream)
    exponent = ((CAP - lse) * LOG2_E + tl.log2(upstream))[:, None]
    base = logits_ptr + row.to(tl.int64) * logits_stride
    if grad_ptr is not None:
        grad_base = grad_ptr + row.to(tl.int64) * grad_stride
    if data_ptr is not None:
        peak = tl.zeros((BM, BN // LANE), tl.int32)
        factor = tl.load(fp8_scale_ptr) * sign[:, None]
    offsets = m[:, None] * logits_stride + n[None, :]
    inside = m_ok[:, None] & (first + n < V)[None, :]
    following = tl.load(base + first + offsets, mask=inside, other=0.0)
    # one stage: pipelined, the compiler computes the body once per register layout of the stores
    for col in tl.range(first, tl.minimum(first + BN * BLOCKS, V), BN, num_stages=1):
        x = following.to(tl.float32)
        inside = m_ok[:, None] & (col + n < V)[None, :]
        ahead = m_ok[:, None] & (col + BN + n < V)[None, :]
        following = tl.load(base + col + BN + offsets, mask=ahead, other=0.0)
        r = fast_reciprocal(1.0 + fast_exp2(x * (2 * LOG2_E / CAP)))
        p = fast_exp2(r * (-2 * CAP * LOG2_E) + exponent)
        here = (target >= col) & (target < col + BN)
        if tl.max(here.to(tl.int32), axis=0) > 0:  # few tiles contain a target
            p = tl.where((col + n)[None, :] == target[:, None], p - upstream[:, None], p)
        g = p * (r - r * r)
        if PADDED:
            g = tl.where((col + n < vocab)[None, :], g, 0.0)
        if grad_ptr is not None:
            address = grad_base + m[:, None] * grad_stride + (col + n)[None, :]
            tl.store(address, (g * sign[:, None]).to(grad_ptr.dtype.element_ty), mask=inside)
        if data_ptr is not None:
            peak = tl.maximum(peak, lane_maxima(amax_bits(g), BM, BN))
            store_scaled(g * factor, data_ptr, transposed_ptr, row, col, N, V, BM, BN)
    if data_ptr is not None:
        record_amax(amax_ptr, peak.to(tl.float32, bitcast=True))
