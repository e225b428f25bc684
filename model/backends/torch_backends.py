"""Attention backends of torch itself: scaled_dot_product_attention and flex_attention."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from nanofuse.model.backends.base import AttentionBackend


def window_mask(
    q_positions,  # (Tq,) int64
    k_positions,  # (Tk,) int64
    window,
):
    """(Tq, Tk) bool: True where the query may see the key."""
    distance = q_positions[:, None] - k_positions[None, :]
    return (distance >= 0) & (distance <= window)


class SDPAttention(AttentionBackend):
    """torch.nn.functional.scaled_dot_product_attention with an exact window mask.

    On a GPU `deterministic` selects the unfused implementation, which stores (B, H, T, T) scores:
    the backward passes of the fused ones accumulate with atomics.
    """

    def __call__(
        self,
        q,  # (B, Tq, H, D)
        k,  # (B, Tk, K, D)
        v,  # (B, Tk, K, D)
        window,
    ):
        """Attend; with Tk > Tq the queries are the last Tq of the Tk positions (KV cache)."""
        t_q, t_k = q.size(1), k.size(1)
        if t_q == t_k and window >= t_k - 1:
            mask = {"is_causal": True}
        else:
            positions = torch.arange(t_k, device=q.device)
            mask = {"attn_mask": window_mask(positions[t_k - t_q :], positions, window)}
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        exact = self.deterministic and q.is_cuda
        with sdpa_kernel(SDPBackend.MATH) if exact else nullcontext():
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.size(1) != k.size(1), **mask)
        return y.transpose(1, 2)


def _visible_within(window):
    """flex_attention's mask_mod for a window. The window is a closure variable, not a default
    argument: dynamo does not guard on defaults, so a second window would silently run the code
    compiled for the first.
    """

    def visible(b, h, q, k):
        return (q >= k) & (q - k <= window)

    return visible


class FlexAttention(AttentionBackend):
    """torch's flex_attention, compiled; `prepare` builds the block mask of every window once.

    Its kernels use no atomics, so `deterministic` changes nothing.
    """

    any_length = False

    def __init__(self, deterministic=False):
        super().__init__(deterministic)
        self.block_masks = {}
        self.kernel = torch.compile(flex_attention, dynamic=False)

    def prepare(self, seq_len, windows, device):
        """Build the block mask of every distinct window for rows of seq_len tokens."""
        for window in set(windows):
            self.block_masks[window] = create_block_mask(
                _visible_within(window), None, None, seq_len, seq_len, device=device
            )

    def __call__(
        self,
        q,  # (B, T, H, D)
        k,  # (B, T, K, D)
        v,  # (B, T, K, D)
        window,
    ):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y = self.kernel(
            q, k, v, block_mask=self.block_masks[window], enable_gqa=q.size(1) != k.size(1)
        )
        return y.transpose(1, 2)
