"""Rotary embedding, RMSNorm and gain of q and k; gated value embedding added to v.

    rotary (halves layout):  y1 = x1*cos + x2*sin,   y2 = -x1*sin + x2*cos
    q, k:                    1.2 * rms_norm(rotary(.)) = rotary(1.2 * rms_norm(.)), per head
    v:                       v + 3 * sigmoid(gate) * value_embedding, gate per kv head

A rotation R preserves the norm, so normalising first gives the same result; and with the sign of
sin in its table, the rotation is y = x*cos + roll(x, D/2)*sin. References in this form let
torch.compile's forward and backward take 0.27 ms for (32, 2048, 8, 128) bf16 on an H200, against
0.34 ms with rotation first and halves concatenated (records/2026-11-22-baseline).

The kernels work in place on a fused QKV buffer (N, (H + 2K)*D), whose rows hold the heads of q,
then k, then v. The backward pass recovers x_hat = x*rstd from the result y by rotating back; and as
x_hat . R^T g = (R x_hat) . g = (y / 1.2) . g, with g the upstream gradient, it needs only one
rotation:

    dx = rstd * R^T (1.2*g - y * mean(y*g) / 1.2)
    dgate = 3*s*(1 - s) * sum(g_v * value_embedding),   s = sigmoid(gate)
    dvalue_embedding = 3*s*g_v,   dv = g_v

Sources: RoFormer (https://arxiv.org/abs/2104.09864), query-key norm
(https://arxiv.org/abs/2010.04245), value embeddings as in karpathy/nanochat at dc54a1a.

Bytes, N = B*T positions, H query and K key/value heads of width D at s bytes:
forward 2*N*(H + K)*D*s for q and k, and 3*N*K*D*s for v if it has an embedding, else none;
backward N*D*(2H + 3K)*s read, N*(H + 2K)*D*(s and/or 2) written, and 2*N*K*D*s for an embedding
and its gradient. Of AttentionSums 2*N*H*D more are read. FLOPs: about 12 per element.
"""

from dataclasses import dataclass

import torch

from nanofuse.kernels.common.attention_sums import TILE_COLS, TILE_ROWS, AttentionSums
from nanofuse.kernels.common.checks import check_tensor
from nanofuse.kernels.common.fp8 import check_alignment, empty_operand, operand_args
from nanofuse.kernels.common.jit import triton
from nanofuse.kernels.common.rms_norm import rms_norm_ref
from nanofuse.kernels.common.tuning import tuned
from nanofuse.kernels.embedding_grad import embedding_grad, sort_rows
from nanofuse.kernels.rotary_qk_norm_kernels import (
    QK_GAIN,
    VALUE_GATE_SCALE,
    rotary_qk_norm_bwd_kernel,
    rotary_qk_norm_fwd_kernel,
)


@dataclass(frozen=True)
class HeadTile:
    """Rows and heads of a program, its warps, and the pipeline stages of its loop over heads."""

    rows: int
    heads: int
    warps: int
    stages: int = 2


TILE = HeadTile(rows=16, heads=4, warps=4)
TILE_BWD = HeadTile(rows=32, heads=4, warps=4, stages=3)


def rotary_table(seq_len, head_dim, base, device=None):
    """Cosines and sines of the rotary angles, each (seq_len, head_dim) fp32.

    Returns:
        cos, whose two halves are equal, and sin, whose second half is the first one negated.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    positions = torch.arange(seq_len, dtype=torch.float32, device=device)
    angles = torch.outer(positions, 1.0 / base**exponent)  # (seq_len, head_dim / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([sin, -sin], dim=-1)


def rotary_ref(
    x,  # (B, T, H, D)
    cos,  # (T, D)
    sin,  # (T, D), second half negated
):
    """Rotate every head, in the halves layout, by its position's angles; (B, T, H, D) in x's
    dtype."""
    swapped = x.roll(x.size(-1) // 2, dims=-1)  # halves exchanged
    return (x * cos[:, None, :] + swapped * sin[:, None, :]).to(x.dtype)


def rotary_qk_norm_ref(
    q,  # (B, T, H, D)
    k,  # (B, T, K, D)
    cos,  # (T, D)
    sin,  # (T, D), second half negated
):
    """Normalise, scale and rotate q and k; returns both in their own shapes and dtypes."""
    return tuple(rotary_ref(rms_norm_ref(x) * QK_GAIN, cos, sin) for x in (q, k))


def value_gate_ref(
    v,  # (B, T, K, D)
    gate,  # (B, T, K) logits
    value_embedding,  # (B, T, K, D)
):
    """Add the gated value embedding to v; (B, T, K, D) in v's dtype."""
    return v + (VALUE_GATE_SCALE * torch.sigmoid(gate)).unsqueeze(-1) * value_embedding


