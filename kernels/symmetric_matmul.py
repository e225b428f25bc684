"""Batched GEMMs for Newton-Schulz iterations, with epilogues; symmetric results at half the cost.

    symmetric_matmul   Y = factor * scale^2 * L R^T + beta * D + diagonal * I     (or L^T R)
    batched_matmul     Y = scale * L R, and sums of squares of Y by row or column

Of a symmetric Y only the tiles on and below the diagonal are computed; each is stored a second
time, transposed, at its mirrored place, so that Y is symmetric bit for bit. L and R are the same X
(a Gram matrix) or symmetric matrices that commute (polynomials of one matrix). Products accumulate
in fp32.

FLOPs for m x m results with k terms: m^2 k (symmetric_matmul), for m x n results 2 m n k. Bytes:
each operand read and the result written once, if L2 holds the operands of one matrix. Tiles are
loaded and stored through tensor descriptors (TMA on Hopper), which read zeros out of bounds:
https://triton-lang.org/main/getting-started/tutorials/09-persistent-matmul.html.
"""

from dataclasses import dataclass

import torch

from nanofuse.kernels.common.checks import check_tensor
from nanofuse.kernels.common.jit import TensorDescriptor, triton
from nanofuse.kernels.common.tuning import sm_count, tuned
from nanofuse.kernels.symmetric_matmul_kernels import batched_matmul_kernel, symmetric_matmul_kernel

ALIGNMENT = 16  # bytes: rows and the first element of a matrix start at multiples of it


@dataclass(frozen=True)
class MatmulTile:
    """Tile of the output, and launch parameters.

    Fields: rows x cols, the tile (of a symmetric result: cols = rows or 2 * rows); depth, the terms
    per step of the K loop; warps, and stages of the software pipeline; persistent, the programs per
    SM that loop over all tiles, or 0 for one program per tile.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    persistent: int = 0


SYMMETRIC_TILE = MatmulTile(rows=128, cols=128, depth=64, warps=8, stages=4)
TILE = MatmulTile(rows=128, cols=256, depth=64, warps=8, stages=3)


def symmetric_matmul_ref(
    left,  # (N, m, k), or (N, k, m) if transpose
    right=None,  # like left
    *,
    transpose=False,
    factor=1.0,
    scale=None,  # (N,)
    addend=None,  # (N, m, m)
    beta=0.0,
    diagonal=0.0,
):
    """symmetric_matmul in plain PyTorch; (N, m, m) in left's dtype."""
    right = left if right is None else right
    y = factor * (left.mT @ right if transpose else left @ right.mT)
    if scale is not None:
        y = y * scale.square()[:, None, None]
    if addend is not None:
        y = y + beta * addend
    return (y + diagonal * torch.eye(y.size(-1), device=y.device)).to(left.dtype)


def batched_matmul_ref(
    left,  # (N, R, K)
    right,  # (N, K, C)
    *,
    scale=None,  # (N,)
):
    """batched_matmul in plain PyTorch, without sums; (N, R, C) in left's dtype."""
    y = left @ right
    return (y if scale is None else y * scale[:, None, None]).to(left.dtype)


def _describe(
    x,  # (N, R, C)
    rows,
    cols,
):
    """Tensor descriptor of x with blocks of 1 x rows x cols."""
    if x.dim() != 3 or not x.is_contiguous():
        raise ValueError("products take contiguous (N, R, C) tensors; call .contiguous() on them")
    if x.size(2) * x.element_size() % ALIGNMENT or x.data_ptr() % ALIGNMENT:
        raise ValueError(f"matrices and rows must start at multiples of {ALIGNMENT} bytes")
    return TensorDescriptor.from_tensor(x, [1, rows, cols])


def _check_scale(scale, n):
    check_tensor("products", "scale", scale, (n,), torch.float32)


def _programs(tiles, config, device):
    if not config.persistent:
        return tiles
    return min(tiles, config.persistent * sm_count(device))


