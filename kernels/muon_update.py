"""One Muon step for a stack of matrices of one shape, in place.

    m <- lerp(m, g, 1 - mu);  g <- lerp(g, m, mu)                          (Nesterov)
    u <- newton_schulz(g)                                   (kernels/newton_schulz.py)
    v  = mean of u^2 per row (rows >= cols) or column;  s <- lerp(s, v, 1 - beta2)
    u <- u / sqrt(max(s, 1e-10)), rescaled to its former Frobenius norm    (NorMuon, 2510.05491)
    p <- p - lr'*u - lr'*wd*p*[u*p >= 0],   lr' = lr * sqrt(max(1, rows / cols))

Muon: https://kellerjordan.github.io/posts/muon/. Outside of the Newton-Schulz iteration only two
passes read and write whole matrices: muon_momentum before it (kernels/muon_momentum.py) and
muon_apply after it. The iteration returns x and the sums of squares of its rows or columns. From
these muon_factors updates s and computes one factor f per row or column, which combines Muon+,
variance reduction and the rescaling to the former norm, so that u = f*x.

Bytes per parameter: muon_momentum g 4 (bf16: 2) + m 8 + z 2, and 4 (2) more to clear g; muon_apply
x 2 + p 8 + copies 2 (bf16) and 1 + 1 (FP8). FLOPs: 20 per parameter outside of the iteration.
"""

from dataclasses import dataclass

import torch

from nanofuse.kernels.common.checks import check_tensor
from nanofuse.kernels.common.fp8 import (
    MULTIPLE,
    FP8Operand,
    Scaling,
    check_alignment,
    operand_args,
    store_fp8,
)
from nanofuse.kernels.common.jit import tl, triton
from nanofuse.kernels.common.tuning import Tile, tuned
from nanofuse.kernels.muon_momentum import muon_momentum
from nanofuse.kernels.newton_schulz import (
    EQUILIBRATIONS,
    NORM_FLOOR,
    compute_dtype,
    initial_scale,
    newton_schulz,
    newton_schulz_ref,
    orthogonalize,
)

SECOND_MOMENT_FLOOR = 1e-10
TILE = Tile(rows=64, cols=128, warps=8)


@dataclass(frozen=True)
class WeightCopies:
    """Low-precision copies of the updated weights that `muon_update` writes in its last pass.

    Fields, each may be None: bf16, (N, R, C); fp8, an FP8Operand of a stack, with data (N, R, C)
    and transposed (N, C, R); scaling, the Scaling of fp8 with one scale, inverse scale and amax per
    matrix, each an (N,) tensor.
    """

    bf16: torch.Tensor | None = None  # (N, R, C)
    fp8: FP8Operand | None = None
    scaling: Scaling | None = None

    @classmethod
    def empty(cls, shape, device, bf16=False, scaling=None):
        """Uninitialised copies of a stack of `shape` (N, R, C): in bf16 if asked for, in FP8 if
        there is a scaling."""
        n, rows, cols = shape
        copy = torch.empty(n, rows, cols, dtype=torch.bfloat16, device=device) if bf16 else None
        if scaling is None:
            return cls(copy)
        data = torch.empty(n, rows, cols, dtype=scaling.dtype, device=device)
        transposed = torch.empty(n, cols, rows, dtype=scaling.dtype, device=device)
        return cls(copy, FP8Operand(data, transposed, scaling.inverse_scale), scaling)


def second_moment_shape(
    shape,  # (N, R, C) of the stack
):
    """Shape of the second moment: (N, R, 1) when R >= C, else (N, 1, C)."""
    n, rows, cols = shape
    return (n, rows, 1) if rows >= cols else (n, 1, cols)


def reduce_variance_ref(
    u,  # (N, R, C) fp32
    second_moment,  # (N, R, 1) or (N, 1, C), updated in place
    beta2,
):
    """Divide every row (R >= C) or column by the root of its running second moment, which is
    updated, and rescale each matrix to its former Frobenius norm; (N, R, C)."""
    dim = -1 if u.size(-2) >= u.size(-1) else -2
    second_moment.lerp_(u.square().mean(dim=dim, keepdim=True), 1 - beta2)
    norm = u.square().sum(dim=(-2, -1), keepdim=True).sqrt()  # (N, 1, 1)
    u = u * second_moment.clamp_min(SECOND_MOMENT_FLOOR).rsqrt()
    new_norm = u.square().sum(dim=(-2, -1), keepdim=True).sqrt()
    return u * (norm / new_norm.clamp_min(SECOND_MOMENT_FLOOR))


