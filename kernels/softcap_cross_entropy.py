"""Softcapped cross-entropy over a padded vocabulary (softcap: Gemma 2, arXiv 2408.00118).

    z = cap * tanh(logits / cap) in fp32,   loss_n = logsumexp(z_n) - z_n[target_n]

Columns at and beyond vocab_size are padding and take no part. Bytes: N*V logits read; with the
gradient, N*V written. FLOPs: about 6 per logit.
"""

import torch
import torch.nn.functional as F

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
    return softcap * torch.tanh(logits / softcap)


def softcap_cross_entropy_ref(
    logits,  # (N, V_padded)
    targets,  # (N,) int64; IGNORE_INDEX positions give loss 0 and leave the mean
    vocab_size,
    softcap=LOGIT_SOFTCAP,
    reduction="mean",
):
    """Cross-entropy in nats: a scalar for "mean" and "sum", (N,) for "none"; fp32 or fp64."""
    return F.cross_entropy(
        softcap_ref(logits, vocab_size, softcap),
        targets,
        ignore_index=IGNORE_INDEX,
        reduction=reduction,
    )
