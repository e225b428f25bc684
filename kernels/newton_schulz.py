"""Orthogonalisation of a batch of matrices: equilibration, Polar Express, Muon+.

    1. equilibrate: scale every row to ||X||_F / sqrt(rows)    (MuonEq, arXiv 2603.28254)
    2. X <- X / (1.01 ||X||_F + 1e-6)
    3. five times: A = X X^T (X^T X when tall), X <- aX + (bA + cA^2) X
                                                               (Polar Express, arXiv 2505.16932)
    4. Muon+: X <- X * sqrt(min(rows, cols)) / ||X||_F         (arXiv 2602.21545)

FLOPs of step 3 for one m x n matrix, m <= n: 5 * (4 m^2 n + 2 m^3). Bytes, without fusion:
5 * 2 * (4 m n + 5 m^2).
"""

import torch

# Polar Express, degree 5, five steps, safety factor 1.01 (arXiv 2505.16932)
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
NORM_MARGIN = 1.01
NORM_EPS = 1e-6
EQUILIBRATIONS = ("row", "col", "none")
NORM_FLOOR = 1e-30  # norms below it count as zero, so that 0 / 0 gives 0


def _norm(x, dim):
    """Euclidean norm in fp32 (fp64 for an fp64 input), reduced dimensions kept."""
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.linalg.vector_norm(wide, dim=dim, keepdim=True)


def equilibrate_ref(
    x,  # (N, R, C)
    mode,
):
    """Scale all rows ("row") or columns ("col") of each matrix to their root-mean-square norm.

    Returns (N, R, C) in x's dtype; rows (columns) of zeros stay zero. "none" returns x.

    Raises:
        ValueError: mode is not one of EQUILIBRATIONS.
    """
    if mode not in EQUILIBRATIONS:
        raise ValueError(f"unknown equilibration {mode!r}; choose from {', '.join(EQUILIBRATIONS)}")
    if mode == "none":
        return x
    norms = _norm(x, dim=-1 if mode == "row" else -2)  # (N, R, 1) or (N, 1, C)
    target = norms.square().mean(dim=(-2, -1), keepdim=True).sqrt()  # (N, 1, 1)
    return (x * (target / norms.clamp_min(NORM_FLOOR))).to(x.dtype)


def polar_express_ref(
    x,  # (N, R, C)
):
    """Approximate polar factor U V^T of each matrix, (N, R, C) in x's dtype."""
    x = (x / (NORM_MARGIN * _norm(x, dim=(-2, -1)) + NORM_EPS)).to(x.dtype)
    tall = x.size(-2) > x.size(-1)
    for a, b, c in POLAR_EXPRESS:
        gram = x.mT @ x if tall else x @ x.mT  # (N, m, m), m = min(R, C)
        poly = b * gram + c * (gram @ gram)
        x = a * x + (x @ poly if tall else poly @ x)
    return x


def muon_plus_ref(
    x,  # (N, R, C)
):
    """Rescale each matrix to Frobenius norm sqrt(min(R, C)); fp32 (N, R, C), zeros stay zero."""
    target = min(x.size(-2), x.size(-1)) ** 0.5
    return x * (target / _norm(x, dim=(-2, -1)).clamp_min(NORM_FLOOR))


def newton_schulz_ref(
    x,  # (N, R, C)
    equilibration="row",
    muon_plus=True,
):
    """Orthogonalise a batch of matrices in x's dtype; returns (N, R, C), fp32 or wider."""
    x = polar_express_ref(equilibrate_ref(x, equilibration))
    if muon_plus:
        return muon_plus_ref(x)
    return x if x.dtype == torch.float64 else x.float()
