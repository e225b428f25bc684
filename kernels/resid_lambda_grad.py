"""Gradient of a small resid_lambda in the fused pass: sum(g * (x + a w^T)), MLP recomputed.

A block opens with y = resid_lambda * h + x0_lambda * x0 + bigram_lambda * e (residual_mix.py) of
h = x + a w^T, the stream x in the middle of the block below and its MLP's output. The gradient of
resid_lambda is sum(g * h), with g that of y. h is not kept, so the fused pass takes

    (sum(g * y) - x0_lambda * sum(g * x0) - bigram_lambda * sum(g * e)) / resid_lambda,

whose sums cost no bytes: the kernels that need y, x0 and e read them anyway. The rounding of y,
r = 2^-9 of it in bf16, enters divided by resid_lambda: at 1/16 the error is about 16 r, at 0 the
quotient is not a number. So below SMALL_LAMBDA this op computes the sum itself. Other exact ways,
for N = 65,536 positions of C = 1024 in bf16 (134 MB, 31 us a pass over memory on an H200):

    keep h      2 passes per layer (62 us; 1 ms a micro-step of 16 layers), and 2 GB of memory
    keep a w^T  1 pass per layer (x is in the cache), and 2 GB of memory
    this        0 passes where |resid_lambda| >= SMALL_LAMBDA: every program returns after one load.
                Else g and x, 2 passes, and the product's FLOPs once more.

The choice is made on the device: no synchronisation, and a CUDA graph holds for every lambda. Bytes
of a small lambda for N positions: s*N*(2 C + F) and the weight; FLOPs: 2 N C F.
"""

import torch

from nanofuse.kernels.common.checks import check_scalars, check_tensor
from nanofuse.kernels.common.fp8 import FP8Operand
from nanofuse.kernels.common.jit import tl, triton
from nanofuse.kernels.common.ptx import INTERPRETED
from nanofuse.kernels.common.tuning import Tile, tuned

SMALL_LAMBDA = 1 / 16
TILE = Tile(rows=128, cols=128, warps=8, stages=3)
DEPTH_BYTES = 128  # of a row of a or w, loaded at once


def resid_lambda_grad_ref(
    g,  # (N, C)
    x,  # (N, C)
    a,  # (N, F)
    w,  # (C, F)
    resid_lambda,  # (1,)
):
    """sum(g * (x + a w^T)), (), where |resid_lambda| < SMALL_LAMBDA, else 0."""
    return torch.where(resid_lambda.abs() < SMALL_LAMBDA, (g * (x + a @ w.t())).sum(), 0.0).sum()


@triton.jit(do_not_specialize_on_alignment=("lambda_ptr", "partial_ptr"))
def _resid_lambda_grad_kernel(
    g_ptr,  # (N, C)
    x_ptr,  # (N, C)
    a_ptr,  # (N, F)
    w_ptr,  # (C, F)
    a_inverse_ptr,  # (1,) fp32 inverse scale of a, or None without FP8
    w_inverse_ptr,  # (1,) fp32 inverse scale of w, or None without FP8
    lambda_ptr,  # (1,)
    partial_ptr,  # (programs,) fp32: a program's share of the sum
    N,
    C,
    F,
    SMALL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    if tl.abs(tl.load(lambda_ptr)) >= SMALL:
        return
    scale = 1.0
    if a_inverse_ptr is not None:
        scale = tl.load(a_inverse_ptr) * tl.load(w_inverse_ptr)
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    tiles_n = tl.cdiv(C, BN)
    total = tl.zeros((BM,), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(N, BM) * tiles_n, tl.num_programs(0)):
        row, col = (tile // tiles_n).to(tl.int64) * BM, tile % tiles_n * BN
        row_ok, col_ok = row + m < N, col + n < C
        product = tl.zeros((BM, BN), tl.float32)
        for start in range(0, F, BK):
            k_ok = start + k < F
            a_rows = a_ptr + (row + m)[:, None] * F + (start + k)[None, :]
            a = tl.load(a_rows, mask=row_ok[:, None] & k_ok[None, :], other=0.0)
            w_rows = w_ptr + (col + n)[:, None] * F + (start + k)[None, :]
            w = tl.load(w_rows, mask=col_ok[:, None] & k_ok[None, :], other=0.0)
            if INTERPRETED:  # the interpreter's tl.dot is right in fp32 only
                a, w = a.to(tl.float32), w.to(tl.float32)
            product = tl.dot(a, w.T, product, input_precision="ieee")
        inside = row_ok[:, None] & col_ok[None, :]
        offsets = (row + m)[:, None] * C + (col + n)[None, :]
        h = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32) + scale * product
        g = tl.load(g_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(g * h, axis=1)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total, axis=0))


def resid_lambda_grad(
    g,  # (N, C) gradient of y
    x,  # (N, C)
    a,  # FP8Operand (N, F), or (N, F) bf16 or fp32
    w,  # FP8Operand (C, F), or (C, F) in a's dtype
    resid_lambda,  # (1,) or ()
    shares,  # (programs,) fp32, zeros; written where |resid_lambda| < SMALL_LAMBDA
):
    """The shares of sum(g * (x + a w^T)) of as many programs as `shares` has elements (on a GPU
    one per SM is a good number), still to be added up; returns shares.

    Raises:
        ValueError: a tensor that is not contiguous or does not fit the others.
    """
    op, a_inverse, w_inverse = "resid_lambda_grad", None, None
    if isinstance(a, FP8Operand):
        a_inverse, w_inverse = a.inverse_scale, w.inverse_scale
        a, w = a.data, w.data
    n, c = g.shape
    check_tensor(op, "g", g, None)
    check_tensor(op, "x", x, g.shape)
    check_tensor(op, "a", a, (n, a.size(-1)))
    check_tensor(op, "w", w, (c, a.size(-1)), a.dtype)
    check_tensor(op, "shares", shares, (shares.numel(),), torch.float32)
    check_scalars(op, resid_lambda=resid_lambda)
    config = tuned(op, TILE, c)
    _resid_lambda_grad_kernel[(shares.numel(),)](
        g_ptr=g,
        x_ptr=x,
        a_ptr=a,
        w_ptr=w,
        a_inverse_ptr=a_inverse,
        w_inverse_ptr=w_inverse,
        lambda_ptr=resid_lambda,
        partial_ptr=shares,
        N=n,
        C=c,
        F=a.size(1),
        SMALL=SMALL_LAMBDA,
        BM=config.rows,
        BN=config.cols,
        BK=DEPTH_BYTES // a.element_size(),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return shares
