"""Selects the attention backend: the one named, or the first that passes a self-check here.

The reason for the choice is returned too, for the training log.
"""

import torch

from nanofuse.model import providers
from nanofuse.model.backends.torch_backends import SDPAttention
from nanofuse.model.config import GPTConfig

CHECKED_BEYOND_WINDOW = 256  # the self-check's sequence exceeds the window by so many positions


def forward_and_backward(
    backend,
    tensors,  # q (B, T, H, D), k, v (B, T, K, D), grad_y (B, T, H, D)
    window,
    dtype,
):
    """Run attention in `dtype`: y, grad_q, grad_k, grad_v, each shaped like its tensor."""
    q, k, v, grad_y = (x.to(dtype) for x in tensors)
    y, saved = backend.forward(q, k, v, window)
    return y, *backend.backward(saved, grad_y)


def _distance(
    got,  # any shape
    exact,  # the same shape, fp64
):
    """||got - exact|| / ||exact||."""
    return ((got.double() - exact).norm() / exact.norm()).item()


def self_check(backend, device, config):
    """Largest relative error of `backend` on a small bf16 forward and backward pass.

    The reference is SDPA in fp64. Two cases: the shortest window of `config` (a GPTConfig) and full
    causal attention, both with its head size and its ratio of query to key heads. q, k, v and
    grad_y are non-contiguous views of one buffer.

    Raises:
        RuntimeError: a relative error above twice that of SDPA in bf16, or NaN.
    """
    batch, kv_heads, short = 2, 2, min(config.windows)
    heads = kv_heads * config.n_head // config.n_kv_head
    seq_len = min(config.sequence_len, short + CHECKED_BEYOND_WINDOW)
    counts = (heads, kv_heads, kv_heads, heads)  # of q, k, v and grad_y
    worst = 0.0
    for window in sorted({short, seq_len}):
        generator = torch.Generator(device).manual_seed(0)
        shape = (batch, seq_len, sum(counts), config.head_dim)
        fused = torch.randn(shape, device=device, generator=generator).bfloat16()
        tensors = fused.split(counts, dim=2)
        backend.prepare(seq_len, [window], device)
        exact = forward_and_backward(SDPAttention(), tensors, window, torch.float64)
        base = forward_and_backward(SDPAttention(), tensors, window, torch.bfloat16)
        got = forward_and_backward(backend, tensors, window, torch.bfloat16)
        names = ("y", "grad_q", "grad_k", "grad_v")
        for label, x, reference, truth in zip(names, got, base, exact, strict=True):
            error = _distance(x, truth)
            allowed = 2 * _distance(reference, truth) + 1e-3  # an eighth of bf16's spacing
            if not error <= allowed:
                raise RuntimeError(
                    f"{label} of window {window} is off by {error:.3g}, {allowed:.3g} is allowed"
                )
            worst = max(worst, error)
    return worst


def select_attention(name, need, deterministic=False, config=None):
    """The providers.Choice of an attention backend.

    Args:
        name: of a record of providers.ATTENTION, or "auto": the first that works on a GPU, SDPA
            elsewhere.
        need: providers.Need.
        deterministic: require a backward pass with the same bits on every run.
        config: GPTConfig whose head counts, head size and windows the self-check of "auto" uses;
            None stands for the recipe's depth 4.

    Raises:
        ValueError: an unknown name, or a backend that cannot run here.
    """
    config = config or GPTConfig.from_depth(4)

    def agrees(backend):
        return f"agrees with SDPA to {self_check(backend, need.device, config):.1g}"

    check = agrees if need.device == "cuda" else None
    return providers.choose(providers.ATTENTION, name, need, deterministic, check=check)
