"""Table lookups, the residual mix that opens every block, and the RMSNorm after it.

    e_k    = table_k[rows_k], of any number of tables
    y      = resid_lambda * (x + branch) + x0_lambda * x0 + sum_k lambda_k * e_k
    normed = y / sqrt(mean(y^2) + eps)

The recipe has one table, of bigrams (kernels/bigram_rows.py; karpathy/nanochat PR 747,
https://github.com/karpathy/nanochat/pull/747). One kernel writes y, and normed in y's dtype or as
an FP8 operand; e_k stays in registers. Without x0 and tables the same kernel is the residual
add and RMSNorm in the middle of a block.
Backward, with h the upstream gradient of normed, g that of y from its other uses, and g_y the total
gradient of y:

    g_y = g + rstd * h - y * rstd^3 * mean(h * y),   grad x = grad branch = resid_lambda * g_y

The gradients of x0, the tables and their lambdas, summed over all layers:
kernels/residual_gradients.py.

On Hopper the backward pass, and the forward pass without x0 and tables, have kernels that load by
TMA (kernels/residual_mix_tma_kernels.py), where results are FP8 operands and sizes suit. They round
as these do, sum rows in another order, and take maxima after scaling, so that amax is not finite
where value times scale overflows fp32.

Bytes, N = B*T positions of width C at s bytes: forward s*N*C for each tensor read (x, branch, x0,
e_k) and written (y, normed), and N*C for each FP8 layout; backward likewise, h, y, g, x read, g_y
and, unless it is g_y itself, grad branch written. FLOPs: about 10 per element.
"""

from dataclasses import dataclass, replace

import torch

from nanofuse.kernels.common.checks import check_lookups, check_scalars, check_tensor
from nanofuse.kernels.common.fp8 import check_alignment, empty_operand, operand_args
from nanofuse.kernels.common.jit import triton
from nanofuse.kernels.common.lanes import LANE
from nanofuse.kernels.common.rms_norm import RMS_NORM_EPS
from nanofuse.kernels.common.tuning import tuned
from nanofuse.kernels.embedding_grad import embedding_grad, sort_rows
from nanofuse.kernels.residual_gradients import residual_gradients
from nanofuse.kernels.residual_mix_kernels import residual_mix_bwd_kernel, residual_mix_fwd_kernel
from nanofuse.kernels.residual_mix_tma_kernels import (
    residual_mix_bwd_tma,
    residual_norm_fwd_tma,
    takes,
)


