"""One AdamW step in place (Loshchilov and Hutter, https://arxiv.org/abs/1711.05101).

    p <- p * (1 - lr*wd);  m <- lerp(m, g, 1 - b1);  v <- lerp(v, g^2, 1 - b2)
    p <- p - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Arithmetic is fp32 or wider whatever the storage. Bytes, n elements of s bytes: 7*n*s
(p, m, v read and written, g read).
"""

import torch


def adamw_ref(
    param,  # any shape, updated in place
    grad,  # param's shape
    exp_avg,  # param's shape, updated in place
    exp_avg_sq,  # param's shape, updated in place
    lr,  # ()
    beta1,  # ()
    beta2,  # ()
    eps,  # ()
    weight_decay,  # ()
    step,  # (), 1 at the first update
):
    """Update one tensor and its two moments."""
    wide = torch.promote_types(param.dtype, torch.float32)
    g = grad.to(wide)
    m = exp_avg.to(wide).lerp(g, 1 - beta1)
    v = exp_avg_sq.to(wide).lerp(g.square(), 1 - beta2)
    denominator = (v / (1 - beta2**step)).sqrt() + eps
    p = param.to(wide) * (1 - lr * weight_decay) - lr * (m / (1 - beta1**step)) / denominator
    param.copy_(p)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
