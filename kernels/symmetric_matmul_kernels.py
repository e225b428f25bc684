"""Kernels of symmetric_matmul and batched_matmul: see kernels/symmetric_matmul.py."""

from nanofuse.kernels.common.jit import tl, triton


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
