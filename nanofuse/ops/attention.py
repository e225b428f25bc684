"""What comes before attention: rotary embedding, norm and gain of q and k, gated values."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanofuse.ops.backend import Backend, runs_kernel


def rotary_table(
    seq_len: int,
    head_dim: int,
    base: float = 100_000.0,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles for `rotary_qk_norm`, each (seq_len, head_dim) fp32.

    The angle of pair i at position t is t / base^(2i / head_dim), in radians. sin is negated for
    the second half of a head.

    Source: RoFormer, https://arxiv.org/abs/2104.09864.

    >>> from nanofuse import ops
    >>> cos, sin = ops.rotary_table(4, 8)
    >>> cos.shape, cos[0, 0].item(), sin[0, 0].item()
    (torch.Size([4, 8]), 1.0, 0.0)
    """
    from nanofuse.kernels import rotary_qk_norm as op

    return op.rotary_table(seq_len, head_dim, base, device)


def rotary_qk_norm(
    qkv: Tensor,  # (B, T, (H + 2K)*D) bf16 or fp32: heads of q, then k, then v
    cos: Tensor,  # (>= T, D) fp32, see rotary_table
    sin: Tensor,  # (>= T, D) fp32
    num_heads: int,
    *,
    tokens: Tensor | None = None,  # (B, T) integer, in [0, R)
    table: Tensor | None = None,  # (R, K*D) value embeddings
    gate: Tensor | None = None,  # (B, T, K) logits
    in_place: bool = False,
    backend: Backend = "kernel",
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, T, H, D), k and v (B, T, K, D) for attention, from one projection; differentiable.

        q, k:  1.2 * rms_norm(rotary(.)), per head
        v:     v + 3 * sigmoid(gate) * table[token], if these are given

    Args:
        num_heads: H; D comes from cos, K from the width of qkv.
        in_place: the kernel writes into qkv, which spares a copy and its memory; the results are
            views of it. Its producer must not need its own result in its backward pass (a matrix
            product does not). "eager" leaves qkv as it is.

    Sources: RoFormer (https://arxiv.org/abs/2104.09864), query-key norm
    (https://arxiv.org/abs/2010.04245), value embeddings of https://github.com/karpathy/nanochat.

    Raises:
        RuntimeError, ValueError: see `nanofuse.ops`.
        ValueError: shapes that do not fit; some of tokens, table and gate without the others;
            in_place on a leaf that requires a gradient.
        IndexError: a token outside of the table, for "eager". The kernel makes v NaN there.

    >>> import torch
    >>> from nanofuse import ops
    >>> cos, sin = ops.rotary_table(4, 8)
    >>> qkv = torch.ones(1, 4, (2 + 2 * 1) * 8)
    >>> q, k, v = ops.rotary_qk_norm(qkv, cos, sin, num_heads=2, backend="eager")
    >>> q.shape, k.shape, round(q[0, 0, 0, 0].item(), 4), v[0, 0, 0, 0].item()
    (torch.Size([1, 4, 2, 8]), torch.Size([1, 4, 1, 8]), 1.2, 1.0)
    """
    if qkv.dim() != 3:
        raise ValueError(f"rotary_qk_norm: qkv must be (B, T, (H + 2K)*D), not {tuple(qkv.shape)}")
    if len({x is None for x in (tokens, table, gate)}) > 1:
        raise ValueError("rotary_qk_norm: tokens, table and gate go together")
    batch, seq_len, width = qkv.shape
    head_dim = cos.size(-1)
    kv_heads, rest = divmod(width - num_heads * head_dim, 2 * head_dim)
    if rest or kv_heads < 1:
        raise ValueError(
            f"rotary_qk_norm: rows of {width} do not hold {num_heads} query heads and as many key "
            f"as value heads of {head_dim}"
        )
    extra = {"tokens": tokens, "table": table, "gate": gate}
    kernel = runs_kernel("rotary_qk_norm", backend, {"qkv": qkv, "cos": cos, "sin": sin, **extra})
    from nanofuse.kernels import rotary_qk_norm as op

    if not kernel:
        heads = qkv.unflatten(-1, (-1, head_dim))
        q, k, v = heads.split([num_heads, kv_heads, kv_heads], dim=2)
        q, k = op.rotary_qk_norm_ref(q, k, cos[:seq_len], sin[:seq_len])
        if tokens is not None and table is not None:
            values = F.embedding(tokens, table).unflatten(-1, (-1, head_dim))
            v = op.value_gate_ref(v, gate, values)
        return q, k, v
    if not in_place:
        qkv = qkv.clone(memory_format=torch.contiguous_format)
    elif qkv.is_leaf and qkv.requires_grad and torch.is_grad_enabled():
        raise ValueError("rotary_qk_norm: in_place, qkv may not be a leaf that wants a gradient")
    from nanofuse.ops.launch import launch

    return launch(
        op.rotary_qk_norm,
        qkv.reshape(batch * seq_len, width),
        cos,
        sin,
        seq_len,
        num_heads,
        **extra,
    )
