"""The transposed layout of a matrix of bytes, such as an FP8 operand that came from another rank.

    out_nm = x_mn

torch copies a transposed matrix byte by byte: 25 us for 4 MB on an H200, at 0.3 TB/s. Triton 3.6
has moved bytes wrongly between registers (dev/LOG.md, 2026-11-22); the SASS of this kernel,
emulated for every tile of bench/cases/tiles.py, puts each at its place. Bytes for M x N: M*N read,
M*N written. No FLOPs.
"""

import torch

from nanofuse.kernels.common.checks import check_tensor
from nanofuse.kernels.common.jit import tl, triton
from nanofuse.kernels.common.tuning import Tile, tuned

TILE = Tile(rows=128, cols=128, warps=8)


def transpose_ref(
    x,  # (M, N) of a dtype of one byte
):
    """x transposed, (N, M), contiguous."""
    return x.view(torch.uint8).t().contiguous().view(x.dtype)


@triton.jit
def _transpose_kernel(
    x_ptr,  # (M, N) of one byte each
    out_ptr,  # (N, M)
    M,
    N,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (m < M)[:, None] & (n < N)[None, :]
    x = tl.load(x_ptr + m[:, None].to(tl.int64) * N + n[None, :], mask=inside)
    there = out_ptr + n[:, None].to(tl.int64) * M + m[None, :]
    tl.store(there, tl.trans(x), mask=tl.trans(inside))


def transpose(
    x,  # (M, N) of a dtype of one byte, contiguous
    out,  # (N, M) of the same dtype, contiguous
):
    """Write the transposed matrix to `out`.

    Raises:
        ValueError: x is no contiguous matrix of bytes, or `out` does not fit.
    """
    if x.dim() != 2 or not x.is_contiguous() or x.element_size() != 1:
        raise ValueError(
            f"transpose takes a contiguous matrix of bytes, not {tuple(x.shape)} {x.dtype}"
        )
    rows, cols = x.shape
    check_tensor("transpose", "out", out, (cols, rows), x.dtype)
    config = tuned("transpose", TILE, cols)
    _transpose_kernel[(triton.cdiv(rows, config.rows), triton.cdiv(cols, config.cols))](
        x_ptr=x.view(torch.uint8),
        out_ptr=out.view(torch.uint8),
        M=rows,
        N=cols,
        BM=config.rows,
        BN=config.cols,
        num_warps=config.warps,
    )
