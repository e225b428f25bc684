"""Hashed bigram lookup, the residual mix that opens every block, and the norm after it.

    e_t    = table[row_t], row_t the hash of tokens t and t-1     (kernels/bigram_rows.py)
    y      = resid_lambda * (x + branch) + x0_lambda * x0 + bigram_lambda * e
    normed = y / sqrt(mean(y^2) + eps)

Recipe: karpathy/nanochat PR 747 (https://github.com/karpathy/nanochat/pull/747). One kernel makes
y and normed, the latter as bf16, as an FP8 operand or as both; e never reaches memory. Without x0
and table the same kernel is the residual add and norm in the middle of a block.
Backward, for the gradient h of normed and the gradient g of y from its other uses:

    g_y = g + rstd * h - y * rstd^3 * mean(h * y),   grad x = grad branch = resid_lambda * g_y

What x0, the table and their lambdas get from all layers together: kernels/residual_gradients.py.

Bytes, N = B*T positions of width C at s bytes: forward s*N*C per tensor read (x, branch, x0, e) and
written (y, normed), N*C per FP8 layout; backward the same of h, y, g, x read and of g_y and grad
branch written, the latter unless it is g_y itself.
FLOPs: about 10 per element.
"""

from dataclasses import dataclass, replace

import torch
import triton

from nanofuse.kernels.bigram_rows import HASH_CURRENT, HASH_PREVIOUS
from nanofuse.kernels.common.fp8 import check_alignment, empty_operand, operand_args
from nanofuse.kernels.common.lanes import LANE
from nanofuse.kernels.common.rms_norm import RMS_NORM_EPS
from nanofuse.kernels.common.tuning import tuned
from nanofuse.kernels.embedding_grad import bigram_table_grad
from nanofuse.kernels.residual_gradients import residual_gradients
from nanofuse.kernels.residual_mix_kernels import residual_mix_bwd_kernel, residual_mix_fwd_kernel


@dataclass(frozen=True)
class RowTile:
    """Block of rows x cols that a program works on at a time, going over whole rows; stages of the
    loop that sums; cap on the registers of a thread."""

    rows: int
    cols: int
    warps: int
    stages: int = 1
    registers: int | None = None


FORWARD_TILE = RowTile(rows=32, cols=256, warps=8)
BACKWARD_TILE = RowTile(rows=32, cols=512, warps=16)


def residual_mix_ref(
    x,  # (B, T, D) residual stream
    x0,  # (B, T, D) stream after smear
    resid_lambda,  # ()
    x0_lambda,  # ()
    e=None,  # (B, T, D) bigram embedding; None in a dense model
    bigram_lambda=None,  # ()
):
    """Mix the stream with x0 and the bigram embedding; returns (B, T, D) in x's dtype."""
    y = resid_lambda * x + x0_lambda * x0
    if e is None:
        return y
    return y + bigram_lambda * e


def _check_matrices(op, **tensors):
    """Raise ValueError unless every given tensor is contiguous and of the first one's shape."""
    given = {name: x for name, x in tensors.items() if x is not None}
    first = next(iter(given.values()))
    for name, x in given.items():
        if not x.is_contiguous() or x.shape != first.shape:
            raise ValueError(
                f"{op}: {name} must be contiguous and of shape {tuple(first.shape)}, "
                f"got {tuple(x.shape)}"
            )


