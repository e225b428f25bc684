"""Backout: subtract the mid-depth residual stream from the final one (karpathy/nanochat, dc54a1a).

    y = x - backout_lambda * x_mid

It is a residual mix with x0 = x_mid and x0_lambda = -backout_lambda, so the kernel of
kernels/residual_mix.py computes it, together with the residual add of the last block's branch and
the RMSNorm before lm_head. Bytes: x, branch and x_mid read, y and its norm written. FLOPs: 3 per
element, and the norm's.
"""

from nanofuse.kernels.residual_mix import residual_mix


def backout_ref(
    x,  # (B, T, D) stream after the last block
    x_mid,  # (B, T, D) stream after block n_layer // 2
    backout_lambda,  # (1,)
):
    """x - backout_lambda * x_mid, (B, T, D) in x's dtype."""
    return x - backout_lambda.to(x.dtype) * x_mid


def backout(
    x,  # (B, T, D) stream, contiguous
    x_mid,  # (B, T, D) stream after block n_layer // 2, contiguous
    backout_lambda,  # (1,)
    branch=None,  # (B, T, D) output of the last block's branch, if not yet added to x
):
    """x + branch - backout_lambda * x_mid and its RMSNorm, both (B, T, D); differentiable."""
    return residual_mix(x, branch, x_mid, x0_lambda=-backout_lambda.view(()))
