"""Logits of the value embeddings' gate: a linear layer on the first G channels of a normalised row.

    n_g = y_g * rstd  (g < G),    logit_k = sum_g n_g * w_kg      per key/value head k

Source: modded-nanogpt's gated value embeddings, as in nanochat
(https://github.com/karpathy/nanochat). Backward, with h the upstream gradient (of the logits):

    grad n_g += sum_k h_k * w_kg,    grad w_kg += sum over positions of h_k * n_g

The product is too thin for tensor cores (12 terms, 8 columns), so it is computed by plain fp32
arithmetic, summed in a fixed order. kernels/rotary_qk_norm.py consumes the logits and produces
their gradient.

Bytes per position, K heads: 32 (one sector of y's row) + 4 (rstd) + 4*K; backward 64 more.
FLOPs: 2*N*K*G forward, twice that backward.
"""

import torch

from nanofuse.kernels.common.jit import tl, triton

ROWS = 128  # positions per program


def gate_logits_ref(
    y,  # (N, C)
    rstd,  # (N,)
    weight,  # (K, G)
):
    """Logits (N, K) in weight's dtype."""
    normed = y[:, : weight.size(1)].to(weight.dtype) * rstd[:, None]
    return normed @ weight.t()


@triton.jit
def _normed(
    y_ptr,  # (N, C)
    rstd_ptr,  # (N,) fp32
    N,
    C,
    G: tl.constexpr,
    BG: tl.constexpr,
    BM: tl.constexpr,
):
    """Load and normalise the program's block of y: row indices (BM,) int64, channel indices (BG,),
    the block's mask (BM, BG), and the normalised values (BM, BG) fp32."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    channels = tl.arange(0, BG)
    ok = (rows < N)[:, None] & (channels < G)[None, :]
    y = tl.load(y_ptr + rows[:, None] * C + channels[None, :], mask=ok, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=rows < N, other=0.0)
    return rows, channels, ok, y.to(tl.float32) * rstd[:, None]


@triton.jit
def _gate_logits_fwd_kernel(
    y_ptr,  # (N, C)
    rstd_ptr,  # (N,) fp32
    weight_ptr,  # (K, G) fp32
    logits_ptr,  # (N, K) fp32
    N,
    C,
    K,
    G: tl.constexpr,
    BG: tl.constexpr,
    BM: tl.constexpr,
):
    rows, channels, _, normed = _normed(y_ptr, rstd_ptr, N, C, G, BG, BM)
    for k in range(K):
        weight = tl.load(weight_ptr + k * G + channels, mask=channels < G, other=0.0)
        logits = tl.sum(normed * weight[None, :], axis=1)
        tl.store(logits_ptr + rows * K + k, logits, mask=rows < N)


@triton.jit
def _gate_logits_bwd_kernel(
    grad_logits_ptr,  # (N, K) fp32
    y_ptr,  # (N, C)
    rstd_ptr,  # (N,) fp32
    weight_ptr,  # (K, G) fp32
    grad_normed_ptr,  # (N, C), added to
    partial_ptr,  # (programs, K, G) fp32
    N,
    C,
    K,
    G: tl.constexpr,
    BG: tl.constexpr,
    BM: tl.constexpr,
):
    rows, channels, ok, normed = _normed(y_ptr, rstd_ptr, N, C, G, BG, BM)
    grad_normed = tl.zeros((BM, BG), tl.float32)
    partial_ptr += tl.program_id(0).to(tl.int64) * K * G
    for k in range(K):
        h = tl.load(grad_logits_ptr + rows * K + k, mask=rows < N, other=0.0)[:, None]
        weight = tl.load(weight_ptr + k * G + channels, mask=channels < G, other=0.0)
        grad_normed += h * weight[None, :]
        tl.store(partial_ptr + k * G + channels, tl.sum(h * normed, axis=0), mask=channels < G)
    grad_ptr = grad_normed_ptr + rows[:, None] * C + channels[None, :]
    grad_normed += tl.load(grad_ptr, mask=ok, other=0.0).to(tl.float32)
    tl.store(grad_ptr, grad_normed.to(grad_normed_ptr.dtype.element_ty), mask=ok)


def _check(y, rstd, weight, **more):
    n, c = y.shape
    heads, channels = weight.shape
    shapes = {"y": (n, c), "rstd": (n,), "weight": (heads, channels)}
    shapes |= {"grad_logits": (n, heads), "grad_normed": (n, c), "grad_weight": weight.shape}
    for name, x in {"y": y, "rstd": rstd, "weight": weight, **more}.items():
        if not x.is_contiguous() or x.shape != shapes[name]:
            raise ValueError(
                f"gate_logits: {name} must be contiguous and {tuple(shapes[name])}, "
                f"got {tuple(x.shape)}"
            )
    if channels > c:
        raise ValueError(f"gate_logits: {channels} channels of rows of {c}")


def gate_logits_fwd(
    y,  # (N, C) bf16 or fp32, before the norm
    rstd,  # (N,) fp32: the norm's inverse root mean squares
    weight,  # (K, G) fp32
):
    """Logits (N, K) fp32: the first G channels of y * rstd, times weight transposed.

    Raises:
        ValueError: a tensor that is not contiguous or does not fit the others.
    """
    _check(y, rstd, weight)
    (n, c), (heads, channels) = y.shape, weight.shape
    logits = torch.empty(n, heads, dtype=torch.float32, device=y.device)
    block = triton.next_power_of_2(channels)
    _gate_logits_fwd_kernel[(triton.cdiv(n, ROWS),)](
        y_ptr=y,
        rstd_ptr=rstd,
        weight_ptr=weight,
        logits_ptr=logits,
        N=n,
        C=c,
        K=heads,
        G=channels,
        BG=block,
        BM=ROWS,
    )
    return logits


def gate_logits_bwd(
    grad_logits,  # (N, K) fp32
    y,  # (N, C) bf16 or fp32
    rstd,  # (N,) fp32
    weight,  # (K, G) fp32
    grad_normed,  # (N, C) bf16 or fp32: gradient of the normalised rows; first G columns added to
    grad_weight,  # (K, G) fp32, added to
):
    """Accumulate the gradients of the normalised channels and of the weight, in place.

    Raises:
        ValueError: a tensor that is not contiguous or does not fit the others.
    """
    more = {"grad_logits": grad_logits, "grad_normed": grad_normed, "grad_weight": grad_weight}
    _check(y, rstd, weight, **more)
    (n, c), (heads, channels) = y.shape, weight.shape
    programs = triton.cdiv(n, ROWS)
    partial = torch.empty(programs, heads, channels, dtype=torch.float32, device=y.device)
    block = triton.next_power_of_2(channels)
    _gate_logits_bwd_kernel[(programs,)](
        grad_logits_ptr=grad_logits,
        y_ptr=y,
        rstd_ptr=rstd,
        weight_ptr=weight,
        grad_normed_ptr=grad_normed,
        partial_ptr=partial,
        N=n,
        C=c,
        K=heads,
        G=channels,
        BG=block,
        BM=ROWS,
    )
    grad_weight += partial.sum(dim=0)
