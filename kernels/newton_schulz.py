"""Orthogonalisation of a batch of matrices: equilibration, Polar Express, Muon+.

    1. equilibrate: every row * (||X||_F / sqrt(rows)) / max(||row||, 1e-6)
                                                               (MuonEq, arXiv 2603.28254)
    2. X <- X / (1.01 ||X||_F + 1e-6)
    3. five times: A = X X^T (X^T X when tall), X <- aX + (bA + cA^2) X
                                                               (Polar Express, arXiv 2505.16932)
    4. Muon+: X <- X * sqrt(min(rows, cols)) / max(||X||_F, 1e-6)
                                                               (arXiv 2602.21545)

`newton_schulz` represents X after step 2 as sigma Z: Z has unit rows, and sigma is one fp32 scale
per matrix. sigma enters only where a Gram matrix is computed from Z, as sigma^2 Z Z^T, and in the
last product. Z and all matrices of the iteration are fp16 (fp32 in the interpreter), which sigma
keeps in range; fp16's three additional mantissa bits make the result ten times as accurate as
bf16. Each step's polynomial P = aI + bA + cA^2 is one symmetric GEMM, with bA and aI in its
epilogue.

The floor of step 1. With s = min(||row||, 1e-6) / 1e-6, row / max(||row||, 1e-6) is s times a unit
row, so that X is t s (unit row) after step 1, t = ||X||_F / sqrt(rows), and its norm t sqrt(sum of
s^2). A row of Z has length s / max(s): the longest is 1, however small all of them are, and fp16
holds Z. max(s) goes into sigma = t max(s) / (1.01 t sqrt(sum of s^2) + 1e-6). Where no row is
below the floor all s are 1, and nothing is shrunk.

Gram iteration, for m <= n / 2 (Gram Newton-Schulz, https://github.com/Dao-AILab/gram-newton-schulz):
all polynomials of one G = X X^T commute, so the m x m updates G <- P G P and Q <- P Q replace the
products with X, and X <- Q X follows once per segment of steps. Errors in small eigenvalues of G
grow, so G is recomputed from X after RESTART steps: in emulated fp16, with a restart after 2 of the
5 steps the error stays below 0.2 x that of the plain iteration in bf16 on decaying and low-rank
spectra; after 3 it is 0.7 x; without a restart it diverges.

FLOPs for one m x n matrix, m <= n, with symmetric products at half cost: plain
5 * (3 m^2 n + m^3), Gram 6 m^2 n + 14 m^3. Bytes: x read once, z and the result written once, and
the operands of the products.
"""

import torch
import torch.nn.functional as F

from nanofuse.kernels.common.checks import check_tensor
from nanofuse.kernels.common.jit import tl, triton
from nanofuse.kernels.common.tuning import Tile, tuned
from nanofuse.kernels.symmetric_matmul import batched_matmul, symmetric_matmul

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
NORM_FLOOR = 1e-6  # of rows (columns) in equilibration, and of the matrix in Muon+
TINY = 1e-30  # norms below it count as zero, so that 0 / 0 gives 0
GRAM_ASPECT = 2  # the Gram iteration is used from this ratio of the sides
RESTART = 2  # steps of its first segment
PADDING = 16  # sides of unaligned matrices are padded with zeros to multiples of it
ROWS_TILE = Tile(rows=1, cols=4096, warps=4)  # narrower rows: more of them, as many elements
RESCALE_TILE = Tile(rows=1, cols=8192, warps=8)
SHRINK_TILE = Tile(rows=32, cols=128, warps=4)


def _norm(x, dim):
    """Euclidean norm in fp32 (fp64 for an fp64 input), reduced dimensions kept."""
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.linalg.vector_norm(wide, dim=dim, keepdim=True)