@dataclass(frozen=True)
class RowTile:
    """Tile of a program, which owns `rows` whole rows and loops over them in blocks of rows x cols.

    Fields: rows, cols, warps; stages, of the software pipeline of the loop that sums; registers,
    the most per thread (None: the compiler's choice).
    """

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
    looked_up=(),  # ((e (B, T, D), lambda ()), ...) of each table
):
    """Mix the stream with x0 and looked-up embeddings; returns (B, T, D) in x's dtype."""
    y = resid_lambda * x + x0_lambda * x0
    for e, scale in looked_up:
        y = y + scale * e
    return y


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
    """The RowTile of `op` for x. Tuned tiles are those of wide bf16 rows: for fp32, whose elements
    take twice the registers, the block has half the columns; and for rows narrower than half a
    block, columns and warps are halved until no lane is idle."""
    config = tuned(op, default, x.size(1))
    if x.element_size() == 4:
        config = replace(config, cols=config.cols // 2, registers=None)
    while config.cols // 2 >= max(x.size(1), LANE.value) and config.warps > 1:
        config = replace(config, cols=config.cols // 2, warps=config.warps // 2)
    return config


def residual_mix_fwd(
    x,  # (N, C) stream
    branch=None,  # (N, C) output of the attention or MLP branch, added to the stream
    x0=None,  # (N, C) stream after smear
    lookups=(),  # ((rows (N,) int32, table (R, C), lambda (1,) or ()), ...)
    resid_lambda=None,  # (1,) or (); 1 if None
    x0_lambda=None,  # (1,) or (), with x0
    scaling=None,
):
    """Residual add and mix, RMSNorm and quantisation in one kernel.

    Args:
        scaling: kernels.common.fp8.Scaling of normed as an FP8 operand; None for a plain tensor.

    Returns:
        y (N, C) in x's dtype; rstd (N,) fp32, the inverse root mean squares for backward; and
        normed (N, C), an FP8Operand or a tensor in x's dtype.

    Raises:
        ValueError: a tensor that is not contiguous, not of x's shape, or with a scaling not aligned
            (kernels.common.fp8.check_alignment).
    """
    _check_matrices("residual_mix", x=x, branch=branch, x0=x0)
    n, c = x.shape
    check_lookups("residual_mix", lookups, n, c)
    check_scalars("residual_mix", resid_lambda=resid_lambda, x0_lambda=x0_lambda)
    rows, tables, lambdas = zip(*lookups, strict=True) if lookups else ((), (), ())
    if scaling is not None:
        named = {f"table {i}": table for i, table in enumerate(tables)}
        check_alignment("residual_mix", x=x, branch=branch, x0=x0, **named)
    y = torch.empty_like(x)
    rstd = torch.empty(n, dtype=torch.float32, device=x.device)
    if scaling is None:
        normed, operand = torch.empty_like(x), None
    else:
        normed, operand = None, empty_operand(n, c, scaling, x.device)
    data, transposed, scale, amax = operand_args(operand, scaling)
    op = "residual_norm_fwd" if x0 is None else "residual_mix_fwd"
    plain = x0 is None and resid_lambda is None and not lookups
    if plain and operand is not None and takes(op, x, branch):
        residual_norm_fwd_tma(x, branch, y, rstd, data, transposed, scale, amax)
        return y, rstd, operand
    config = _tile(op, FORWARD_TILE, x)
    residual_mix_fwd_kernel[(triton.cdiv(n, config.rows),)](
        x_ptr=x,
        branch_ptr=branch,
        x0_ptr=x0,
        rows_ptrs=rows,
        table_ptrs=tables,
        resid_ptr=resid_lambda,
        x0_lambda_ptr=x0_lambda,
        table_lambda_ptrs=lambdas,
        y_ptr=y,
        normed_ptr=normed,
        rstd_ptr=rstd,
        data_ptr=data,
        transposed_ptr=transposed,
        scale_ptr=scale,
        amax_ptr=amax,
        N=n,
        C=c,
        eps=RMS_NORM_EPS,
        BM=config.rows,
        BC=config.cols,
        STAGES=config.stages,
        num_warps=config.warps,
        maxnreg=config.registers,
    )
    return y, rstd, normed if operand is None else operand


def _sum(
    shares,  # (programs,) fp32, or None
    out,  # () fp32, or None
):
    return None if shares is None else torch.sum(shares, dim=0, out=out)


def residual_mix_bwd(
    grad_normed,  # (N, C) upstream gradient of normed
    y,  # (N, C) from the forward pass
    rstd,  # (N,) fp32, from the forward pass
    grad_stream=None,  # (N, C) upstream gradient of y, lacking the factor stream_scale
    stream_scale=None,  # (1,) or (): multiplies grad_stream; 1 if None
    x=None,  # (N, C) whose product with grad_y is summed; passing y itself saves a read
    resid_lambda=None,  # (1,) or (); 1 if None
    scaling=None,
    out=None,  # (N, C) to write grad_y to; None for a new tensor
    sum_out=None,  # () fp32 to write the sum to; None for a new tensor
):
    """Total gradient of y, and the gradients of the branch and of resid_lambda in the same pass.

    Args:
        scaling: Scaling of the branch's gradient as an FP8 operand; None for a plain tensor.

    Returns:
        grad_y (N, C) in y's dtype; sum(grad_y * x), () fp32, which is the gradient of resid_lambda
        if x is the sum of stream and branch, or None without x; and the branch's gradient
        resid_lambda * grad_y, an FP8Operand or a tensor in y's dtype, which is grad_y itself if
        resid_lambda is None.

    Raises:
        ValueError: a tensor that is not contiguous, not of y's shape, or with a scaling not
            aligned (kernels.common.fp8.check_alignment).
    """
    tensors = {"y": y, "grad_normed": grad_normed, "grad_stream": grad_stream, "x": x, "out": out}
    _check_matrices("residual_mix", **tensors)
    check_tensor("residual_mix", "rstd", rstd, y.shape[:1], torch.float32)
    check_scalars("residual_mix", stream_scale=stream_scale, resid_lambda=resid_lambda)
    if scaling is not None:
        check_alignment("residual_mix", **tensors)
    n, c = y.shape
    op = "residual_norm_bwd" if x is None else "residual_mix_bwd"
    grad_y = torch.empty_like(y) if out is None else out
    if (
        scaling is not None and (x is None or x is y)
        and takes(op, y, grad_normed, grad_stream, grad_y)
    ):  # fmt: skip
        operand = empty_operand(n, c, scaling, y.device)
        shares = residual_mix_bwd_tma(
            grad_normed, y, rstd, grad_stream, stream_scale, resid_lambda, grad_y, x is y,
            *operand_args(operand, scaling),
        )  # fmt: skip
        return grad_y, _sum(shares, sum_out), operand
    config = _tile(op, BACKWARD_TILE, y)
    programs = triton.cdiv(n, config.rows)
    partial = None
    if x is not None:
        partial = torch.empty(programs, dtype=torch.float32, device=y.device)
    operand = grad_branch = None
    if scaling is not None:
        operand = empty_operand(n, c, scaling, y.device)
    elif resid_lambda is not None:
        grad_branch = torch.empty_like(y)
    data, transposed, scale, amax = operand_args(operand, scaling)
    residual_mix_bwd_kernel[(programs,)](
        grad_normed_ptr=grad_normed,
        grad_stream_ptr=grad_stream,
        stream_scale_ptr=stream_scale,
        y_ptr=y,
        rstd_ptr=rstd,
        x_ptr=x,
        resid_ptr=resid_lambda,
        grad_y_ptr=grad_y,
        grad_branch_ptr=grad_branch,
        resid_partial_ptr=partial,
        data_ptr=data,
        transposed_ptr=transposed,
        scale_ptr=scale,
        amax_ptr=amax,
        N=n,
        C=c,
        WITH_Y=x is y,
        BM=config.rows,
        BC=config.cols,
        STAGES=config.stages,
        num_warps=config.warps,
        maxnreg=config.registers,
    )
    grad_resid_lambda = _sum(partial, sum_out)
    if operand is not None:
        return grad_y, grad_resid_lambda, operand
    return grad_y, grad_resid_lambda, grad_y if grad_branch is None else grad_branch


class ResidualMix(torch.autograd.Function):
    """residual_mix for autograd: gradients of all floating-point inputs.

    The gradients of x and branch are one tensor. Both inputs are taken in their own shape, so that
    autograd recognises that tensor and copies it where both are leaves: of two different views of
    it autograd would not know that they share memory.
    """

    @staticmethod
    def forward(
        ctx,
        x,  # (B, T, C)
        branch,  # (B, T, C) or None
        x0,  # (B, T, C) or None
        resid_lambda,  # (), or None
        x0_lambda,  # (), or None
        *flat,  # rows (B, T), table (R, C) and lambda () of each lookup
    ):
        ctx.shape = x.shape
        x, branch, x0 = (None if t is None else t.view(-1, t.size(-1)) for t in (x, branch, x0))
        flat = [t.view(-1) if i % 3 == 0 else t for i, t in enumerate(flat)]
        y, rstd, normed = residual_mix_fwd(x, branch, x0, _lookups(flat), resid_lambda, x0_lambda)
        ctx.save_for_backward(y, rstd, x, branch, x0, resid_lambda, x0_lambda, *flat)
        ctx.set_materialize_grads(False)
        return y, normed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx,
        grad_y,  # (N, C) or None
        grad_normed,  # (N, C) or None
    ):
        y, rstd, x, branch, x0, resid, x0_lambda, *flat = ctx.saved_tensors
        if resid is None:
            x = None
        elif branch is not None:
            x = x + branch
        grad_normed = torch.zeros_like(y) if grad_normed is None else grad_normed.contiguous()
        grad_y = None if grad_y is None else grad_y.contiguous()
        grad, grad_resid_lambda, grad_x = residual_mix_bwd(
            grad_normed, y, rstd, grad_y, x=x, resid_lambda=resid
        )
        grad_x = grad_x.view(ctx.shape)
        grad_branch = None if branch is None else grad_x
        if x0 is None:
            return grad_x, grad_branch, None, grad_resid_lambda, None
        lookups = [(rows, table, scale.view(1)) for rows, table, scale in _lookups(flat)]
        grad_x0, grad_x0_lambda, of_tables = residual_gradients(
            grad[None], x0, x0_lambda.view(1), lookups
        )
        # copies: the lambdas' gradients share a buffer
        grad_x0, grad_x0_lambda = grad_x0.view(ctx.shape), grad_x0_lambda[0].clone()
        grads = [grad_x, grad_branch, grad_x0, grad_resid_lambda, grad_x0_lambda]
        for (rows, table, _), (grad_e, grad_lambda) in zip(lookups, of_tables, strict=True):
            order, grad_table = sort_rows(rows, table.size(0)), torch.zeros_like(table)
            grads += [None, embedding_grad(grad_e, order, grad_table), grad_lambda[0].clone()]
        return tuple(grads)


def _lookups(flat):
    """((rows, table, lambda), ...) of a flat sequence of them."""
    return tuple(zip(flat[::3], flat[1::3], flat[2::3], strict=True))


def residual_mix(
    x,  # (B, T, C) stream
    branch=None,  # (B, T, C) output of the attention or MLP branch, added to the stream
    x0=None,  # (B, T, C) stream after smear
    lookups=(),  # ((rows (B, T) int32, table (R, C), lambda ()), ...); they need x0 too
    resid_lambda=None,  # (); 1 if None
    x0_lambda=None,  # (), with x0
):
    """The mixed stream y and its RMSNorm, both (B, T, C) in x's dtype; differentiable.

    Raises:
        ValueError: a tensor that is not contiguous or does not fit x.
    """
    if (x0 is None) != (x0_lambda is None):
        raise ValueError("residual_mix: x0 and x0_lambda go together")
    if lookups and x0 is None:
        raise ValueError("residual_mix: lookups need x0 too")
    for rows, _, _ in lookups:
        if rows.shape != x.shape[:2]:
            raise ValueError(
                f"residual_mix: rows must be {tuple(x.shape[:2])}, not {tuple(rows.shape)}"
            )
    _check_matrices("residual_mix", x=x, branch=branch, x0=x0)
    flat = [tensor for lookup in lookups for tensor in lookup]
    y, normed = ResidualMix.apply(x, branch, x0, resid_lambda, x0_lambda, *flat)
    return y.view(x.shape), normed.view(x.shape)
