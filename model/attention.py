"""Causal sliding-window attention behind one call: attention(q, k, v, window) -> y.

A query at position i sees the keys at positions j with 0 <= i - j <= window. Every backend takes
q (B, T, H, D) and k, v (B, T, K, D) with K dividing H, and returns (B, T, H, D). A new backend is
a class with `name`, `prepare` and `__call__`, entered in BACKENDS.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from model.errors import UserError


def window_mask(
    q_positions,  # (Tq,) int64
    k_positions,  # (Tk,) int64
    window,
):
    """(Tq, Tk) bool: True where the query may see the key."""
    distance = q_positions[:, None] - k_positions[None, :]
    return (distance >= 0) & (distance <= window)


class SDPAttention:
    """torch.nn.functional.scaled_dot_product_attention with an exact window mask."""

    name = "sdpa"

    def prepare(self, seq_len, windows, device):
        """Nothing to prepare: masks are made on the fly."""

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
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.size(1) != k.size(1), **mask)
        return y.transpose(1, 2)


def _visible_within(window):
    """mask_mod of flex_attention. The window is a closure cell, not a default argument: dynamo
    does not guard on defaults, so a second window would silently run with the first one's code.
    """

    def visible(b, h, q, k):
        return (q >= k) & (q - k <= window)

    return visible


class FlexAttention:
    """torch flex_attention, compiled; block masks are built once by `prepare`."""

    name = "flex"

    def __init__(self):
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


BACKENDS = {backend.name: backend for backend in (SDPAttention, FlexAttention)}
CUDA_ONLY = {"flex"}


def select_attention(name, device_type):
    """Attention backend and the reason for it, as (object, str); name "auto" picks by device.

    Raises:
        UserError: an unknown name, or one that needs a GPU on a machine without.
    """
    if name == "auto":
        name = "flex" if device_type == "cuda" else "sdpa"
        return BACKENDS[name](), f"auto on {device_type}"
    if name not in BACKENDS:
        raise UserError(f"--attention {name!r} is unknown; choose from auto, {', '.join(BACKENDS)}")
    if name in CUDA_ONLY and device_type != "cuda":
        raise UserError(f"--attention {name} needs a CUDA GPU; use --attention sdpa")
    return BACKENDS[name](), "asked for"