def equilibrate_ref(
    x,  # (N, R, C)
    mode,
):
    """Scale all rows ("row") or columns ("col") of each matrix to their root-mean-square norm;
    those of a norm below NORM_FLOOR come out shorter in proportion.

    Returns (N, R, C) in x's dtype. "none" returns x.

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
    """Rescale each matrix to Frobenius norm sqrt(min(R, C)), less for norms below NORM_FLOOR; fp32
    (N, R, C)."""
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


@triton.jit
def _unit_rows_kernel(
    x_ptr,  # (M, C)
    z_ptr,  # (M, C) fp16 or fp32
    norm_ptr,  # (M,) fp32
    M,
    C,
    tiny_norm,
    WHOLE: tl.constexpr,  # C <= BC: rows stay in registers; else they are read twice
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    i, j = row[:, None], tl.arange(0, BC)[None, :]
    base = i.to(tl.int64) * C
    if WHOLE:
        inside = (i < M) & (j < C)
        x = tl.load(x_ptr + base + j, mask=inside, other=0.0).to(tl.float32)
        squares = x * x
    else:
        squares = tl.zeros((BM, BC), tl.float32)
        for col in range(0, C, BC):
            inside = (i < M) & (col + j < C)
            x = tl.load(x_ptr + base + col + j, mask=inside, other=0.0).to(tl.float32)
            squares += x * x
    norm = tl.sqrt(tl.sum(squares, axis=1))
    tl.store(norm_ptr + row, norm, mask=row < M)
    tiny = norm < tiny_norm  # false for NaN, which stays
    inverse = tl.where(tiny, 0.0, 1 / tl.where(tiny, 1.0, norm))[:, None]
    if WHOLE:
        tl.store(z_ptr + base + j, (x * inverse).to(z_ptr.dtype.element_ty), mask=inside)
    else:
        for col in range(0, C, BC):
            inside = (i < M) & (col + j < C)
            x = tl.load(x_ptr + base + col + j, mask=inside, other=0.0).to(tl.float32)
            z = (x * inverse).to(z_ptr.dtype.element_ty)
            tl.store(z_ptr + base + col + j, z, mask=inside)


@triton.jit
def _initial_scale_kernel(
    norm_ptr,  # (N, R) fp32
    sigma_ptr,  # (N,) fp32
    longest_ptr,  # (N,) fp32
    R,
    floor,
    margin,
    eps,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    shares = tl.zeros((BLOCK,), tl.float32)
    longest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, R, BLOCK):
        norm = tl.load(norm_ptr + n * R + start + i, mask=start + i < R, other=0.0)
        squares += norm * norm
        share = tl.where(norm < floor, norm / floor, 1.0)
        shares += share * share
        longest = tl.maximum(longest, share)
    target = tl.sqrt(tl.sum(squares, axis=0) / R)
    whole = target * tl.sqrt(tl.sum(shares, axis=0))  # Frobenius norm after equilibration
    most = tl.max(longest, axis=0)
    tl.store(longest_ptr + n, most)
    tl.store(sigma_ptr + n, target * most / (margin * whole + eps))


@triton.jit
def _shrink_rows_kernel(
    z_ptr,  # (N, R, C), updated
    norm_ptr,  # (N, R) fp32
    longest_ptr,  # (N,) fp32
    R,
    C,
    floor,
    tiny_norm,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    norm = tl.load(norm_ptr + n * R + row, mask=row < R, other=floor)
    if tl.min(norm, axis=0) < floor:
        longest = tl.maximum(tl.load(longest_ptr + n), tiny_norm)
        length = (tl.where(norm < floor, norm / floor, 1.0) / longest)[:, None]
        base = (n * R + row[:, None]) * C
        for col in range(0, C, BC):
            j = col + tl.arange(0, BC)[None, :]
            inside = (row[:, None] < R) & (j < C)
            z = tl.load(z_ptr + base + j, mask=inside, other=0.0).to(tl.float32) * length
            tl.store(z_ptr + base + j, z.to(z_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rescale_kernel(
    x_ptr,  # (N, size)
    y_ptr,  # (N, size) fp32
    sums_ptr,  # (N, S) fp32, sums of squares of x
    target,
    size,
    S,
    floor,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    n = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    base = n.to(tl.int64) * size
    x = tl.load(x_ptr + base + i, mask=i < size, other=0.0).to(tl.float32)
    s = tl.arange(0, BLOCK_S)
    squares = tl.zeros((BLOCK_S,), tl.float32)
    for start in range(0, S, BLOCK_S):
        squares += tl.load(sums_ptr + n * S + start + s, mask=start + s < S, other=0.0)
    norm = tl.sqrt(tl.sum(squares, axis=0))
    factor = target / tl.where(norm < floor, floor, norm)  # NaN stays NaN
    tl.store(y_ptr + base + i, x * factor, mask=i < size)


def compute_dtype(device):
    """Dtype of z and of the iteration's matrices: fp16, or fp32 in the interpreter."""
    return torch.float32 if device.type == "cpu" else torch.float16


