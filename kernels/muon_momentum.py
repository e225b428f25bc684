"""Muon's first pass: momentum, Nesterov gradient and row normalisation in one kernel.

    m <- lerp(m, g, 1 - mu);  u = lerp(g, m, mu);  z = u / ||u|| per row

Unit rows are row equilibration (https://arxiv.org/abs/2603.28254) up to one factor per matrix,
which kernels/newton_schulz.py computes from the norms; rows of a norm below 1e-6 are shrunk there,
too. Bytes per parameter, with a compute dtype of c bytes: g 4 (bf16: 2) + m 8 + z c, and 4 (2) more
if the gradient is cleared. FLOPs: 10 per parameter.
"""

import torch

from nanofuse.kernels.common.checks import check_tensor
from nanofuse.kernels.common.jit import tl, triton
from nanofuse.kernels.common.tuning import Tile, tuned
from nanofuse.kernels.newton_schulz import TINY

TILE = Tile(rows=1024, cols=4096, warps=8)  # upper bounds; rows wider than cols are read twice
TILE_ELEMENTS = 4096  # elements of a tile, as far as TILE allows


@triton.jit
def _nesterov(
    grad_ptr,  # (BM, BN) pointers
    moment_ptr,  # (BM, BN) pointers
    mu,
    mask,  # (BM, BN)
):
    """The new momentum m and the Nesterov gradient u, both (BM, BN) fp32."""
    g = tl.load(grad_ptr, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(moment_ptr, mask=mask, other=0.0)
    m += (1 - mu) * (g - m)
    return m, m + (1 - mu) * (g - m)


@triton.jit
def _store_momentum(
    m,  # (BM, BN) fp32
    z,  # (BM, BN) fp32
    moment_ptr,  # (BM, BN) pointers
    grad_ptr,  # (BM, BN) pointers
    z_ptr,  # (BM, BN) pointers
    mask,  # (BM, BN)
    take,
    CLEAR: tl.constexpr,
):
    """Store z, m where `take` holds, and with CLEAR zeros over the gradient."""
    if take:
        tl.store(moment_ptr, m, mask=mask)
    if CLEAR:
        tl.store(grad_ptr, tl.zeros_like(m).to(grad_ptr.dtype.element_ty), mask=mask)
    tl.store(z_ptr, z.to(z_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _momentum_kernel(
    grad_ptr,  # (M, C) fp32 or bf16; M: the rows of all matrices
    moment_ptr,  # (M, C) fp32
    hyper_ptr,  # (3,) fp32: lr, momentum, weight decay
    z_ptr,  # (M, C)
    norms_ptr,  # (M,) fp32
    take_ptr,  # (1,) fp32, or None
    M,
    C,
    tiny_norm,
    UNIT: tl.constexpr,
    CLEAR: tl.constexpr,
    ONE_PASS: tl.constexpr,  # C <= BN: whole rows stay in registers; else they are read twice
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    mu = tl.load(hyper_ptr + 1)
    take = True
    if take_ptr is not None:
        take = tl.load(take_ptr) != 0.0
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    row_ok = row < M
    cols = tl.arange(0, BN)
    offsets = row[:, None].to(tl.int64) * C + cols[None, :]
    grad_ptr += offsets
    moment_ptr += offsets
    z_ptr += offsets
    mask = row_ok[:, None] & (cols < C)[None, :]
    m, u = _nesterov(grad_ptr, moment_ptr, mu, mask)
    inverse = tl.full((BM,), 1.0, tl.float32)
    if UNIT:
        squares = tl.sum(u * u, axis=1)
        if not ONE_PASS:
            for col in range(BN, C, BN):
                tail_mask = row_ok[:, None] & (col + cols < C)[None, :]
                _, tail = _nesterov(grad_ptr + col, moment_ptr + col, mu, tail_mask)
                squares += tl.sum(tail * tail, axis=1)
        norm = tl.sqrt(squares)
        tl.store(norms_ptr + row, norm, mask=row_ok)
        inverse = tl.where(norm < tiny_norm, 0.0, 1 / norm)  # NaN stays NaN
    if ONE_PASS:
        z = u * inverse[:, None]
        _store_momentum(m, z, moment_ptr, grad_ptr, z_ptr, mask, take, CLEAR)
    else:
        for col in range(0, C, BN):
            mask = row_ok[:, None] & (col + cols < C)[None, :]
            m, u = _nesterov(grad_ptr + col, moment_ptr + col, mu, mask)
            z = u * inverse[:, None]
            _store_momentum(m, z, moment_ptr + col, grad_ptr + col, z_ptr + col, mask, take, CLEAR)


def muon_momentum(
    grad,  # (N, R, C) fp32 or bf16, contiguous
    momentum_buffer,  # (N, R, C) fp32, contiguous, updated in place
    hyper,  # (3,) fp32: lr, momentum, weight decay; see muon_update.muon_hyper
    dtype,
    unit_rows=True,
    clear_grad=False,
    take=None,  # (1,) fp32
):
    """Update the momentum in place and compute the Nesterov gradient u, by default with unit rows.

    Args:
        dtype: of the result.
        unit_rows: divide every row of u by its norm; rows of zeros stay zero.
        clear_grad: set the gradient to zero after it is read.
        take: where it is 0, the momentum stays as it is; None: always update it.

    Returns:
        z (N, R, C) in `dtype`: u, or u with unit rows; and with unit_rows the norms (N, R) fp32 of
        u's rows, else None.

    Raises:
        ValueError: a tensor that is not contiguous, or of another shape or dtype.
    """
    check_tensor("muon_momentum", "grad", grad, None)
    check_tensor("muon_momentum", "momentum_buffer", momentum_buffer, grad.shape, torch.float32)
    check_tensor("muon_momentum", "hyper", hyper, (3,), torch.float32)
    if take is not None:
        check_tensor("muon_momentum", "take", take, (1,), torch.float32)
    n, rows, cols = grad.shape
    z = torch.empty(n, rows, cols, dtype=dtype, device=grad.device)
    norms = None
    if unit_rows:
        norms = torch.empty(n, rows, dtype=torch.float32, device=grad.device)
    config = tuned("muon_momentum", TILE, cols)
    block_cols = min(triton.next_power_of_2(cols), config.cols)
    block_rows = min(config.rows, max(1, TILE_ELEMENTS // block_cols))
    _momentum_kernel[(triton.cdiv(n * rows, block_rows),)](
        grad_ptr=grad,
        moment_ptr=momentum_buffer,
        hyper_ptr=hyper,
        z_ptr=z,
        norms_ptr=norms,
        take_ptr=take,
        M=n * rows,
        C=cols,
        tiny_norm=TINY,
        UNIT=unit_rows,
        CLEAR=clear_grad,
        ONE_PASS=cols <= block_cols,
        BM=block_rows,
        BN=block_cols,
        num_warps=config.warps,
    )
    return z, norms
