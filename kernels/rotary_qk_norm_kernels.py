"""Kernels and constants of kernels/rotary_qk_norm.py, which has the maths and the launchers.

A program owns a block of rows and a group of heads, of q and k, or of v: it loads the cosines and
sines of its rows once for all heads of the group, and its loop over heads is software-pipelined.
Heads of q and k are processed as two halves of width D/2, which makes a rotation elementwise. The
programs of all head groups of one block of rows have consecutive ids.
"""

from nanofuse.kernels.common.attention_sums import load_sums
from nanofuse.kernels.common.fp8 import amax_bits, record_amax, store_scaled
from nanofuse.kernels.common.jit import tl, triton
from nanofuse.kernels.common.rms_norm import RMS_NORM_EPS

QK_GAIN = 1.2
VALUE_GATE_SCALE = 3.0
_EPS = tl.constexpr(RMS_NORM_EPS)
_GAIN = tl.constexpr(QK_GAIN)
_GATE_SCALE = tl.constexpr(VALUE_GATE_SCALE)


@triton.jit
def _rotate_heads(
    qkv_ptr,  # (N, W)
    rstd_ptr,  # (H + K, N) fp32
    cos_ptr,  # (T, D) fp32
    sin_ptr,  # (T, D) fp32
    row,
    first,
    last,
    N,
    T,
    qkv_stride,
    D: tl.constexpr,
    BM: tl.constexpr,
    HALF: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Normalise, scale and rotate heads first..last-1 of q and k in BM rows, in place; stores
    their rstd."""
    m, n = tl.arange(0, BM), tl.arange(0, HALF)
    m_ok = row + m < N
    inside = m_ok[:, None] & (n < D // 2)[None, :]
    angles = ((row + m) % T)[:, None] * D + n[None, :]
    cos = tl.load(cos_ptr + angles, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + angles, mask=inside, other=0.0)
    rows_ptr = qkv_ptr + row.to(tl.int64) * qkv_stride
    offsets = m[:, None] * qkv_stride + n[None, :]
    for head in tl.range(first, last, num_stages=STAGES):
        x_ptr = rows_ptr + head * D + offsets
        x1 = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + D // 2, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / D + _EPS)
        gain = (rstd * _GAIN)[:, None]
        tl.store(x_ptr, (x1 * cos + x2 * sin) * gain, mask=inside)
        tl.store(x_ptr + D // 2, (x2 * cos - x1 * sin) * gain, mask=inside)
        tl.store(rstd_ptr + tl.cast(head, tl.int64) * N + row + m, rstd, mask=m_ok)


@triton.jit
def _gate_values(
    v_ptr,  # (N, K*D), rows v_stride apart
    tokens_ptr,  # (N,)
    table_ptr,  # (R, K*D)
    gate_ptr,  # (N, K)
    row,
    first,
    last,
    N,
    R,
    K,
    v_stride,
    D: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add the gated value embedding to heads first..last-1 of v in BM rows, in place; NaN where the
    token is outside of the table."""
    m, n = tl.arange(0, BM), tl.arange(0, BD)
    m_ok = row + m < N
    inside = m_ok[:, None] & (n < D)[None, :]
    token = tl.load(tokens_ptr + row + m, mask=m_ok, other=0).to(tl.int64)
    known = m_ok & (token >= 0) & (token < R)
    token = tl.where(known, token, 0)  # read, and hidden by the gate's NaN
    table_ptr += (token * (K * D))[:, None] + n[None, :]
    gate_ptr += row.to(tl.int64) * K + m * K
    v_ptr += row.to(tl.int64) * v_stride + (m[:, None] * v_stride + n[None, :])
    for head in tl.range(first, last, num_stages=STAGES):
        gate = tl.load(gate_ptr + head, mask=known, other=float("nan")).to(tl.float32)
        e = tl.load(table_ptr + head * D, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + head * D, mask=inside, other=0.0).to(tl.float32)
        v += (tl.sigmoid(gate) * _GATE_SCALE)[:, None] * e
        tl.store(v_ptr + head * D, v, mask=inside)


@triton.jit
def rotary_qk_norm_fwd_kernel(
    qkv_ptr,  # (N, (H + 2K)*D), rows qkv_stride apart
    rstd_ptr,  # (H + K, N) fp32
    cos_ptr,  # (T, D) fp32
    sin_ptr,  # (T, D) fp32
    tokens_ptr,  # (N,), or None
    table_ptr,  # (R, K*D), or None
    gate_ptr,  # (N, K), or None
    N,
    T,
    R,
    H,
    K,
    qkv_stride,
    D: tl.constexpr,
    BM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    STAGES: tl.constexpr,
):
    qk_groups = tl.cdiv(H + K, HEADS)
    groups = qk_groups
    if table_ptr is not None:
        groups += tl.cdiv(K, HEADS)
    row = (tl.program_id(0) // groups) * BM
    group = tl.program_id(0) % groups
    if group < qk_groups:
        first = group * HEADS
        last = tl.minimum(first + HEADS, H + K)
        _rotate_heads(
            qkv_ptr, rstd_ptr, cos_ptr, sin_ptr, row, first, last, N, T, qkv_stride,
            D, BM, HALF, STAGES,
        )  # fmt: skip
    elif table_ptr is not None:
        first = (group - qk_groups) * HEADS
        last = tl.minimum(first + HEADS, K)
        v_ptr = qkv_ptr + (H + K) * D
        _gate_values(
            v_ptr, tokens_ptr, table_ptr, gate_ptr, row, first, last, N, R, K, qkv_stride,
            D, BM, 2 * HALF, STAGES,
        )  # fmt: skip


@triton.jit
def _store_gradient(
    x,  # (BM, BN) fp32, zero outside of the matrix
    dx_ptr,  # (N, W), or None
    data_ptr,  # (N, W) FP8, or None
    transposed_ptr,  # (W, N) FP8, or None
    scale,
    peak,  # (BM,) int32: bits of the largest magnitude of each row so far
    row,
    col,
    m,  # (BM,)
    n,  # (BN,)
    inside,  # (BM, BN)
    N,
    W,
):
    """Store a block of the gradient, plain and as FP8 in both layouts, as far as the outputs are
    given; returns peak, raised where the block's magnitudes are larger."""
    if dx_ptr is not None:
        offset = row.to(tl.int64) * W + col
        tl.store(dx_ptr + offset + m[:, None] * W + n[None, :], x, mask=inside)
    if data_ptr is not None:
        peak = tl.maximum(peak, tl.max(amax_bits(x), axis=1))
        store_scaled(x * scale, data_ptr, transposed_ptr, row, col, N, W, x.shape[0], x.shape[1])
    return peak


@triton.jit
def _rotate_gradients(
    g_ptr,  # (N, heads*D), rows g_stride apart; with a factor AttentionSums'
    factor,  # of these, or None
    y_ptr,  # (N, heads*D), rows y_stride apart: results of the forward pass
    rstd_ptr,  # (heads, N) fp32
    cos_ptr,  # (T, D) fp32
    sin_ptr,  # (T, D) fp32
    dx_ptr,  # (N, W), or None
    data_ptr,  # (N, W) FP8, or None
    transposed_ptr,  # (W, N) FP8, or None
    scale,
    peak,  # (BM,) int32
    row,
    col,  # column of q's or k's first head in the outputs
    first,
    last,
    heads,
    N,
    T,
    W,
    g_stride,
    y_stride,
    D: tl.constexpr,
    BM: tl.constexpr,
    HALF: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of heads first..last-1 of q or k in BM rows; returns the raised peak."""
    m, n = tl.arange(0, BM), tl.arange(0, HALF)
    m_ok = row + m < N
    inside = m_ok[:, None] & (n < D // 2)[None, :]
    angles = ((row + m) % T)[:, None] * D + n[None, :]
    cos = tl.load(cos_ptr + angles, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + angles, mask=inside, other=0.0)
    if factor is None:
        g_ptr += row.to(tl.int64) * g_stride + (m[:, None] * g_stride + n[None, :])
    y_ptr += row.to(tl.int64) * y_stride + (m[:, None] * y_stride + n[None, :])
    for head in tl.range(first, last, num_stages=STAGES):
        start = head * D
        if factor is None:
            g1 = tl.load(g_ptr + start, mask=inside, other=0.0).to(tl.float32)
            g2 = tl.load(g_ptr + start + D // 2, mask=inside, other=0.0).to(tl.float32)
        else:  # rounded as attention's own conversion does
            batch = (row // T).to(tl.int64)
            g1 = load_sums(g_ptr, batch, head, heads, row % T, T, 0, BM) * factor
            g2 = load_sums(g_ptr, batch, head, heads, row % T, T, 1, BM) * factor
            g1 = g1.to(y_ptr.dtype.element_ty).to(tl.float32)
            g2 = g2.to(y_ptr.dtype.element_ty).to(tl.float32)
        y1 = tl.load(y_ptr + start, mask=inside, other=0.0).to(tl.float32)
        y2 = tl.load(y_ptr + start + D // 2, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + tl.cast(head, tl.int64) * N + row + m, mask=m_ok, other=0.0)[
            :, None
        ]
        along = (tl.sum(g1 * y1 + g2 * y2, axis=1) / (D * _GAIN))[:, None]
        u1 = rstd * (g1 * _GAIN - along * y1)
        u2 = rstd * (g2 * _GAIN - along * y2)
        peak = _store_gradient(
            u1 * cos - u2 * sin,
            dx_ptr, data_ptr, transposed_ptr, scale, peak, row, col + start, m, n, inside, N, W,
        )  # fmt: skip
        peak = _store_gradient(
            u2 * cos + u1 * sin,
            dx_ptr, data_ptr, transposed_ptr, scale, peak, row, col + start + D // 2, m, n,
            inside, N, W,
        )  # fmt: skip
    return peak


@triton.jit
def _value_gradients(
    g_ptr,  # (N, K*D), rows g_stride apart
    tokens_ptr,  # (N,), or None
    table_ptr,  # (R, K*D), or None
    gate_ptr,  # (N, K), or None
    gate_grad_ptr,  # (N, K), or None
    value_grad_ptr,  # (N, K*D), or None
    dx_ptr,  # (N, W), or None
    data_ptr,  # (N, W) FP8, or None
    transposed_ptr,  # (W, N) FP8, or None
    scale,
    peak,  # (BM,) int32
    row,
    col,  # column of v's first head in the outputs
    first,
    last,
    N,
    R,
    K,
    W,
    g_stride,
    D: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of heads first..last-1 of v in BM rows, of their gate logits and of their value
    embeddings; returns the raised peak. The gate's is NaN where the token is outside of the table.
    """
    m, n = tl.arange(0, BM), tl.arange(0, BD)
    m_ok = row + m < N
    inside = m_ok[:, None] & (n < D)[None, :]
    g_ptr += row.to(tl.int64) * g_stride + (m[:, None] * g_stride + n[None, :])
    if table_ptr is not None:
        token = tl.load(tokens_ptr + row + m, mask=m_ok, other=0).to(tl.int64)
        token = tl.where((token >= 0) & (token < R), token, 0)  # read, and hidden by NaN below
        table_ptr += (token * (K * D))[:, None] + n[None, :]
        gates = row.to(tl.int64) * K + m * K
        value_grad_ptr += row.to(tl.int64) * (K * D) + (m[:, None] * (K * D) + n[None, :])
    for head in tl.range(first, last, num_stages=STAGES):
        start = head * D
        g = tl.load(g_ptr + start, mask=inside, other=0.0).to(tl.float32)
        if table_ptr is not None:
            e = tl.load(table_ptr + start, mask=inside, other=0.0).to(tl.float32)
            gate = tl.load(gate_ptr + gates + head, mask=m_ok, other=0.0).to(tl.float32)
            s = tl.sigmoid(gate)
            gate_grad = s * (1 - s) * _GATE_SCALE * tl.sum(g * e, axis=1)
            tl.store(gate_grad_ptr + gates + head, gate_grad, mask=m_ok)
            tl.store(value_grad_ptr + start, (s * _GATE_SCALE)[:, None] * g, mask=inside)
        peak = _store_gradient(
            g, dx_ptr, data_ptr, transposed_ptr, scale, peak, row, col + start, m, n, inside, N, W
        )
    if table_ptr is not None:  # in the loop above a condition would cost registers
        token = tl.load(tokens_ptr + row + m, mask=m_ok, other=0).to(tl.int64)
        unknown = m_ok & ((token < 0) | (token >= R))
        tl.debug_barrier()  # other threads stored the gradients that NaN replaces
        for head in range(first, last):
            tl.store(gate_grad_ptr + gates + head, float("nan"), mask=unknown)
    return peak


@triton.jit
def rotary_qk_norm_bwd_kernel(
    gq_ptr,  # (N, H*D), rows gq_stride apart, or (B, H, T*128) fp32: AttentionSums'
    gq_factor,  # of these, or None
    gk_ptr,  # (N, K*D), rows gk_stride apart
    gv_ptr,  # (N, K*D), rows gv_stride apart
    qkv_ptr,  # (N, (H + 2K)*D), rows qkv_stride apart
    rstd_ptr,  # (H + K, N) fp32
    cos_ptr,  # (T, D) fp32
    sin_ptr,  # (T, D) fp32
    tokens_ptr,  # (N,), or None
    table_ptr,  # (R, K*D), or None
    gate_ptr,  # (N, K), or None
    gate_grad_ptr,  # (N, K), or None
    value_grad_ptr,  # (N, K*D), or None
    dx_ptr,  # (N, (H + 2K)*D), or None
    data_ptr,  # (N, (H + 2K)*D) FP8, or None
    transposed_ptr,  # ((H + 2K)*D, N) FP8, or None
    scale_ptr,  # (1,) fp32, or None
    amax_ptr,  # (1,) int32, or None
    N,
    T,
    R,
    H,
    K,
    gq_stride,
    gk_stride,
    gv_stride,
    qkv_stride,
    D: tl.constexpr,
    BM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    STAGES: tl.constexpr,
):
    q_groups, kv_groups = tl.cdiv(H, HEADS), tl.cdiv(K, HEADS)
    groups = q_groups + 2 * kv_groups
    row = (tl.program_id(0) // groups) * BM
    group = tl.program_id(0) % groups
    W = (H + 2 * K) * D
    scale = 1.0
    if data_ptr is not None:
        scale = tl.load(scale_ptr)
    peak = tl.zeros((BM,), tl.int32)
    if group < q_groups + kv_groups:
        is_q = group < q_groups
        before = tl.where(is_q, 0, H)  # heads before q or k
        first = tl.where(is_q, group, group - q_groups) * HEADS
        last = tl.minimum(first + HEADS, tl.where(is_q, H, K))
        y_ptr, rstd_ptr = qkv_ptr + before * D, rstd_ptr + before.to(tl.int64) * N
        if gq_factor is None:  # one loop for both
            peak = _rotate_gradients(
                tl.where(is_q, gq_ptr, gk_ptr), None, y_ptr, rstd_ptr, cos_ptr, sin_ptr,
                dx_ptr, data_ptr, transposed_ptr, scale, peak, row, before * D, first, last, H,
                N, T, W, tl.where(is_q, gq_stride, gk_stride), qkv_stride, D, BM, HALF, STAGES,
            )  # fmt: skip
        elif is_q:
            peak = _rotate_gradients(
                gq_ptr, gq_factor, y_ptr, rstd_ptr, cos_ptr, sin_ptr,
                dx_ptr, data_ptr, transposed_ptr, scale, peak, row, before * D, first, last, H,
                N, T, W, gq_stride, qkv_stride, D, BM, HALF, STAGES,
            )  # fmt: skip
        else:
            peak = _rotate_gradients(
                gk_ptr, None, y_ptr, rstd_ptr, cos_ptr, sin_ptr,
                dx_ptr, data_ptr, transposed_ptr, scale, peak, row, before * D, first, last, K,
                N, T, W, gk_stride, qkv_stride, D, BM, HALF, STAGES,
            )  # fmt: skip
    else:
        first = (group - q_groups - kv_groups) * HEADS
        last = tl.minimum(first + HEADS, K)
        peak = _value_gradients(
            gv_ptr, tokens_ptr, table_ptr, gate_ptr, gate_grad_ptr, value_grad_ptr,
            dx_ptr, data_ptr, transposed_ptr, scale, peak, row, (H + K) * D, first, last,
            N, R, K, W, gv_stride, D, BM, 2 * HALF, STAGES,
        )  # fmt: skip
    if data_ptr is not None:
        record_amax(amax_ptr, peak.to(tl.float32, bitcast=True))
