"""Softcapped cross-entropy over a padded vocabulary (softcap: Gemma 2, arXiv 2408.00118).

    z = cap * tanh(logits / cap) in fp32
    loss_n = logsumexp(z_n) - z_n[target_n],   logsumexp(z_n) = cap + ln sum exp(z_n - cap)

|z| <= cap, so cap stands for the row's maximum and one pass over the row is enough. Columns at
and beyond vocab_size are padding and take no part. Bytes: N*V logits read; with the gradient,
N*V written. FLOPs: about 6 per logit, a tanh and an exp among them.
"""

import torch

IGNORE_INDEX = -1
LOGIT_SOFTCAP = 15.0


def softcap_ref(
    logits,  # (..., V_padded)
    vocab_size,
    softcap=LOGIT_SOFTCAP,
):
    """Cropped and softcapped logits, (..., vocab_size) in fp32 (fp64 stays fp64)."""
    logits = logits[..., :vocab_size]
    if logits.dtype != torch.float64:
        logits = logits.float()
    return softcap * torch.tanh(logits * (1 / softcap))


def softcap_cross_entropy_ref(
    logits,  # (N, V_padded)
    targets,  # (N,) int64; IGNORE_INDEX positions give loss 0 and leave the mean
    vocab_size,
    softcap=LOGIT_SOFTCAP,
    reduction="mean",
):
    """Cross-entropy in nats: a scalar for "mean" and "sum", (N,) for "none"; fp32 or fp64.

    Raises:
        ValueError: an unknown reduction.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"unknown reduction {reduction!r}; choose from mean, sum, none")
    z = softcap_ref(logits, vocab_size, softcap)  # (N, V)
    is_target = torch.arange(vocab_size, device=z.device) == targets[:, None]  # (N, V)
    log_sum = softcap + (z - softcap).exp().sum(dim=-1).log()  # (N,)
    # a masked sum, not a gather: the compiler fuses it, and its gradient needs no scatter
    z_target = torch.where(is_target, z, 0.0).sum(dim=-1)  # (N,)
    counted = targets != IGNORE_INDEX
    losses = torch.where(counted, log_sum - z_target, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counted.sum()
