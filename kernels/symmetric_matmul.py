"""Batched products for Newton-Schulz iterations: symmetric results at half the cost.

    symmetric_matmul   Y = factor * scale^2 * L R^T + beta * D + diagonal * I     (or L^T R)
    batched_matmul     Y = scale * L R, and sums of squares of Y by row or column

A symmetric Y needs half the work: tiles on and below the diagonal are computed and stored a
second time, mirrored, so that Y is symmetric bit for bit. L and R are the same X (a Gram matrix)
or symmetric matrices that commute (polynomials of one matrix). Products accumulate in fp32.

FLOPs for m x m results with k terms: m^2 k (symmetric_matmul), for m x n results 2 m n k. Bytes:
each operand read and the result written once, as far as L2 keeps the operands of one matrix.
Hopper moves tiles by tensor descriptors, which read zeros outside of a matrix:
https://triton-lang.org/main/getting-started/tutorials/09-persistent-matmul.html.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.tuning import tuned

ALIGNMENT = 16  # bytes: rows and the first element of a matrix start at multiples of it


@dataclass(frozen=True)
class MatmulTile:
    """Tile of rows x cols that advances by depth terms; how many programs share an SM.

    `persistent` programs per SM loop over all tiles; 0 starts one program per tile. Tiles of
    symmetric results have cols = rows or cols = 2 * rows.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    persistent: int = 0


SYMMETRIC_TILE = MatmulTile(rows=128, cols=128, depth=64, warps=4, stages=3)
TILE = MatmulTile(rows=128, cols=256, depth=64, warps=8, stages=4)


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
    """(row, column) of a tile among those on and below the diagonal, columns RATIO rows wide.

    RATIO * g * (g + 1) / 2 tiles lie above row g * RATIO; its rows have g + 1 tiles each. The
    1.5 (for 1) keeps an inexact root on the right side of an integer.
    """
    group = ((tl.sqrt(8.0 * index / RATIO + 1.5) - 1) / 2).to(tl.int32)
    rest = index - RATIO * (group * (group + 1) // 2)
    return group * RATIO + rest // (group + 1), rest % (group + 1)


@triton.jit
def _store_mirrored(
    y_desc,  # (N, m, m) in blocks of SIZE x SIZE
    y,  # (SIZE, SIZE) fp32, not yet with its addend
    addend_desc,  # like y_desc, or None
    beta,
    diagonal,
    n,
    N,
    row,
    col,
    SIZE: tl.constexpr,
):
    """Store a block on or below the diagonal and its mirror image; nothing for one above it."""
    i, j = row + tl.arange(0, SIZE)[:, None], col + tl.arange(0, SIZE)[None, :]
    if addend_desc is not None:
        addend = addend_desc.load([n, row, col]).reshape(SIZE, SIZE)
        y += beta * addend.to(tl.float32)
        y += tl.where(i == j, diagonal, 0.0)
    y = y.to(y_desc.dtype)
    y = tl.where(i >= j, y, tl.trans(y))  # changes blocks on the diagonal only
    n = tl.where(row >= col, n, N)  # out of bounds nothing is stored; cheaper than a branch
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
    """Compute and store one tile of a lower triangle and its mirror image."""
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
def _symmetric_matmul_kernel(
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
    """Compute and store one tile and the sums of its squares; tiles of a column are neighbours."""
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
def _batched_matmul_kernel(
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
    """Descriptor of x in blocks of one matrix, rows x cols."""
    if x.dim() != 3 or not x.is_contiguous():
        raise ValueError("products take contiguous (N, R, C) tensors; call .contiguous() on them")
    if x.size(2) * x.element_size() % ALIGNMENT or x.data_ptr() % ALIGNMENT:
        raise ValueError(f"matrices and rows must start at multiples of {ALIGNMENT} bytes")
    return TensorDescriptor.from_tensor(x, [1, rows, cols])


def _programs(tiles, config, device):
    if not config.persistent:
        return tiles
    cuda = device.type == "cuda"
    sms = torch.cuda.get_device_properties(device).multi_processor_count if cuda else 2
    return min(tiles, config.persistent * sms)


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
    """factor * scale^2 * left right^T + beta * addend + diagonal * I, symmetric to the bit.

    With transpose left^T right instead of left right^T. The product must be symmetric: left
    alone, or two symmetric matrices that commute.

    Returns: (N, m, m) in left's dtype.

    Raises:
        ValueError: shapes disagree, an operand is not contiguous, or m or k is not a multiple of
            16 bytes; diagonal without addend.
    """
    right = left if right is None else right
    n, size, terms = left.shape if not transpose else (left.size(0), left.size(2), left.size(1))
    if right.shape != left.shape or (addend is not None and addend.shape != (n, size, size)):
        raise ValueError(f"shapes disagree: left {tuple(left.shape)}, right {tuple(right.shape)}")
    if diagonal and addend is None:
        raise ValueError("a diagonal needs an addend")
    op = "symmetric_matmul_transposed" if transpose else "symmetric_matmul"
    config = config or tuned(op, SYMMETRIC_TILE)
    bm, bn, bk = config.rows, config.cols, config.depth
    y = torch.empty(n, size, size, dtype=left.dtype, device=left.device)
    tiles = sum(i * bm // bn + 1 for i in range(triton.cdiv(size, bm)))
    _symmetric_matmul_kernel[(_programs(n * tiles, config, left.device),)](
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
    """scale * left right, and with sums="row" or "col" the sums of squares of the result.

    Returns: (N, R, C) in out_dtype (default left's), or with sums a pair of it and an fp32
    (N, tiles, R) or (N, tiles, C); their sum over the tiles is that over a row or a column.

    Raises:
        ValueError: shapes disagree, an operand is not contiguous, K or C is not a multiple of 16
            bytes, or sums is unknown.
    """
    if sums not in (None, "row", "col"):
        raise ValueError(f"sums must be None, 'row' or 'col', not {sums!r}")
    n, rows, terms = left.shape
    cols = right.size(2)
    if right.shape != (n, terms, cols):
        raise ValueError(f"shapes disagree: left {tuple(left.shape)}, right {tuple(right.shape)}")
    config = config or tuned("batched_matmul", TILE)
    tiles_m, tiles_n = triton.cdiv(rows, config.rows), triton.cdiv(cols, config.cols)
    y = torch.empty(n, rows, cols, dtype=out_dtype or left.dtype, device=left.device)
    partial = None
    if sums:
        shape = (n, tiles_n, rows) if sums == "row" else (n, tiles_m, cols)
        partial = torch.empty(shape, dtype=torch.float32, device=left.device)
    tiles = n * tiles_m * tiles_n
    _batched_matmul_kernel[(_programs(tiles, config, left.device),)](
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
