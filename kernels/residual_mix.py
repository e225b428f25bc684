"""Hashed bigram lookup, the residual mix that opens every block, and the RMSNorm after it.

    e_t    = table[row_t], row_t the hash of tokens t and t-1     (kernels/bigram_rows.py)
    y      = resid_lambda * (x + branch) + x0_lambda * x0 + bigram_lambda * e
    normed = y / sqrt(mean(y^2) + eps)

Recipe: karpathy/nanochat PR 747 (https://github.com/karpathy/nanochat/pull/747). One kernel writes
y, and normed in y's dtype, as an FP8 operand, or both; e stays in registers. Without x0 and table
the same kernel is the residual add and RMSNorm in the middle of a block.
Backward, with h the upstream gradient of normed, g that of y from its other uses, and g_y the total
gradient of y:

    g_y = g + rstd * h - y * rstd^3 * mean(h * y),   grad x = grad branch = resid_lambda * g_y

The gradients of x0, the table and their lambdas, summed over all layers:
kernels/residual_gradients.py.

Bytes, N = B*T positions of width C at s bytes: forward s*N*C for each tensor read (x, branch, x0,
e) and written (y, normed), and N*C for each FP8 layout; backward likewise, h, y, g, x read, g_y
and, unless it is g_y itself, grad branch written. FLOPs: about 10 per element.
"""

from dataclasses import dataclass, replace

import torch

from nanofuse.kernels.bigram_rows import HASH_CURRENT, HASH_PREVIOUS
from nanofuse.kernels.common.checks import check_scalars, check_tensor
from nanofuse.kernels.common.fp8 import check_alignment, empty_operand, operand_args
from nanofuse.kernels.common.jit import triton
from nanofuse.kernels.common.lanes import LANE
from nanofuse.kernels.common.rms_norm import RMS_NORM_EPS
from nanofuse.kernels.common.tuning import tuned
from nanofuse.kernels.embedding_grad import bigram_table_grad
from nanofuse.kernels.residual_gradients import residual_gradients
from nanofuse.kernels.residual_mix_kernels import residual_mix_bwd_kernel, residual_mix_fwd_kernel


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
    """The RowTile of `op` for x. Tuned tiles are those of wide bf16 rows: for fp32, whose elements
    take twice the registers, the block has half the columns; and for rows narrower than half a
    block, columns and warps are halved until no lane is idle."""
    config = tuned(op, default)
    if x.element_size() == 4:
        config = replace(config, cols=config.cols // 2, registers=None)
    while config.cols // 2 >= max(x.size(1), LANE.value) and config.warps > 1:
        config = replace(config, cols=config.cols // 2, warps=config.warps // 2)
    return config


def residual_mix_fwd(
    x,  # (N, C) stream
    branch=None,  # (N, C) output of the attention or MLP branch, added to the stream
    x0=None,  # (N, C) stream after smear
    tokens=None,  # (B, T) integer, B*T = N
    table=None,  # (num_rows, C)
    resid_lambda=None,  # (1,) or (); 1 if None
    x0_lambda=None,  # (1,) or (), with x0
    bigram_lambda=None,  # (1,) or (), with table
    scaling=None,
    want_normed=True,
):
    """Residual add and mix, RMSNorm and quantisation in one kernel.

    Args:
        scaling: kernels.common.fp8.Scaling of normed as an FP8 operand; None for no operand.
        want_normed: write normed in x's dtype.

    Returns:
        y (N, C) in x's dtype; rstd (N,) fp32, the inverse root mean squares for backward; normed
        (N, C) in x's dtype, or None; normed as an FP8Operand, or None.

    Raises:
        ValueError: a tensor that is not contiguous, not of x's shape, or with a scaling not aligned
            (kernels.common.fp8.check_alignment).
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
    check_scalars(
        "residual_mix", resid_lambda=resid_lambda, x0_lambda=x0_lambda, bigram_lambda=bigram_lambda
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
    grad_normed,  # (N, C) upstream gradient of normed
    y,  # (N, C) from the forward pass
    rstd,  # (N,) fp32, from the forward pass
    grad_stream=None,  # (N, C) upstream gradient of y, lacking the factor stream_scale
    stream_scale=None,  # (1,) or (): multiplies grad_stream; 1 if None
    x=None,  # (N, C) whose product with grad_y is summed; passing y itself saves a read
    resid_lambda=None,  # (1,) or (); 1 if None
    scaling=None,
    out=None,  # (N, C) to write grad_y to; None for a new tensor
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
    grad_resid_lambda = None if partial is None else partial.sum()
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
        grad, grad_resid_lambda, grad_x = residual_mix_bwd(
            grad_normed, y, rstd, grad_y, x=x, resid_lambda=resid
        )
        grad_x = grad_x.view(ctx.shape)
        grad_branch = None if branch is None else grad_x
        if x0 is None:
            return grad_x, grad_branch, None, None, None, grad_resid_lambda, None, None
        bigram = None if bigram is None else bigram.view(1)
        grad_x0, grad_x0_lambda, grad_e, grad_bigram_lambda = residual_gradients(
            grad[None], x0, x0_lambda.view(1), tokens, table, bigram
        )
        grad_table = None
        if table is not None:
            grad_table = torch.zeros_like(table)
            bigram_table_grad(tokens, grad_e, grad_table)
            grad_bigram_lambda = grad_bigram_lambda[0].clone()  # shares grad_x0_lambda's buffer
        grad_x0, grad_x0_lambda = grad_x0.view(ctx.shape), grad_x0_lambda[0].clone()
        return (
            grad_x, grad_branch, grad_x0, None, grad_table,
            grad_resid_lambda, grad_x0_lambda, grad_bigram_lambda,
        )  # fmt: skip


def residual_mix(
    x,  # (B, T, C) stream
    branch=None,  # (B, T, C) output of the attention or MLP branch, added to the stream
    x0=None,  # (B, T, C) stream after smear
    tokens=None,  # (B, T) integer
    table=None,  # (num_rows, C)
    resid_lambda=None,  # (); 1 if None
    x0_lambda=None,  # (), with x0
    bigram_lambda=None,  # (), with table, which needs x0 too
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
