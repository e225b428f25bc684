"""A GEMM with rotary embedding, RMSNorm and gain of q and k, and the values' embeddings, in its
epilogue; FP8, on Hopper.

    qkv = x w^T,   then what kernels/rotary_qk_norm.py does to it        x (N, C), w ((H + 2K)*D, C)

The attention's first linear layer with all that follows up to attention itself. It runs on a panel
(kernels/common/panel.py), whose tile is a head, so D is 128; `takes` says what else it wants. In
all other cases a product and kernels/rotary_qk_norm.py do the same, and their backward pass is this
op's: it is defined by its results, qkv and rstd.

Accuracy. The product accumulates in fp32 (fast accumulation of FP8, as cuBLAS's) and is rounded
once, to bf16, at the end; apart, it is rounded in between, too. Cosines and sines are read in fp16,
whose error of 2^-12 is an eighth of the rounding to bf16.

FLOPs: 2*N*C*(H + 2K)*D. Bytes: C*(N + (H + 2K)*D) for the operands, 2*N*(H + 2K)*D written, and
2*N*K*D for an embedding; apart 4*N*(H + K)*D more, and with an embedding 4*N*K*D.
"""

import torch

from nanofuse.kernels.common import panel
from nanofuse.kernels.common.checks import check_tensor
from nanofuse.kernels.common.fp8 import E4M3, FP8Operand, check_alignment
from nanofuse.kernels.linear_rotary_qk_norm_panel_kernels import (
    OP,
    linear_rotary_qk_norm_panel,
)
from nanofuse.kernels.rotary_qk_norm import check, rotary_qk_norm_ref, value_gate_ref

HEAD_DIM = 128  # a head is a tile


def linear_rotary_qk_norm_ref(
    x,  # (B, T, C)
    w,  # ((H + 2K)*D, C)
    cos,  # (T, D)
    sin,  # (T, D), second half negated
    num_heads,
    gate=None,  # (B, T, K) logits
    value_embedding=None,  # (B, T, K, D)
):
    """q (B, T, H, D), k and v (B, T, K, D) of x, ready for attention, in x's dtype."""
    heads = (x @ w.t()).view(*x.shape[:2], -1, cos.size(-1))
    kv_heads = (heads.size(2) - num_heads) // 2
    q, k, v = heads.split([num_heads, kv_heads, kv_heads], dim=2)
    if gate is not None:
        v = value_gate_ref(v, gate, value_embedding)
    return *rotary_qk_norm_ref(q, k, cos, sin), v


def pack_angles(
    cos,  # (T, D) fp32
    sin,  # (T, D) fp32, second half negated
):
    """(T, D / 2) int32: the first half of both as fp16 numbers, the cosine in the low bytes."""
    half = cos.size(1) // 2
    pairs = torch.stack([cos[:, :half], sin[:, :half]], dim=-1).half()
    return pairs.view(torch.int32).squeeze(-1)


def fits(device, rows, cols, terms, head_dim):
    """Whether this op computes an FP8 product of rows x cols on this device: on Hopper, of sizes
    that are multiples of 128, at most 2,048 terms and heads of 128."""
    return head_dim == HEAD_DIM and panel.takes("rotary_qk_norm", device, rows, cols, terms)


def takes(
    x,  # FP8Operand (N, C), or a tensor
    w,  # FP8Operand ((H + 2K)*D, C), or a tensor
    head_dim,
):
    """Whether this op computes the product of x and w: e4m3, where it `fits`."""
    return (
        isinstance(x, FP8Operand)
        and x.data.dtype == w.data.dtype == E4M3
        and x.data.size(1) == w.data.size(1)
        and fits(x.data.device, *x.data.shape[:1], *w.data.shape, head_dim)
    )


def linear_rotary_qk_norm_fwd(
    x,  # FP8Operand (N, C)
    w,  # FP8Operand ((H + 2K)*D, C)
    tokens,  # (N,) integer, or None: without a table v is the product
    table,  # (R, K*D) value embeddings, or None
    gate,  # (N, K) logits, or None
    angles,  # (seq_len, D / 2) int32 of pack_angles
    num_heads,
):
    """q, k and v of x, ready for attention.

    Row n has position n % seq_len. Where a token is outside of [0, R), v is NaN.

    Returns:
        qkv (N, (H + 2K)*D) bf16, and rstd (H + K, N) fp32: the inverse root mean square of every q
        and k head; both as of kernels.rotary_qk_norm.rotary_qk_norm_fwd.

    Raises:
        ValueError: what `takes` says no to; tensors that are not contiguous or do not fit together.
    """
    if not takes(x, w, HEAD_DIM):
        raise ValueError(f"{OP}: takes() refuses these operands, of this device")
    check_tensor(OP, "x", x.data, None)
    check_tensor(OP, "w", w.data, None)
    check_tensor(OP, "angles", angles, (max(len(angles), 1), HEAD_DIM // 2), torch.int32)
    check_alignment(OP, x=x.data, w=w.data)
    (rows, _), cols, device = x.data.shape, w.data.size(0), x.data.device
    qkv = torch.empty(rows, cols, dtype=torch.bfloat16, device=device)
    kv_heads = check(OP, qkv, tokens, table, gate, HEAD_DIM, len(angles), num_heads)
    rstd = torch.empty(num_heads + kv_heads, rows, dtype=torch.float32, device=device)
    linear_rotary_qk_norm_panel(
        x.data, w.data, (x.inverse_scale, w.inverse_scale), qkv, rstd, angles, tokens, table, gate,
        num_heads, kv_heads,
    )  # fmt: skip
    return qkv, rstd