def _tile(op, default, x):
    """Tile for x: the winners are those of wide rows of bf16. Shared memory and registers are
    counted in bytes, and a block as wide as two rows would leave half of its threads idle."""
    config = tuned(op, default)
    if x.element_size() == 4:
        config = replace(config, cols=config.cols // 2, registers=None)
    while config.cols // 2 >= max(x.size(1), LANE.value) and config.warps > 1:
        config = replace(config, cols=config.cols // 2, warps=config.warps // 2)
    return config


def residual_mix_fwd(
    x,  # (N, C) stream
    branch=None,  # (N, C) output of the branch that joins the stream
    x0=None,  # (N, C) stream after smear
    tokens=None,  # (B, T) integer, B*T = N
    table=None,  # (num_rows, C)
    resid_lambda=None,  # (1,) or (); 1 if None
    x0_lambda=None,  # (1,) or (), with x0
    bigram_lambda=None,  # (1,) or (), with table
    scaling=None,
    want_normed=True,
):
    """Mix, norm and quantise in one kernel.

    Args:
        scaling: kernels.fp8.Scaling of the FP8 operand, or None for no operand.
        want_normed: also write normed in x's dtype.

    Returns:
        y (N, C) in x's dtype, rstd (N,) fp32, normed (N, C) or None, FP8Operand or None.

    Raises:
        ValueError: a tensor that is not contiguous, not of x's shape, or with a scaling not aligned
            (kernels.fp8.check_alignment).
    """
    _check_matrices("residual_mix", x=x, branch=branch, x0=x0)
    n, c = x.shape
    if table is not None:
        _check_matrices("residual_mix", table=table)
        _check_matrices("residual_mix", tokens=tokens)
        if table.size(0) < 2:
            raise ValueError("residual_mix: a bigram table needs at least 2 rows")
        if tokens.numel() != n or table.size(1) != c:
            raise ValueError(
                f"residual_mix: x is {n} x {c}, but there are {tokens.numel()} tokens "
                f"and a table of width {table.size(1)}"
            )
    if scaling is not None:
        check_alignment("residual_mix", x=x, branch=branch, x0=x0, table=table)
    y = torch.empty_like(x)
    rstd = torch.empty(n, dtype=torch.float32, device=x.device)
    normed = torch.empty_like(x) if want_normed else None
    operand = empty_operand(n, c, scaling, x.device) if scaling is not None else None
    op = "residual_norm_fwd" if x0 is None else "residual_mix_fwd"
    config = _tile(op, FORWARD_TILE, x)
    residual_mix_fwd_kernel[(triton.cdiv(n, config.rows),)](
        x,
        branch,
        x0,
        tokens,
        table,
        resid_lambda,
        x0_lambda,
        bigram_lambda,
        y,
        normed,
        rstd,
        *operand_args(operand, scaling),
        n,
        c,
        tokens.size(1) if tokens is not None else n,
        table.size(0) if table is not None else 0,
        RMS_NORM_EPS,
        HASH_CURRENT,
        HASH_PREVIOUS,
        BM=config.rows,
        BC=config.cols,
        STAGES=config.stages,
        num_warps=config.warps,
        maxnreg=config.registers,
    )
    return y, rstd, normed, operand


def residual_mix_bwd(
    grad_normed,  # (N, C)
    y,  # (N, C)
    rstd,  # (N,) fp32
    grad_stream=None,  # (N, C) gradient of y from its other uses, before stream_scale
    stream_scale=None,  # (1,) or (): factor of grad_stream; 1 if None
    x=None,  # (N, C), for the gradient of resid_lambda; y itself saves a read
    resid_lambda=None,  # (1,) or (); 1 if None
    scaling=None,
    out=None,  # (N, C): where the gradient of y goes
):
    """Gradient of y, and what follows from it in the same pass.

    Args:
        scaling: Scaling of the branch's gradient as an FP8 operand; None: it is a tensor.

    Returns:
        grad_y (N, C) in y's dtype, the gradient () fp32 of resid_lambda (None without x), and that
        of the branch, resid_lambda * grad_y: an FP8Operand, or a tensor in y's dtype, which is
        grad_y itself if resid_lambda is None.

    Raises:
        ValueError: a tensor that is not contiguous, not of y's shape, or with a scaling not
            aligned (kernels.fp8.check_alignment).
    """
    tensors = {"y": y, "grad_normed": grad_normed, "grad_stream": grad_stream, "x": x, "out": out}
    _check_matrices("residual_mix", **tensors)
    if scaling is not None:
        check_alignment("residual_mix", **tensors)
    n, c = y.shape
    op = "residual_norm_bwd" if x is None else "residual_mix_bwd"
    config = _tile(op, BACKWARD_TILE, y)
    programs = triton.cdiv(n, config.rows)
    grad_y = torch.empty_like(y) if out is None else out
    partial = None
    if x is not None:
        partial = torch.empty(programs, dtype=torch.float32, device=y.device)
    operand = grad_branch = None
    if scaling is not None:
        operand = empty_operand(n, c, scaling, y.device)
    elif resid_lambda is not None:
        grad_branch = torch.empty_like(y)
    residual_mix_bwd_kernel[(programs,)](
        grad_normed,
        grad_stream,
        stream_scale,
        y,
        rstd,
        x,
        resid_lambda,
        grad_y,
        grad_branch,
        partial,
        *operand_args(operand, scaling),
        n,
        c,
        WITH_Y=x is y,
        BM=config.rows,
        BC=config.cols,
        STAGES=config.stages,
        num_warps=config.warps,
        maxnreg=config.registers,
    )
    of_resid = None if partial is None else partial.sum()
    if operand is not None:
        return grad_y, of_resid, operand
    return grad_y, of_resid, grad_y if grad_branch is None else grad_branch


class ResidualMix(torch.autograd.Function):
    """One layer's mix and norm, with the gradients of all its inputs.

    x and branch may have one tensor as their gradient. They come in their own shape, so that
    autograd sees it is one and copies it where both are leaves: two views of it would pass for two.
    """

    @staticmethod
    def forward(
        ctx,
        x,  # (B, T, C)
        branch,  # (B, T, C) or None
        x0,  # (B, T, C) or None
        tokens,  # (B, T) or None
        table,  # (num_rows, C) or None
        resid_lambda,  # (), or None
        x0_lambda,  # (), or None
        bigram_lambda,  # (), or None
    ):
        ctx.shape = x.shape
        x, branch, x0 = (None if t is None else t.view(-1, t.size(-1)) for t in (x, branch, x0))
        y, rstd, normed, _ = residual_mix_fwd(
            x, branch, x0, tokens, table, resid_lambda, x0_lambda, bigram_lambda
        )
        ctx.save_for_backward(
            y, rstd, x, branch, x0, tokens, table, resid_lambda, x0_lambda, bigram_lambda
        )
        ctx.set_materialize_grads(False)
        return y, normed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx,
        grad_y,  # (N, C) or None
        grad_normed,  # (N, C) or None
    ):
        y, rstd, x, branch, x0, tokens, table, resid, x0_lambda, bigram = ctx.saved_tensors
        if resid is None:
            x = None
        elif branch is not None:
            x = x + branch
        grad_normed = torch.zeros_like(y) if grad_normed is None else grad_normed.contiguous()
        grad_y = None if grad_y is None else grad_y.contiguous()
        grad, of_resid, grad_x = residual_mix_bwd(
            grad_normed, y, rstd, grad_y, x=x, resid_lambda=resid
        )
        grad_x = grad_x.view(ctx.shape)
        grad_branch = None if branch is None else grad_x
        if x0 is None:
            return grad_x, grad_branch, None, None, None, of_resid, None, None
        bigram = None if bigram is None else bigram.view(1)
        grad_x0, of_x0, grad_e, of_bigram = residual_gradients(
            grad[None], x0, x0_lambda.view(1), tokens, table, bigram
        )
        grad_table = None
        if table is not None:
            grad_table = torch.zeros_like(table)
            bigram_table_grad(tokens, grad_e, grad_table)
            of_bigram = of_bigram[0].clone()  # it lies in one buffer with of_x0
        grad_x0, of_x0 = grad_x0.view(ctx.shape), of_x0[0].clone()
        return grad_x, grad_branch, grad_x0, None, grad_table, of_resid, of_x0, of_bigram


def residual_mix(
    x,  # (B, T, C) stream
    branch=None,  # (B, T, C) output of the branch that joins the stream
    x0=None,  # (B, T, C) stream after smear
    tokens=None,  # (B, T) integer
    table=None,  # (num_rows, C)
    resid_lambda=None,  # (); 1 if None
    x0_lambda=None,  # (), with x0
    bigram_lambda=None,  # (), with table, which wants x0 too
):
    """The mixed stream y and its RMSNorm, both (B, T, C) in x's dtype; differentiable.

    Raises:
        ValueError: a tensor that is not contiguous or does not fit x.
    """
    if (x0 is None) != (x0_lambda is None):
        raise ValueError("residual_mix: x0 and x0_lambda go together")
    if len({t is None for t in (tokens, table, bigram_lambda)}) > 1 or (
        table is not None and x0 is None
    ):
        raise ValueError("residual_mix: tokens, table, bigram_lambda and x0 go together")
    if tokens is not None and tokens.shape != x.shape[:2]:
        raise ValueError(
            f"residual_mix: tokens must be {tuple(x.shape[:2])}, not {tuple(tokens.shape)}"
        )
    _check_matrices("residual_mix", x=x, branch=branch, x0=x0)
    y, normed = ResidualMix.apply(
        x, branch, x0, tokens, table, resid_lambda, x0_lambda, bigram_lambda
    )
    return y.view(x.shape), normed.view(x.shape)
