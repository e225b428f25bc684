"""Gradients of x0, of the looked-up embeddings e_k, and of their lambdas, over all layers at once.

Every block opens with y_l = resid_l * x_l + x0_lambda_l * x0 + sum_k lambda_kl * e_k, where e_k is
table k at its rows (kernels/residual_mix.py). With g_l the gradient of y_l:

    grad x0  = sum_l x0_lambda_l * g_l           grad x0_lambda_l = sum(g_l * x0)
    grad e_k = sum_l lambda_kl * g_l             grad lambda_kl   = sum(g_l * e_k)

All are computed in one pass over the stacked g (L, N, C), so that x0 and e_k are read, and their
gradients written, once per 16 layers instead of once per layer. e_k is not stored by the forward
pass but looked up again; kernels/embedding_grad.py adds its gradient up into the table's.

Bytes, L layers, N positions of width C at s bytes, K tables: s*N*C*(L + 2 + 2*K). FLOPs: 4 + 4*K
per element of g.
"""

from dataclasses import dataclass

import torch

from nanofuse.kernels.common.checks import check_lookups
from nanofuse.kernels.common.jit import tl, triton
from nanofuse.kernels.common.lanes import LANE, lane_sums
from nanofuse.kernels.common.tuning import tuned

MAX_WARPS = 16


@dataclass(frozen=True)
class Config:
    """Positions per program; layers per launch (a power of two: all of a position's gradients are
    in registers together); and the most registers per thread (None: the compiler's choice)."""

    positions: int = 8
    layers: int = 16
    registers: int | None = None


CONFIG = Config()


def residual_gradients_ref(
    grads,  # (L, N, C)
    x0,  # (N, C)
    x0_lambdas,  # (L,)
    looked_up=(),  # ((e (N, C), lambdas (L,)), ...) of each table
):
    """Gradients of x0 (N, C) and x0_lambdas (L,), and of each table's e (N, C) and lambdas (L,)."""

    def pair(
        e,  # (N, C)
        lambdas,  # (L,)
    ):
        return torch.einsum("l,lnc->nc", lambdas, grads), torch.einsum("lnc,nc->l", grads, e)

    return *pair(x0, x0_lambdas), [pair(e, lambdas) for e, lambdas in looked_up]


