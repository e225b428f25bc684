"""One Muon step for a stack of matrices of one shape, in place.

    m <- lerp(m, g, 1 - mu);  g <- lerp(g, m, mu)                          (Nesterov)
    u <- newton_schulz(g)                                   (kernels/newton_schulz.py)
    v  = mean of u^2 per row (rows >= cols) or column;  s <- lerp(s, v, 1 - beta2)
    u <- u / sqrt(max(s, 1e-10)), rescaled to its former Frobenius norm    (NorMuon, 2510.05491)
    p <- p - lr'*u - lr'*wd*p*[u*p >= 0],   lr' = lr * sqrt(max(1, rows / cols))

Muon: https://kellerjordan.github.io/posts/muon/. Bytes around the iteration: p and m read and
written, g read, s read and written.
"""

from kernels.newton_schulz import newton_schulz_ref

SECOND_MOMENT_FLOOR = 1e-10


def second_moment_shape(
    shape,  # (N, R, C) of the stack
):
    """Shape of the second moment: (N, R, 1) when R >= C, else (N, 1, C)."""
    n, rows, cols = shape
    return (n, rows, 1) if rows >= cols else (n, 1, cols)


def reduce_variance_ref(
    u,  # (N, R, C) fp32
    second_moment,  # (N, R, 1) or (N, 1, C), updated in place
    beta2,
):
    """Divide rows (columns) by their running root mean square at an unchanged Frobenius norm."""
    dim = -1 if u.size(-2) >= u.size(-1) else -2
    second_moment.lerp_(u.square().mean(dim=dim, keepdim=True), 1 - beta2)
    norm = u.square().sum(dim=(-2, -1), keepdim=True).sqrt()  # (N, 1, 1)
    u = u * second_moment.clamp_min(SECOND_MOMENT_FLOOR).rsqrt()
    new_norm = u.square().sum(dim=(-2, -1), keepdim=True).sqrt()
    return u * (norm / new_norm.clamp_min(SECOND_MOMENT_FLOOR))


def muon_update_ref(
    param,  # (N, R, C) fp32, updated in place
    grad,  # (N, R, C), not changed
    momentum_buffer,  # (N, R, C), updated in place
    second_moment,  # (N, R, 1) or (N, 1, C), updated in place
    lr,  # ()
    momentum,  # ()
    weight_decay,  # ()
    beta2=0.9,
    equilibration="row",
    muon_plus=True,
    compute_dtype=None,
):
    """Update a stack of matrices; `compute_dtype` (default param's) is Newton-Schulz's dtype."""
    momentum_buffer.lerp_(grad, 1 - momentum)
    nesterov = grad.lerp(momentum_buffer, momentum)
    u = newton_schulz_ref(nesterov.to(compute_dtype or param.dtype), equilibration, muon_plus)
    u = reduce_variance_ref(u.to(param.dtype), second_moment, beta2)
    lr = lr * max(1.0, param.size(-2) / param.size(-1)) ** 0.5
    cautious = (u * param) >= 0
    param.sub_(lr * u + lr * weight_decay * param * cautious)
