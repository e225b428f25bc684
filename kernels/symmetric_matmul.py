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
from nanofuse.kernels.common.jit import TensorDescriptor, tl, triton
from nanofuse.kernels.common.tuning import sm_count, tuned

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


@triton.jit
def _triangle_tile(
    index,
    RATIO: tl.constexpr,
):
    """(row, column) in the grid of tiles of number `index` among those on and below the diagonal; a
    tile is RATIO times as wide as tall.

    The RATIO tile rows of group g have g + 1 tiles each, so RATIO * g * (g + 1) / 2 tiles precede
    the group; solving for g takes a square root. Its 1.5 (exactly: 1) keeps an inexact root on the
    right side of an integer.
    """
    group = ((tl.sqrt(8.0 * index / RATIO + 1.5) - 1) / 2).to(tl.int32)
    rest = index - RATIO * (group * (group + 1) // 2)
    return group * RATIO + rest // (group + 1), rest % (group + 1)


@triton.jit
def _store_mirrored(
    y_desc,  # (N, m, m) in blocks of SIZE x SIZE
    y,  # (SIZE, SIZE) fp32, without the addend yet
    addend_desc,  # like y_desc, or None
    beta,
    diagonal,
    n,
    N,
    row,
    col,
    SIZE: tl.constexpr,
):
    """Epilogue of one SIZE x SIZE block: add the addend, and store the block and its transpose at
    the mirrored place. Of a block above the diagonal nothing is stored."""
    i, j = row + tl.arange(0, SIZE)[:, None], col + tl.arange(0, SIZE)[None, :]
    if addend_desc is not None:
        addend = addend_desc.load([n, row, col]).reshape(SIZE, SIZE)
        y += beta * addend.to(tl.float32)
        y += tl.where(i == j, diagonal, 0.0)
    y = y.to(y_desc.dtype)
    y = tl.where(i >= j, y, tl.trans(y))  # changes blocks on the diagonal only
    n = tl.where(row >= col, n, N)  # matrix N is out of bounds: no store; cheaper than a branch
    y_desc.store([n, row, col], y.reshape(1, SIZE, SIZE))
    y_desc.store([n, col, row], tl.trans(y).reshape(1, SIZE, SIZE))


@triton.jit
def _symmetric_tile(
    left_desc,  # (N, m, k) in blocks of BM x BK, or (N, k, m) in blocks of BK x BM
    right_desc,  # (N, m, k) in blocks of BN x BK, or (N, k, m) in blocks of BK x BN
    addend_desc,  # (N, m, m) in blocks of BM x BM, or None
    y_desc,  # (N, m, m) in blocks of BM x BM
    scale_ptr,  # (N,) fp32, or None
    factor,
    beta,
    diagonal,
    N,
    K,
    tiles,  # per matrix
    index,
    TRANSPOSE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Compute one tile of a lower triangle, and store it and its transpose."""
    n = index // tiles
    tile_row, tile_col = _triangle_tile(index % tiles, BN // BM)
    row, col = tile_row * BM, tile_col * BN
    y = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        if TRANSPOSE:
            left = left_desc.load([n, k, row]).reshape(BK, BM).T
            right = right_desc.load([n, k, col]).reshape(BK, BN)
        else:
            left = left_desc.load([n, row, k]).reshape(BM, BK)
            right = right_desc.load([n, col, k]).reshape(BN, BK).T
        y = tl.dot(left, right, y, input_precision="ieee")
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + n)
        factor *= scale * scale
    y *= factor
    if BN == BM:
        _store_mirrored(y_desc, y, addend_desc, beta, diagonal, n, N, row, col, BM)
    else:
        near, far = y.reshape(BM, 2, BM).permute(0, 2, 1).split()
        _store_mirrored(y_desc, near, addend_desc, beta, diagonal, n, N, row, col, BM)
        _store_mirrored(y_desc, far, addend_desc, beta, diagonal, n, N, row, col + BM, BM)


@triton.jit
def symmetric_matmul_kernel(
    left_desc,  # arguments as in _symmetric_tile
    right_desc,
    addend_desc,
    y_desc,
    scale_ptr,
    factor,
    beta,
    diagonal,
    N,
    K,
    tiles,
    TRANSPOSE: tl.constexpr,
    PERSISTENT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    first = tl.program_id(0)
    if PERSISTENT:
        for index in tl.range(first, N * tiles, tl.num_programs(0), flatten=True):
            _symmetric_tile(
                left_desc, right_desc, addend_desc, y_desc, scale_ptr, factor, beta, diagonal,
                N, K, tiles, index, TRANSPOSE, BM, BN, BK,
            )  # fmt: skip
    else:
        _symmetric_tile(
            left_desc, right_desc, addend_desc, y_desc, scale_ptr, factor, beta, diagonal,
            N, K, tiles, first, TRANSPOSE, BM, BN, BK,
        )  # fmt: skip


@triton.jit
def _batched_tile(
    left_desc,  # (N, R, K) in blocks of BM x BK
    right_desc,  # (N, K, C) in blocks of BK x BN
    y_desc,  # (N, R, C) in blocks of BM x BN
    scale_ptr,  # (N,) fp32, or None
    sums_ptr,  # (N, tiles_n, R) or (N, tiles_m, C) fp32, or None
    R,
    C,
    K,
    index,
    ROW_SUMS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Compute and store one tile, and its rows' or columns' sums of squares; tiles are numbered
    down the columns of the grid."""
    tiles_m, tiles_n = tl.cdiv(R, BM), tl.cdiv(C, BN)
    n, tile = index // (tiles_m * tiles_n), index % (tiles_m * tiles_n)
    tile_row, tile_col = tile % tiles_m, tile // tiles_m
    row, col = tile_row * BM, tile_col * BN
    y = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        left = left_desc.load([n, row, k]).reshape(BM, BK)
        right = right_desc.load([n, k, col]).reshape(BK, BN)
        y = tl.dot(left, right, y, input_precision="ieee")
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + n)
    rounded = y.to(y_desc.dtype)
    y_desc.store([n, row, col], rounded.reshape(1, BM, BN))
    if sums_ptr is not None:
        y = rounded.to(tl.float32)
        if ROW_SUMS:
            i = row + tl.arange(0, BM)
            sums = sums_ptr + (n * tiles_n + tile_col).to(tl.int64) * R
            tl.store(sums + i, tl.sum(y * y, axis=1), mask=i < R)
        else:
            i = col + tl.arange(0, BN)
            sums = sums_ptr + (n * tiles_m + tile_row).to(tl.int64) * C
            tl.store(sums + i, tl.sum(y * y, axis=0), mask=i < C)


@triton.jit
def batched_matmul_kernel(
    left_desc,  # arguments as in _batched_tile
    right_desc,
    y_desc,
    scale_ptr,
    sums_ptr,
    R,
    C,
    K,
    total_tiles,
    ROW_SUMS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    first = tl.program_id(0)
    if PERSISTENT:
        for index in tl.range(first, total_tiles, tl.num_programs(0), flatten=True):
            _batched_tile(
                left_desc, right_desc, y_desc, scale_ptr, sums_ptr, R, C, K, index,
                ROW_SUMS, BM, BN, BK,
            )  # fmt: skip
    else:
        _batched_tile(
            left_desc, right_desc, y_desc, scale_ptr, sums_ptr, R, C, K, first,
            ROW_SUMS, BM, BN, BK,
        )  # fmt: skip


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
    config = config or tuned(op, SYMMETRIC_TILE, size)
    bm, bn, bk = config.rows, config.cols, config.depth
    y = torch.empty(n, size, size, dtype=left.dtype, device=left.device)
    tiles = sum(i * bm // bn + 1 for i in range(triton.cdiv(size, bm)))
    symmetric_matmul_kernel[(_programs(n * tiles, config, left.device),)](
        left_desc=_describe(left, *((bk, bm) if transpose else (bm, bk))),
        right_desc=_describe(right, *((bk, bn) if transpose else (bn, bk))),
        addend_desc=None if addend is None else _describe(addend, bm, bm),
        y_desc=_describe(y, bm, bm),
        scale_ptr=scale,
        factor=factor,
        beta=beta,
        diagonal=diagonal,
        N=n,
        K=terms,
        tiles=tiles,
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
    config = config or tuned("batched_matmul", TILE, cols)
    tiles_m, tiles_n = triton.cdiv(rows, config.rows), triton.cdiv(cols, config.cols)
    y = torch.empty(n, rows, cols, dtype=out_dtype or left.dtype, device=left.device)
    partial = None
    if sums:
        shape = (n, tiles_n, rows) if sums == "row" else (n, tiles_m, cols)
        partial = torch.empty(shape, dtype=torch.float32, device=left.device)
    tiles = n * tiles_m * tiles_n
    batched_matmul_kernel[(_programs(tiles, config, left.device),)](
        left_desc=_describe(left, config.rows, config.depth),
        right_desc=_describe(right, config.depth, config.cols),
        y_desc=_describe(y, config.rows, config.cols),
        scale_ptr=scale,
        sums_ptr=partial,
        R=rows,
        C=cols,
        K=terms,
        total_tiles=tiles,
        ROW_SUMS=sums == "row",
        PERSISTENT=config.persistent > 0,
        BM=config.rows,
        BN=config.cols,
        BK=config.depth,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return (y, partial) if sums else y