def check(op, qkv, tokens, table, gate, head_dim, seq_len, num_heads):
    """Check the inputs of `op`; returns K, the number of key/value heads of the fused buffer.

    Raises:
        ValueError: tensors that are not contiguous or do not fit together.
    """
    if qkv.dim() != 2 or qkv.stride(1) != 1:
        raise ValueError(f"{op}: qkv must be a matrix with contiguous rows")
    kv_heads, rest = divmod(qkv.size(1) - num_heads * head_dim, 2 * head_dim)
    if rest or kv_heads < 1 or head_dim % 2:
        raise ValueError(
            f"{op}: a row of {qkv.size(1)} does not hold {num_heads} query heads and "
            f"as many key as value heads of an even width {head_dim}"
        )
    if qkv.size(0) % seq_len:
        raise ValueError(f"{op}: {qkv.size(0)} rows are not sequences of {seq_len}")
    given = [x is not None for x in (tokens, table, gate)]
    if any(given):
        if not all(given):
            raise ValueError(f"{op}: tokens, table and gate go together")
        shapes = (tokens.numel(), table.size(-1), gate.numel())
        if shapes != (qkv.size(0), kv_heads * head_dim, qkv.size(0) * kv_heads):
            raise ValueError(f"{op}: tokens, table or gate do not fit qkv")
        if not all(x.is_contiguous() for x in (tokens, table, gate)):
            raise ValueError(f"{op}: tokens, table and gate must be contiguous")
    return kv_heads


def _check(qkv, tokens, table, gate, cos, sin, seq_len, num_heads):
    """As `check`, and the angles."""
    head_dim = cos.size(-1)
    kv_heads = check("rotary_qk_norm", qkv, tokens, table, gate, head_dim, seq_len, num_heads)
    for name, angles in (("cos", cos), ("sin", sin)):
        if angles.dtype != torch.float32 or not angles.is_contiguous():
            raise ValueError(f"rotary_qk_norm: {name} must be contiguous fp32")
        if angles.size(0) < seq_len or angles.size(1) != head_dim:
            raise ValueError(f"rotary_qk_norm: {name} is too small for {seq_len} positions")
    return kv_heads