def symmetric_matmul(
    left,  # (N, m, k), or (N, k, m) if transpose; fp16, bf16, or fp32
    right=None,  # like left; None: left
    *,
    transpose=False,
    factor=1.0,
    scale=None,  # (N,) fp32
    addend=None,  # (N, m, m) symmetric, dtype of left
    beta=0.0,
    diagonal=0.0,
    config=None,
):
    """factor * scale^2 * left right^T + beta * addend + diagonal * I, symmetric bit for bit.

    With `transpose`, left^T right instead of left right^T. The product must be symmetric by itself:
    left with itself, or two symmetric matrices that commute.

    Args:
        config: a MatmulTile; None for the tuned one.

    Returns: (N, m, m) in left's dtype.

    Raises:
        ValueError: shapes disagree; an operand is not contiguous; a row of m or k elements is not a
            multiple of 16 bytes; or a diagonal without addend.
    """
    right = left if right is None else right
    n, size, terms = left.shape if not transpose else (left.size(0), left.size(2), left.size(1))
    if right.shape != left.shape or (addend is not None and addend.shape != (n, size, size)):
        raise ValueError(f"shapes disagree: left {tuple(left.shape)}, right {tuple(right.shape)}")
    if diagonal and addend is None:
        raise ValueError("a diagonal needs an addend")
    _check_scale(scale, n)
    op = "symmetric_matmul_transposed" if transpose else "symmetric_matmul"
    config = config or tuned(op, SYMMETRIC_TILE)
    bm, bn, bk = config.rows, config.cols, config.depth
    y = torch.empty(n, size, size, dtype=left.dtype, device=left.device)
    tiles = sum(i * bm // bn + 1 for i in range(triton.cdiv(size, bm)))
    symmetric_matmul_kernel[(_programs(n * tiles, config, left.device),)](
        _describe(left, *((bk, bm) if transpose else (bm, bk))),
        _describe(right, *((bk, bn) if transpose else (bn, bk))),
        None if addend is None else _describe(addend, bm, bm),
        _describe(y, bm, bm),
        scale,
        factor,
        beta,
        diagonal,
        n,
        terms,
        tiles,
        TRANSPOSE=transpose,
        PERSISTENT=config.persistent > 0,
        BM=bm,
        BN=bn,
        BK=bk,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return y


def batched_matmul(
    left,  # (N, R, K) fp16, bf16 or fp32
    right,  # (N, K, C)
    *,
    scale=None,  # (N,) fp32
    sums=None,
    out_dtype=None,
    config=None,
):
    """scale * left right, and optionally the sums of squares of its rows or columns.

    Args:
        sums: "row" or "col", to compute sums of squares of the rounded result in the epilogue.
        out_dtype: of the result; None for left's.
        config: a MatmulTile; None for the tuned one.

    Returns:
        The result (N, R, C). With sums a pair: the result, and partial sums in fp32, (N, tiles, R)
        of rows or (N, tiles, C) of columns, still to be added up over the tiles.

    Raises:
        ValueError: shapes disagree; an operand is not contiguous; a row of K or C elements is not a
            multiple of 16 bytes; or sums is unknown.
    """
    if sums not in (None, "row", "col"):
        raise ValueError(f"sums must be None, 'row' or 'col', not {sums!r}")
    n, rows, terms = left.shape
    cols = right.size(2)
    if right.shape != (n, terms, cols):
        raise ValueError(f"shapes disagree: left {tuple(left.shape)}, right {tuple(right.shape)}")
    _check_scale(scale, n)
    config = config or tuned("batched_matmul", TILE)
    tiles_m, tiles_n = triton.cdiv(rows, config.rows), triton.cdiv(cols, config.cols)
    y = torch.empty(n, rows, cols, dtype=out_dtype or left.dtype, device=left.device)
    partial = None
    if sums:
        shape = (n, tiles_n, rows) if sums == "row" else (n, tiles_m, cols)
        partial = torch.empty(shape, dtype=torch.float32, device=left.device)
    tiles = n * tiles_m * tiles_n
    batched_matmul_kernel[(_programs(tiles, config, left.device),)](
        _describe(left, config.rows, config.depth),
        _describe(right, config.depth, config.cols),
        _describe(y, config.rows, config.cols),
        scale,
        partial,
        rows,
        cols,
        terms,
        tiles,
        ROW_SUMS=sums == "row",
        PERSISTENT=config.persistent > 0,
        BM=config.rows,
        BN=config.cols,
        BK=config.depth,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return (y, partial) if sums else y