def unit_rows(
    x,  # (N, R, C) contiguous, bf16 or fp32
):
    """z (N, R, C) in compute_dtype: x with every row divided by its norm (rows of zeros stay 0);
    and the norms (N, R) fp32.

    Raises:
        ValueError: x is not contiguous.
    """
    check_tensor("unit_rows", "x", x, None)
    n, rows, cols = x.shape
    z = torch.empty(x.shape, dtype=compute_dtype(x.device), device=x.device)
    norms = torch.empty(n, rows, dtype=torch.float32, device=x.device)
    config = tuned("newton_schulz_unit_rows", ROWS_TILE, cols)
    block = min(config.cols, triton.next_power_of_2(cols))
    block_rows = config.rows * config.cols // block
    _unit_rows_kernel[(triton.cdiv(n * rows, block_rows),)](
        x_ptr=x,
        z_ptr=z,
        norm_ptr=norms,
        M=n * rows,
        C=cols,
        tiny_norm=TINY,
        WHOLE=cols <= block,
        BM=block_rows,
        BC=block,
        num_warps=config.warps,
    )
    return z, norms


def initial_scale(
    z,  # (N, R, C) contiguous, unit rows of X, updated in place
    norms,  # (N, R) fp32, norms of the rows of X
):
    """sigma (N,) fp32 such that sigma * z is X after steps 1 and 2. Rows of z whose norm in X is
    below NORM_FLOOR are shrunk for it; without such rows z is neither read nor written.

    Raises:
        ValueError: z is not contiguous, or norms are not contiguous fp32 of shape (N, R).
    """
    n, rows, cols = z.shape
    check_tensor("initial_scale", "z", z, None)
    check_tensor("initial_scale", "norms", norms, (n, rows), torch.float32)
    sigma, longest = (torch.empty(n, dtype=torch.float32, device=z.device) for _ in range(2))
    block = min(1024, triton.next_power_of_2(rows))
    _initial_scale_kernel[(n,)](
        norms, sigma, longest, rows, NORM_FLOOR, NORM_MARGIN, NORM_EPS, BLOCK=block, num_warps=4
    )
    _shrink_rows_kernel[(triton.cdiv(rows, SHRINK_TILE.rows), n)](
        z_ptr=z,
        norm_ptr=norms,
        longest_ptr=longest,
        R=rows,
        C=cols,
        floor=NORM_FLOOR,
        tiny_norm=TINY,
        BM=SHRINK_TILE.rows,
        BC=SHRINK_TILE.cols,
        num_warps=SHRINK_TILE.warps,
    )
    return sigma


def _plain_scale(
    x,  # (N, R, C)
):
    """X after step 2, without equilibration, as a pair: z (N, R, C) in compute_dtype, of Frobenius
    norm sqrt(R) as if its rows were unit rows, and sigma (N,) fp32."""
    # in fp64: in fp32 squares of 1e-23 are 0, and z overflows
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float64)  # (N, 1, 1)
    root = x.size(1) ** 0.5
    z = x.float() * (root / norm.clamp_min(TINY)).float()
    sigma = norm / (root * (NORM_MARGIN * norm + NORM_EPS))
    return z.to(compute_dtype(x.device)), sigma.flatten().float()


def _polynomial(
    gram,  # (N, m, m)
    coefficients,
):
    """aI + bG + cG^2, (N, m, m)."""
    a, b, c = coefficients
    return symmetric_matmul(gram, factor=c, addend=gram, beta=b, diagonal=a)


def rescale(
    x,  # (N, R, C) contiguous
    sumsq,  # (N, S) fp32, sums of squares over parts of each matrix
):
    """Muon+: x rescaled to Frobenius norm sqrt(min(R, C)), less for norms below NORM_FLOOR;
    (N, R, C) fp32.

    Raises:
        ValueError: a tensor that is not contiguous, or sums that are not fp32 or not (N, S).
    """
    n, rows, cols = x.shape
    check_tensor("rescale", "x", x, None)
    check_tensor("rescale", "sumsq", sumsq, (n, sumsq.size(-1)), torch.float32)
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    config = tuned("newton_schulz_rescale", RESCALE_TILE, cols)
    grid = (triton.cdiv(rows * cols, config.cols), n)
    _rescale_kernel[grid](
        x_ptr=x,
        y_ptr=y,
        sums_ptr=sumsq,
        target=min(rows, cols) ** 0.5,
        size=rows * cols,
        S=sumsq.size(1),
        floor=NORM_FLOOR,
        BLOCK=config.cols,
        BLOCK_S=min(1024, triton.next_power_of_2(sumsq.size(1))),
        num_warps=config.warps,
    )
    return y


