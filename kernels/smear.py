"""Smear: mix the previous position's embedding into each position (karpathy/nanochat at dc54a1a).

    y_t = x_t + smear_lambda * sigmoid(gate_t) * x_{t-1},        y_0 = x_0

Bytes: x read, y written (x_{t-1} comes from cache). FLOPs: 2 per element.
"""

import torch


def smear_ref(
    x,  # (B, T, D) normalised embeddings
    gate,  # (B, T, 1) logits
    smear_lambda,  # (1,)
    prev_embedding=None,  # (B, D): x before x[:, 0], or None at the start of a row
):
    """Smeared stream, (B, T, D) in x's dtype; position 0 is unchanged without prev_embedding."""
    scale = smear_lambda.to(x.dtype) * torch.sigmoid(gate)  # (B, T, 1)
    if prev_embedding is None:
        return torch.cat([x[:, :1], x[:, 1:] + scale[:, 1:] * x[:, :-1]], dim=1)
    previous = torch.cat([prev_embedding[:, None], x[:, :-1]], dim=1)  # (B, T, D)
    return x + scale * previous
