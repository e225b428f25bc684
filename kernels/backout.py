"""Backout: take the mid-depth stream out of the last one (karpathy/nanochat at dc54a1a).

    y = x - backout_lambda * x_mid

Bytes: x and x_mid read, y written. FLOPs: 2 per element.
"""


def backout_ref(
    x,  # (B, T, D) stream after the last block
    x_mid,  # (B, T, D) stream after block n_layer // 2
    backout_lambda,  # (1,)
):
    """x less the scaled mid-depth stream, (B, T, D) in x's dtype."""
    return x - backout_lambda.to(x.dtype) * x_mid