def _segments(shape, gram):
    """POLAR_EXPRESS cut into segments of steps that share one Gram matrix computed from X."""
    if gram not in ("auto", True, False):
        raise ValueError(f"gram must be 'auto', True or False, not {gram!r}")
    if gram == "auto":
        gram = max(shape[1:]) >= GRAM_ASPECT * min(shape[1:])
    if gram:
        return POLAR_EXPRESS[:RESTART], POLAR_EXPRESS[RESTART:]
    return tuple((step,) for step in POLAR_EXPRESS)


def orthogonalize(
    z,  # (N, R, C) contiguous, compute_dtype
    sigma,  # (N,) fp32
    gram="auto",
):
    """Polar Express on sigma * z, whose Frobenius norms must not exceed 1 (step 3).

    Args:
        z: rows of length 1 and less, which fp16 holds without overflow; not changed. See unit_rows.
        sigma: see initial_scale.
        gram: True for the Gram iteration, False for the plain one, "auto" by the aspect ratio.

    Returns:
        x (N, R, C), in bf16 for an fp16 z, else in z's dtype, before Muon+; and its sums of squares
        in fp32, of the rows (N, R) if R >= C, else of the columns (N, C).

    Raises:
        ValueError: z or sigma has a wrong shape, z is not contiguous, or gram is unknown.
    """
    if z.dim() != 3 or sigma.shape != z.shape[:1] or not z.is_contiguous():
        raise ValueError("orthogonalize takes a contiguous z (N, R, C) and sigma (N,)")
    _, rows, cols = z.shape
    by_row, tall = rows >= cols, rows > cols
    segments = _segments(z.shape, gram)
    padded = any(side % (16 // z.element_size()) for side in (rows, cols))
    if padded:
        z = F.pad(z, (0, -cols % PADDING, 0, -rows % PADDING))
    for segment in segments:
        g = symmetric_matmul(z, transpose=tall, scale=sigma)  # (N, m, m)
        q = p = _polynomial(g, segment[0])
        for step in segment[1:]:
            g = symmetric_matmul(p, symmetric_matmul(g, p))
            p = _polynomial(g, step)
            q = symmetric_matmul(p, q)
        operands = (z, q) if tall else (q, z)
        if segment is not segments[-1]:
            z = torch.bmm(*operands)  # needs no epilogue: cuBLAS
    x, partial = batched_matmul(
        *operands,
        scale=sigma,
        sums="row" if by_row else "col",
        out_dtype=torch.bfloat16 if z.dtype == torch.float16 else None,
    )
    sumsq = partial.sum(dim=1)
    if padded:
        x = x[:, :rows, :cols].contiguous()
        sumsq = sumsq[:, : rows if by_row else cols].contiguous()
    return x, sumsq


def newton_schulz(
    x,  # (N, R, C) contiguous, bf16 or fp32
    equilibration="row",
    muon_plus=True,
    gram="auto",
):
    """Orthogonalise a batch of matrices, in fp16 on a GPU; (N, R, C) fp32. x is not changed.

    Args:
        equilibration: "row" (one fused kernel), "col" or "none".
        muon_plus: rescale each matrix to Frobenius norm sqrt(min(R, C)).
        gram: see orthogonalize.

    Raises:
        ValueError: x is not a contiguous (N, R, C), its dtype is neither bf16 nor fp32, or
            equilibration or gram is unknown.
    """
    if x.dim() != 3 or not x.is_contiguous() or x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError("newton_schulz takes a contiguous (N, R, C) tensor, bf16 or fp32")
    if equilibration == "row":
        z, norms = unit_rows(x)
        sigma = initial_scale(z, norms)
    else:
        z, sigma = _plain_scale(equilibrate_ref(x.float(), equilibration))
    y, sumsq = orthogonalize(z, sigma, gram)
    return rescale(y, sumsq) if muon_plus else y.float()
