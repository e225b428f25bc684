"""Rotary embedding, RMSNorm and gain of q and k; value-embedding gate of v.

    rotary (halves layout):  y1 = x1*cos + x2*sin,   y2 = -x1*sin + x2*cos
    q, k:                    1.2 * rms_norm(rotary(.)), per head
    v:                       v + 3 * sigmoid(gate) * value_embedding, gate per kv head

Sources: RoFormer (https://arxiv.org/abs/2104.09864), query-key norm
(https://arxiv.org/abs/2010.04245), value embeddings as in karpathy/nanochat at dc54a1a.

Bytes, N = B*T positions, H query and K key/value heads of width D at s bytes:
2*N*(H + 2K)*D*s plus N*K*D*s for the value embedding. FLOPs: about 12 per element.
"""

import torch

from kernels.rms_norm import rms_norm_ref

QK_GAIN = 1.2
VALUE_GATE_SCALE = 3.0


def rotary_table(seq_len, head_dim, base, device=None):
    """cos and sin of the rotary angles, each (seq_len, head_dim / 2) fp32."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    positions = torch.arange(seq_len, dtype=torch.float32, device=device)
    angles = torch.outer(positions, 1.0 / base**exponent)  # (seq_len, head_dim / 2)
    return angles.cos(), angles.sin()


def rotary_ref(
    x,  # (B, T, H, D)
    cos,  # (T, D/2)
    sin,  # (T, D/2)
):
    """Rotate the two halves of every head by its position's angles; (B, T, H, D) in x's dtype."""
    x1, x2 = x.chunk(2, dim=-1)  # (B, T, H, D/2) each
    cos, sin = cos[:, None, :], sin[:, None, :]  # (T, 1, D/2)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1).to(x.dtype)


def rotary_qk_norm_ref(
    q,  # (B, T, H, D)
    k,  # (B, T, K, D)
    cos,  # (T, D/2)
    sin,  # (T, D/2)
):
    """Rotate, normalise and scale q and k; returns them in their own shapes and dtypes."""
    q, k = rotary_ref(q, cos, sin), rotary_ref(k, cos, sin)
    return rms_norm_ref(q) * QK_GAIN, rms_norm_ref(k) * QK_GAIN


def value_gate_ref(
    v,  # (B, T, K, D)
    gate,  # (B, T, K) logits
    value_embedding,  # (B, T, K, D)
):
    """Add the gated value embedding to v; (B, T, K, D) in v's dtype."""
    return v + (VALUE_GATE_SCALE * torch.sigmoid(gate)).unsqueeze(-1) * value_embedding