def muon_update_ref(
    param,  # (N, R, C) fp32, updated in place
    grad,  # (N, R, C), not changed
    momentum_buffer,  # (N, R, C), updated in place
    second_moment,  # (N, R, 1) or (N, 1, C), updated in place
    lr,  # ()
    momentum,  # ()
    weight_decay,  # ()
    beta2=0.9,
    equilibration="row",
    muon_plus=True,
    compute_dtype=None,
):
    """One Muon step of a stack of matrices; Newton-Schulz runs in `compute_dtype` (default:
    param's dtype)."""
    momentum_buffer.lerp_(grad, 1 - momentum)
    nesterov = grad.lerp(momentum_buffer, momentum)
    u = newton_schulz_ref(nesterov.to(compute_dtype or param.dtype), equilibration, muon_plus)
    u = reduce_variance_ref(u.to(param.dtype), second_moment, beta2)
    lr = lr * max(1.0, param.size(-2) / param.size(-1)) ** 0.5
    cautious = (u * param) >= 0
    param.sub_(lr * u + lr * weight_decay * param * cautious)


@triton.jit
def _factors_kernel(
    squares_ptr,  # (N, L) fp32 sums of squares; L: rows or columns of a matrix
    moment_ptr,  # (N, L) fp32 second moment, updated
    factors_ptr,  # (N, L) fp32, written
    take_ptr,  # (1,) fp32, or None
    L,
    reduced,  # elements in each sum of squares
    target,  # Frobenius norm after Muon+
    weight,  # 1 - beta2
    norm_floor,
    moment_floor,
    MUON_PLUS: tl.constexpr,
    BL: tl.constexpr,
):
    n, i = tl.program_id(0), tl.arange(0, BL)
    ok = i < L
    root = tl.sqrt(tl.load(squares_ptr + n * L + i, mask=ok, other=0.0))
    kappa = 1.0
    if MUON_PLUS:
        norm = tl.sqrt(tl.sum(root * root, axis=0))
        kappa = target / tl.maximum(norm, norm_floor, propagate_nan=tl.PropagateNan.ALL)
    root *= kappa  # not squares *= kappa^2, which may overflow
    squares = root * root
    moment = tl.load(moment_ptr + n * L + i, mask=ok, other=1.0)
    moment += weight * (squares / reduced - moment)
    take = True
    if take_ptr is not None:
        take = tl.load(take_ptr) != 0.0
    if take:
        tl.store(moment_ptr + n * L + i, moment, mask=ok)
    moment = tl.maximum(moment, moment_floor, propagate_nan=tl.PropagateNan.ALL)
    norm = tl.sqrt(tl.sum(squares, axis=0))
    new_norm = tl.sqrt(tl.sum(squares / moment, axis=0))
    new_norm = tl.maximum(new_norm, moment_floor, propagate_nan=tl.PropagateNan.ALL)
    tl.store(factors_ptr + n * L + i, kappa * (norm / new_norm) / tl.sqrt(moment), mask=ok)