@triton.jit
def _residual_gradients_kernel(
    grads_ptr,  # (L, N, C)
    x0_ptr,  # (N, C)
    rows_ptrs,  # of each table: (N,) int32
    table_ptrs,  # of each table: (R, C)
    lambda_ptrs,  # of x0 and each table: (L,)
    out_ptrs,  # gradients of x0 and of each table's e: (N, C)
    partial_ptr,  # (programs, L, TERMS) fp32: a program's share of the gradients of all lambdas;
    # programs are (N / POSITIONS, C / BC)
    L,
    N,
    C,
    layer_stride,
    ACCUMULATE: tl.constexpr,
    TERMS: tl.constexpr,  # x0 and the tables
    POSITIONS: tl.constexpr,
    BL: tl.constexpr,
    BC: tl.constexpr,
):
    # The loop takes one position at a time, with the gradients of all its layers, (BL, BC). A lane
    # holds LANE adjacent columns of every layer, so that sums over layers need no shuffle; sums
    # over columns are kept per lane and reduced across lanes after the loop.
    layers, cols = tl.arange(0, BL), tl.program_id(1) * BC + tl.arange(0, BC)
    layer_ok, col_ok = layers < L, cols < C
    lambdas = ()
    sums = ()  # of each term: gradients of its lambdas
    for term in tl.static_range(TERMS):
        lambdas += (tl.load(lambda_ptrs[term] + layers, mask=layer_ok, other=0.0).to(tl.float32),)
        sums += (tl.zeros((BL, BC // LANE), tl.float32),)
    layer_offsets = layers.to(tl.int64)[:, None] * layer_stride + cols[None, :]
    for i in range(POSITIONS):
        position = tl.program_id(0) * POSITIONS + i
        where = position + tl.arange(0, 1)  # (1,)
        ok = col_ok & (where < N)
        base = position.to(tl.int64) * C
        mask = layer_ok[:, None] & ok[None, :]
        g = tl.load(grads_ptr + base + layer_offsets, mask=mask, other=0.0).to(tl.float32)
        raised = ()
        for term in tl.static_range(TERMS):
            if term == 0:
                e = tl.load(x0_ptr + base + cols, mask=ok, other=0.0).to(tl.float32)
            else:
                row = tl.load(rows_ptrs[term - 1] + where, mask=where < N, other=0).to(tl.int64)
                e = tl.load(table_ptrs[term - 1] + row * C + cols, mask=ok, other=0.0)
                e = e.to(tl.float32)
            out_ptr = out_ptrs[term] + base + cols
            grad_e = tl.sum(lambdas[term][:, None] * g, axis=0)
            raised += (sums[term] + lane_sums(g * e[None, :], BL, BC),)
            if ACCUMULATE:
                grad_e += tl.load(out_ptr, mask=ok, other=0.0).to(tl.float32)
            tl.store(out_ptr, grad_e.to(out_ptr.dtype.element_ty), mask=ok)
        sums = raised
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    partial_ptr += program * L * TERMS
    for term in tl.static_range(TERMS):
        grad_lambdas = tl.sum(sums[term], axis=1)  # (BL,)
        for layer in tl.static_range(BL):  # as scalars: a vector store converts its layout first
            if layer < L:
                total = tl.sum(tl.where(layers == layer, grad_lambdas, 0.0), axis=0)
                tl.store(partial_ptr + layer * TERMS + term, total)


def _block_of(c):
    """Columns of a program: a power of two that gives each lane of a warp its own, where there are
    so many; the one that pads the columns least, and of equals the largest."""
    most = max(triton.next_power_of_2(c), LANE.value)
    blocks = [most >> i for i in range(8) if most >> i >= 32 * LANE.value]
    return min(blocks or [most], key=lambda block: triton.cdiv(c, block) * block)


def _check(grads, x0, x0_lambdas, lookups):
    layers, n, c = grads.shape
    for name, tensor, shape in (
        ("grads[0]", grads[0] if layers else None, (n, c)),
        ("x0", x0, (n, c)),
        ("x0_lambdas", x0_lambdas, (layers,)),
    ):
        if tensor is not None and (not tensor.is_contiguous() or tensor.shape != shape):
            raise ValueError(f"residual_gradients: {name} must be contiguous, {tuple(shape)}")
    check_lookups("residual_gradients", lookups, n, c, layers)


def residual_gradients(
    grads,  # (L, N, C), each layer contiguous, layers any stride apart
    x0,  # (N, C)
    x0_lambdas,  # (L,)
    lookups=(),  # ((rows (N,) int32, table (R, C), lambdas (L,)), ...)
):
    """Gradients of x0 and of each table's looked-up e, (N, C) in x0's dtype, and of the lambdas,
    (L,) fp32.

    All sums accumulate in fp32, in a fixed order.

    Args:
        grads: the gradients g_l of the mixes y_l.

    Returns:
        The gradients of x0 and x0_lambdas, and of each lookup the gradients of e and its lambdas.

    Raises:
        ValueError: a tensor that is not contiguous or does not fit the others.
    """
    _check(grads, x0, x0_lambdas, lookups)
    layers, n, c = grads.shape
    rows, tables, table_lambdas = zip(*lookups, strict=True) if lookups else ((), (), ())
    lambdas = (x0_lambdas, *table_lambdas)
    outs = tuple(torch.empty_like(x0) for _ in lambdas)
    config = tuned("residual_gradients", CONFIG, c)
    block = _block_of(c)
    grid = triton.cdiv(n, config.positions), triton.cdiv(c, block)
    grad_lambdas = []  # (group, terms) each
    for first in range(0, layers, config.layers):
        group = min(config.layers, layers - first)
        size = grid[0] * grid[1], group, len(lambdas)
        partial = torch.empty(size, dtype=torch.float32, device=x0.device)
        _residual_gradients_kernel[grid](
            grads_ptr=grads[first:],
            x0_ptr=x0,
            rows_ptrs=rows,
            table_ptrs=tables,
            lambda_ptrs=tuple(x[first:] for x in lambdas),
            out_ptrs=outs,
            partial_ptr=partial,
            L=group,
            N=n,
            C=c,
            layer_stride=grads.stride(0),
            ACCUMULATE=first > 0,
            TERMS=len(lambdas),
            POSITIONS=config.positions,
            BL=triton.next_power_of_2(group),
            BC=block,
            num_warps=min(max(block // (32 * LANE.value), 1), MAX_WARPS),
            maxnreg=config.registers,
        )
        grad_lambdas.append(partial.sum(dim=0))
    grad_lambdas = torch.cat(grad_lambdas).unbind(dim=1)  # of each term (L,)
    (grad_x0, *grad_e), (grad_x0_lambdas, *grads_of_tables) = outs, grad_lambdas
    return grad_x0, grad_x0_lambdas, list(zip(grad_e, grads_of_tables, strict=True))