def _launch_sizes(config, head_dim):
    return {
        "D": head_dim,
        "BM": config.rows,
        "HALF": triton.next_power_of_2(head_dim // 2),
        "HEADS": config.heads,
        "STAGES": config.stages,
        "num_warps": config.warps,
    }


def rotary_qk_norm_fwd(
    qkv,  # (N, (H + 2K)*D) bf16 or fp32, stride 1 along the rows; overwritten
    tokens,  # (N,) integer, or None: without a table v is neither read nor written
    table,  # (R, K*D) value embeddings, or None
    gate,  # (N, K) logits, or None
    cos,  # (>= seq_len, D) fp32
    sin,  # (>= seq_len, D) fp32, second half negated; only the first half is read
    seq_len,
    num_heads,
):
    """Normalise, scale and rotate q and k and add the gated value embeddings to v, all in place.

    Row n has position n % seq_len. Where a token is outside of [0, R), v becomes NaN.

    Returns:
        rstd (H + K, N) fp32: the inverse root mean square of every q and k head, for backward.

    Raises:
        ValueError: tensors that are not contiguous or do not fit together.
    """
    kv_heads = _check(qkv, tokens, table, gate, cos, sin, seq_len, num_heads)
    rows, head_dim = qkv.size(0), cos.size(1)
    heads = num_heads + kv_heads
    rstd = torch.empty(heads, rows, dtype=torch.float32, device=qkv.device)
    config = tuned("rotary_qk_norm", TILE, num_heads * head_dim)
    groups = triton.cdiv(heads, config.heads)
    if table is not None:
        groups += triton.cdiv(kv_heads, config.heads)
    rotary_qk_norm_fwd_kernel[(triton.cdiv(rows, config.rows) * groups,)](
        qkv_ptr=qkv,
        rstd_ptr=rstd,
        cos_ptr=cos,
        sin_ptr=sin,
        tokens_ptr=tokens,
        table_ptr=table,
        gate_ptr=gate,
        N=rows,
        T=seq_len,
        R=0 if table is None else table.size(0),
        H=num_heads,
        K=kv_heads,
        qkv_stride=qkv.stride(0),
        **_launch_sizes(config, head_dim),
    )
    return rstd


def _check_gradients(g_q, g_k, g_v, qkv, num_heads, kv_heads, head_dim, seq_len, tile):
    """Raise ValueError for upstream gradients that do not fit qkv."""
    rows = qkv.size(0)
    matrices = [("g_k", g_k, kv_heads), ("g_v", g_v, kv_heads)]
    if isinstance(g_q, AttentionSums):
        shape = (rows // seq_len, num_heads, seq_len * TILE_COLS)
        check_tensor("rotary_qk_norm", "sums", g_q.sums, shape, torch.float32)
        if head_dim != TILE_COLS or seq_len % TILE_ROWS:
            raise ValueError(
                f"rotary_qk_norm: sums want heads of {TILE_COLS} and multiples of {TILE_ROWS} "
                f"positions, not {head_dim} and {seq_len}"
            )
        if g_q.dtype != qkv.dtype or TILE_ROWS % tile.rows or tile.rows < 16:
            raise ValueError(
                f"rotary_qk_norm: sums want {qkv.dtype} and 16, 32 or 64 rows of a program, "
                f"not {g_q.dtype} and {tile.rows}"
            )
    else:
        matrices.append(("g_q", g_q, num_heads))
    for name, g, heads in matrices:
        shape = (rows, heads * head_dim)
        if g.shape != shape or g.stride(1) != 1 or g.dtype != qkv.dtype:
            raise ValueError(
                f"rotary_qk_norm: {name} must be {shape} in {qkv.dtype} with contiguous rows"
            )


def rotary_qk_norm_bwd(
    g_q,  # (N, H*D) upstream gradient, stride 1 along the rows, or AttentionSums (B, T, H, 128)
    g_k,  # (N, K*D) upstream gradient, stride 1 along the rows
    g_v,  # (N, K*D) upstream gradient, stride 1 along the rows
    qkv,  # (N, (H + 2K)*D) as the forward pass overwrote it; v is not read
    rstd,  # (H + K, N) fp32
    tokens,  # (N,) integer, or None
    table,  # (R, K*D), or None
    gate,  # (N, K) logits, or None
    cos,  # (>= seq_len, D) fp32
    sin,  # (>= seq_len, D) fp32
    seq_len,
    scaling=None,
):
    """Gradients of the fused buffer, of the gate and of each position's value embedding.

    Args:
        scaling: kernels.common.fp8.Scaling of g_qkv as an FP8 operand; None for a plain tensor.

    Returns:
        g_qkv (N, (H + 2K)*D), an FP8Operand or a tensor in qkv's dtype; g_gate (N, K) in gate's
        dtype, and g_values (N, K*D) in the table's dtype, the gradients of the
        looked-up table rows, which kernels.embedding_grad adds up by token. The last two are None
        without a table; g_gate is NaN where a token is outside of it.

    Raises:
        ValueError: tensors that are not contiguous or do not fit together; with a scaling, rows
            that are not aligned (kernels.common.fp8.check_alignment), or a head size that is not a
            power of two from 32.
    """
    rows, head_dim = qkv.size(0), cos.size(1)
    summed = isinstance(g_q, AttentionSums)
    num_heads = g_q.shape[2] if summed else g_q.size(1) // head_dim
    kv_heads = _check(qkv, tokens, table, gate, cos, sin, seq_len, num_heads)
    check_tensor("rotary_qk_norm", "rstd", rstd, (num_heads + kv_heads, rows), torch.float32)
    if summed:
        config = tuned("rotary_qk_norm_bwd_sums", TILE_BWD, num_heads * head_dim)
    else:
        config = tuned("rotary_qk_norm_bwd", TILE_BWD, num_heads * head_dim)
    _check_gradients(g_q, g_k, g_v, qkv, num_heads, kv_heads, head_dim, seq_len, config)
    gq, factor = (g_q.sums, g_q.factor) if summed else (g_q, None)
    if scaling is not None:
        if head_dim < 32 or head_dim & (head_dim - 1):
            raise ValueError(f"rotary_qk_norm: FP8 wants heads of 32, 64, ... and not {head_dim}")
        check_alignment(
            "rotary_qk_norm", g_q=gq, g_k=g_k, g_v=g_v, qkv=qkv, table=table, cos=cos, sin=sin
        )
    if scaling is None:
        g_qkv, operand = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device), None
    else:
        g_qkv, operand = None, empty_operand(*qkv.shape, scaling, qkv.device)
    data, transposed, scale, amax = operand_args(operand, scaling)
    g_gate = None if table is None else torch.empty_like(gate)
    g_values = None if table is None else table.new_empty(rows, kv_heads * head_dim)
    groups = triton.cdiv(num_heads, config.heads) + 2 * triton.cdiv(kv_heads, config.heads)
    rotary_qk_norm_bwd_kernel[(triton.cdiv(rows, config.rows) * groups,)](
        gq_ptr=gq,
        gq_factor=factor,
        gk_ptr=g_k,
        gv_ptr=g_v,
        qkv_ptr=qkv,
        rstd_ptr=rstd,
        cos_ptr=cos,
        sin_ptr=sin,
        tokens_ptr=tokens,
        table_ptr=table,
        gate_ptr=gate,
        gate_grad_ptr=g_gate,
        value_grad_ptr=g_values,
        dx_ptr=g_qkv,
        data_ptr=data,
        transposed_ptr=transposed,
        scale_ptr=scale,
        amax_ptr=amax,
        N=rows,
        T=seq_len,
        R=0 if table is None else table.size(0),
        H=num_heads,
        K=kv_heads,
        gq_stride=gq.stride(0),
        gk_stride=g_k.stride(0),
        gv_stride=g_v.stride(0),
        qkv_stride=qkv.stride(0),
        **_launch_sizes(config, head_dim),
    )
    return g_qkv if operand is None else operand, g_gate, g_values


class _RotaryQKNorm(torch.autograd.Function):
    """rotary_qk_norm for autograd: gradients of qkv, table and gate.

    It overwrites qkv without marking it dirty, because autograd does not let an in-place Function
    return several views of one buffer; increasing qkv's version counter by hand makes autograd
    raise if another function needs its old values.
    """

    @staticmethod
    def forward(
        ctx,
        qkv,  # (N, (H + 2K)*D)
        tokens,  # (N,), or None
        table,  # (R, K*D), or None
        gate,  # (N, K), or None
        cos,  # (>= seq_len, D)
        sin,  # (>= seq_len, D)
        seq_len,
        num_heads,
    ):
        rstd = rotary_qk_norm_fwd(qkv, tokens, table, gate, cos, sin, seq_len, num_heads)
        torch.autograd.graph.increment_version(qkv)
        ctx.save_for_backward(qkv, rstd, tokens, table, gate, cos, sin)
        ctx.seq_len = seq_len
        head_dim = cos.size(1)
        heads = qkv.detach().view(-1, seq_len, qkv.size(1) // head_dim, head_dim)
        kv_heads = (heads.size(2) - num_heads) // 2
        return heads.split([num_heads, kv_heads, kv_heads], dim=2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx,
        *grads,  # of q, k and v: (B, T, H or K, D), any strides
    ):
        qkv, rstd, tokens, table, gate, cos, sin = ctx.saved_tensors
        rows = [g.reshape(qkv.size(0), -1) for g in grads]
        rows = [g if g.stride(1) == 1 else g.contiguous() for g in rows]
        g_qkv, g_gate, g_values = rotary_qk_norm_bwd(
            *rows, qkv, rstd, tokens, table, gate, cos, sin, ctx.seq_len
        )
        g_table = None
        if table is not None and ctx.needs_input_grad[2]:
            order = sort_rows(tokens, table.size(0))
            g_table = embedding_grad(g_values, order, torch.zeros_like(table))
        return g_qkv, None, g_table, g_gate, None, None, None, None


def rotary_qk_norm(
    qkv,  # (N, (H + 2K)*D) bf16 or fp32, contiguous; overwritten
    cos,  # (>= seq_len, D) fp32
    sin,  # (>= seq_len, D) fp32, second half negated
    seq_len,
    num_heads,
    tokens=None,  # (N,) integer
    table=None,  # (R, K*D) value embeddings
    gate=None,  # (N, K) logits
):
    """q (B, T, H, D), k and v (B, T, K, D) for attention, from a fused QKV projection's result.

    The three are views of qkv, which is overwritten: later uses of qkv itself see the new values
    and get no gradient through this function. The function that produced qkv must not need its
    output in its backward pass (a matrix product does not); autograd raises if it does. With
    tokens, table and gate, v += 3*sigmoid(gate)*table[token], NaN for a token outside of the table.
    Differentiable in qkv, table, gate.

    Raises:
        ValueError: qkv is a leaf that requires a gradient; tensors that are not contiguous or do
            not fit together.
    """
    if qkv.is_leaf and qkv.requires_grad and torch.is_grad_enabled():
        raise ValueError("rotary_qk_norm overwrites qkv, which may not be a leaf with a gradient")
    if not qkv.is_contiguous():
        raise ValueError("rotary_qk_norm takes a contiguous qkv; call .contiguous() on it")
    return _RotaryQKNorm.apply(qkv, tokens, table, gate, cos, sin, seq_len, num_heads)