@triton.jit
def _apply_kernel(
    param_ptr,  # (N, R, C) fp32
    x_ptr,  # (N, R, C)
    factors_ptr,  # (N, R) if PER_ROW, else (N, C); fp32
    hyper_ptr,  # (3,) fp32: lr, momentum, weight decay
    take_ptr,  # (1,) fp32, or None
    copy_ptr,  # (N, R, C) bf16, or None
    data_ptr,  # (N, R, C) FP8, or None
    transposed_ptr,  # (N, C, R) FP8
    scale_ptr,  # (N,) fp32
    amax_ptr,  # (N,) int32
    R,
    C,
    lr_factor,
    PER_ROW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    n = tl.program_id(2).to(tl.int64)
    row, col = tl.program_id(1) * BM, tl.program_id(0) * BN
    r, c = tl.arange(0, BM), tl.arange(0, BN)
    row_ok, col_ok = row + r < R, col + c < C
    mask = row_ok[:, None] & col_ok[None, :]
    if PER_ROW:
        f = tl.load(factors_ptr + n * R + row + r, mask=row_ok, other=0.0)[:, None]
    else:
        f = tl.load(factors_ptr + n * C + col + c, mask=col_ok, other=0.0)[None, :]
    base = (n * R + row) * C + col
    offsets = r[:, None] * C + c[None, :]
    x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    p = tl.load(param_ptr + base + offsets, mask=mask, other=0.0)
    lr = tl.load(hyper_ptr) * lr_factor
    decay = lr * tl.load(hyper_ptr + 2)
    u = f * x
    new = p - (lr * u + tl.where(u * p >= 0, decay * p, 0.0))
    if take_ptr is not None:
        new = tl.where(tl.load(take_ptr) != 0.0, new, p)
    p = new
    tl.store(param_ptr + base + offsets, p, mask=mask)
    if copy_ptr is not None:
        tl.store(copy_ptr + base + offsets, p.to(tl.bfloat16), mask=mask)
    if data_ptr is not None:
        matrix = n * R * C
        store_fp8(
            p,
            data_ptr + matrix,
            transposed_ptr + matrix,
            scale_ptr + n,
            amax_ptr + n,
            row,
            col,
            R,
            C,
            BM,
            BN,
        )


def muon_hyper(lr, momentum, weight_decay, device):
    """The (3,) fp32 tensor of learning rate, momentum and weight decay that `muon_update` reads.

    On the device, so that a CUDA graph can be replayed with new values. It is copied to a GPU from
    pinned memory, asynchronously.
    """
    pinned = torch.device(device).type == "cuda"
    hyper = torch.tensor([lr, momentum, weight_decay], dtype=torch.float32, pin_memory=pinned)
    return hyper.to(device, non_blocking=True)


def muon_factors(
    squares,  # (N, R) fp32 sums of squares of the rows if R >= C, else (N, C) of the columns
    second_moment,  # (N, R, 1) if R >= C, else (N, 1, C); fp32, updated in place
    shape,  # (N, R, C)
    beta2,
    muon_plus,
    take=None,  # (1,) fp32
):
    """Update the second moment, unless `take` is 0, and return the factor f of every row (R >= C)
    or column that applies Muon+ and variance reduction, (N, R) or (N, C) fp32.

    Raises:
        ValueError: a tensor that is not contiguous, or of another shape or dtype.
    """
    n, rows, cols = shape
    count, reduced = (rows, cols) if rows >= cols else (cols, rows)
    check_tensor("muon_factors", "squares", squares, (n, count), torch.float32)
    moment_shape = second_moment_shape(shape)
    check_tensor("muon_factors", "second_moment", second_moment, moment_shape, torch.float32)
    if take is not None:
        check_tensor("muon_factors", "take", take, (1,), torch.float32)
    factors = torch.empty(n, count, dtype=torch.float32, device=squares.device)
    _factors_kernel[(n,)](
        squares_ptr=squares,
        moment_ptr=second_moment,
        factors_ptr=factors,
        take_ptr=take,
        L=count,
        reduced=reduced,
        target=min(rows, cols) ** 0.5,
        weight=1 - beta2,
        norm_floor=NORM_FLOOR,
        moment_floor=SECOND_MOMENT_FLOOR,
        MUON_PLUS=muon_plus,
        BL=triton.next_power_of_2(count),
        num_warps=8,
    )
    return factors


def muon_apply(
    param,  # (N, R, C) fp32, updated in place
    x,  # (N, R, C) result of the iteration
    factors,  # (N, R) if R >= C, else (N, C); fp32
    hyper,  # (3,) fp32
    weights=None,
    take=None,  # (1,) fp32
):
    """Apply u = factors * x and cautious weight decay to param, in place unless `take` is 0, and
    write the values into the WeightCopies `weights`, if given.

    Raises:
        ValueError: a tensor that is not contiguous, or of another shape or dtype.
    """
    n, rows, cols = param.shape
    weights = weights or WeightCopies()
    shape = (n, rows) if rows >= cols else (n, cols)
    check_tensor("muon_apply", "param", param, None, torch.float32)
    check_tensor("muon_apply", "x", x, param.shape)
    check_tensor("muon_apply", "factors", factors, shape, torch.float32)
    check_tensor("muon_apply", "hyper", hyper, (3,), torch.float32)
    if take is not None:
        check_tensor("muon_apply", "take", take, (1,), torch.float32)
    _check_copies(param, weights)
    config = tuned("muon_apply", TILE, cols)
    grid = (triton.cdiv(cols, config.cols), triton.cdiv(rows, config.rows), n)
    data, transposed, scale, amax = operand_args(weights.fp8, weights.scaling)
    _apply_kernel[grid](
        param_ptr=param,
        x_ptr=x,
        factors_ptr=factors,
        hyper_ptr=hyper,
        take_ptr=take,
        copy_ptr=weights.bf16,
        data_ptr=data,
        transposed_ptr=transposed,
        scale_ptr=scale,
        amax_ptr=amax,
        R=rows,
        C=cols,
        lr_factor=max(1.0, rows / cols) ** 0.5,
        PER_ROW=rows >= cols,
        BM=config.rows,
        BN=config.cols,
        num_warps=config.warps,
    )


def _check_copies(param, weights):
    """Raise ValueError for WeightCopies that do not fit param."""
    if weights.bf16 is not None:
        check_tensor("muon_update", "the bf16 copy", weights.bf16, param.shape, torch.bfloat16)
    if weights.fp8 is None:
        return
    copies, scaling = weights.fp8, weights.scaling
    if any(side % MULTIPLE for side in param.shape[1:]):
        raise ValueError(f"FP8 copies want rows and columns in multiples of {MULTIPLE}")
    if copies.data.shape != param.shape or copies.transposed.shape != param.mT.shape:
        raise ValueError("the FP8 copies must have shapes (N, R, C) and (N, C, R)")
    if scaling is None or not scaling.scale.shape == scaling.amax.shape == param.shape[:1]:
        raise ValueError("the FP8 copies need one scale and one amax per matrix")
    for name, x in (("data", copies.data), ("transposed", copies.transposed)):
        check_tensor("muon_update", f"the FP8 copy's {name}", x, None)
    for name, x in (("scale", scaling.scale), ("amax", scaling.amax)):
        check_tensor("muon_update", name, x, None, torch.float32)
    check_alignment("muon_update", param=param)


def _check(param, grad, momentum_buffer, second_moment, hyper, weights):
    """Raise ValueError for what the kernels do not take."""
    if param.dim() != 3 or not grad.shape == momentum_buffer.shape == param.shape:
        raise ValueError("parameter, gradient and momentum must have one shape (N, R, C)")
    if second_moment.shape != second_moment_shape(param.shape):
        raise ValueError("the second moment must have the shape of second_moment_shape")
    tensors = [param, grad, momentum_buffer, second_moment]
    if any(x.dtype != torch.float32 for x in (param, momentum_buffer, second_moment, hyper)):
        raise ValueError("parameter, momentum, second moment and hyper must be fp32")
    if grad.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError("the gradient must be fp32 or bf16")
    if hyper.shape != (3,):
        raise ValueError("hyper must be the (3,) tensor of muon_hyper")
    check_tensor("muon_update", "hyper", hyper, (3,))
    if weights is not None:
        _check_copies(param, weights)
    if not all(x.is_contiguous() for x in tensors):
        raise ValueError("muon_update takes contiguous tensors only")


def muon_update(
    param,  # (N, R, C) fp32, updated in place
    grad,  # (N, R, C) fp32 or bf16, not changed unless clear_grad
    momentum_buffer,  # (N, R, C) fp32, updated in place
    second_moment,  # (N, R, 1) if R >= C, else (N, 1, C); fp32, updated in place
    hyper,  # (3,) fp32: learning rate, momentum, weight decay; see muon_hyper
    beta2=0.9,
    equilibration="row",
    muon_plus=True,
    weights=None,
    clear_grad=False,
    take=None,  # (1,) fp32
):
    """One Muon step of a stack of matrices, in place; muon_update_ref by kernels.

    Args:
        equilibration: one of EQUILIBRATIONS; "row" is fused into the first pass, "col" and "none"
            are slower.
        muon_plus: rescale the orthogonalised matrices to Frobenius norm sqrt(min(R, C)).
        weights: WeightCopies to fill with the updated parameter; its amaxes are raised.
        clear_grad: set the gradient to zero after it is read.
        take: where it is 0, the step is left out: parameter, momentum and second moment stay, and
            the gradient is cleared all the same; None: always take it. Read on the device.

    Raises:
        ValueError: shapes or dtypes other than above, a tensor that is not contiguous, a param that
            is not aligned although FP8 copies are asked for (kernels.common.fp8.check_alignment),
            or an unknown equilibration.
    """
    if equilibration not in EQUILIBRATIONS:
        raise ValueError(f"unknown equilibration {equilibration!r}")
    _check(param, grad, momentum_buffer, second_moment, hyper, weights)
    row = equilibration == "row"
    dtype = compute_dtype(param.device) if row else torch.float32
    z, norms = muon_momentum(grad, momentum_buffer, hyper, dtype, row, clear_grad, take)
    if row:
        x, squares = orthogonalize(z, initial_scale(z, norms))
    else:
        x = newton_schulz(z, equilibration, muon_plus=False)
        squares = x.square().sum(-1 if x.size(1) >= x.size(2) else -2)
    factors = muon_factors(squares, second_moment, param.shape, beta2, muon_plus, take)
    muon_apply(param, x, factors, hyper, weights, take)
