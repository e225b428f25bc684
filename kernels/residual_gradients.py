"""Gradients of x0, of the bigram embeddings e, and of their lambdas, over all layers in one pass.

Every block opens with y_l = resid_l * x_l + x0_lambda_l * x0 + bigram_lambda_l * e
(kernels/residual_mix.py). With g_l the gradient of y_l:

    grad x0 = sum_l x0_lambda_l * g_l            grad x0_lambda_l     = sum(g_l * x0)
    grad e  = sum_l bigram_lambda_l * g_l        grad bigram_lambda_l = sum(g_l * e)

All four are computed in one pass over the stacked g (L, N, C), so that x0 and e are read, and
grad x0 and grad e written, once per 16 layers instead of once per layer. e is not stored by the
forward pass but looked up again; kernels/embedding_grad.py adds grad e up into the table's
gradient.

Bytes, L layers, N positions of width C at s bytes: s*N*C*(L + 4). FLOPs: 8 per element of g.
"""

from dataclasses import dataclass

import torch

from nanofuse.kernels.bigram_rows import HASH_CURRENT, HASH_PREVIOUS, hash_rows
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
    e=None,  # (N, C)
    bigram_lambdas=None,  # (L,)
):
    """Gradients of x0 (N, C), x0_lambdas (L,), e (N, C) and bigram_lambdas (L,); the last two are
    None without e."""
    grad_x0 = torch.einsum("l,lnc->nc", x0_lambdas, grads)
    grad_x0_lambdas = torch.einsum("lnc,nc->l", grads, x0)
    if e is None:
        return grad_x0, grad_x0_lambdas, None, None
    grad_e = torch.einsum("l,lnc->nc", bigram_lambdas, grads)
    return grad_x0, grad_x0_lambdas, grad_e, torch.einsum("lnc,nc->l", grads, e)


@triton.jit
def _residual_gradients_kernel(
    grads_ptr,  # (L, N, C)
    x0_ptr,  # (N, C)
    tokens_ptr,  # (N,) integer, or None
    table_ptr,  # (num_rows, C) or None
    x0_lambdas_ptr,  # (L,)
    bigram_lambdas_ptr,  # (L,) or None
    grad_x0_ptr,  # (N, C)
    grad_e_ptr,  # (N, C) or None
    partial_ptr,  # (programs, L, 2) fp32: a program's share of the gradients of both lambdas
    L,
    N,
    C,
    layer_stride,
    T,
    num_rows,
    CURRENT: tl.constexpr,
    PREVIOUS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    POSITIONS: tl.constexpr,
    BL: tl.constexpr,
    BC: tl.constexpr,
):
    # The loop takes one position at a time, with the gradients of all its layers, (BL, BC). A lane
    # holds LANE adjacent columns of every layer, so that sums over layers need no shuffle; sums
    # over columns are kept per lane and reduced across lanes after the loop.
    layers, cols = tl.arange(0, BL), tl.arange(0, BC)
    layer_ok, col_ok = layers < L, cols < C
    x0_lambdas = tl.load(x0_lambdas_ptr + layers, mask=layer_ok, other=0.0).to(tl.float32)
    grad_x0_lambda = tl.zeros((BL, BC // LANE), tl.float32)
    grad_bigram_lambda = grad_x0_lambda
    if table_ptr is not None:
        bigram_lambdas = tl.load(bigram_lambdas_ptr + layers, mask=layer_ok, other=0.0)
        bigram_lambdas = bigram_lambdas.to(tl.float32)
    layer_offsets = layers.to(tl.int64)[:, None] * layer_stride + cols[None, :]
    for i in range(POSITIONS):
        position = tl.program_id(0) * POSITIONS + i
        where = position + tl.arange(0, 1)  # (1,)
        ok = col_ok & (where < N)
        base = position.to(tl.int64) * C
        mask = layer_ok[:, None] & ok[None, :]
        g = tl.load(grads_ptr + base + layer_offsets, mask=mask, other=0.0).to(tl.float32)
        x0 = tl.load(x0_ptr + base + cols, mask=ok, other=0.0).to(tl.float32)
        grad_x0 = tl.sum(x0_lambdas[:, None] * g, axis=0)
        grad_x0_lambda += lane_sums(g * x0[None, :], BL, BC)
        if ACCUMULATE:
            grad_x0 += tl.load(grad_x0_ptr + base + cols, mask=ok, other=0.0).to(tl.float32)
        tl.store(grad_x0_ptr + base + cols, grad_x0.to(grad_x0_ptr.dtype.element_ty), mask=ok)
        if table_ptr is not None:
            row = hash_rows(tokens_ptr, where, where < N, T, num_rows, CURRENT, PREVIOUS)  # (1,)
            e = tl.load(table_ptr + row * C + cols, mask=ok, other=0.0).to(tl.float32)
            grad_e = tl.sum(bigram_lambdas[:, None] * g, axis=0)
            grad_bigram_lambda += lane_sums(g * e[None, :], BL, BC)
            if ACCUMULATE:
                grad_e += tl.load(grad_e_ptr + base + cols, mask=ok, other=0.0).to(tl.float32)
            tl.store(grad_e_ptr + base + cols, grad_e.to(grad_e_ptr.dtype.element_ty), mask=ok)
    partial_ptr += tl.program_id(0).to(tl.int64) * L * 2
    grad_x0_lambda = tl.sum(grad_x0_lambda, axis=1)  # (BL,)
    grad_bigram_lambda = tl.sum(grad_bigram_lambda, axis=1)  # (BL,)
    for layer in tl.static_range(BL):  # stored as scalars: a vector store converts its layout first
        if layer < L:
            one = layers == layer
            total = tl.sum(tl.where(one, grad_x0_lambda, 0.0), axis=0)
            tl.store(partial_ptr + 2 * layer, total)
            if table_ptr is not None:
                total = tl.sum(tl.where(one, grad_bigram_lambda, 0.0), axis=0)
                tl.store(partial_ptr + 2 * layer + 1, total)


def _check(grads, x0, x0_lambdas, tokens, table, bigram_lambdas):
    layers, n, c = grads.shape
    for name, tensor, shape in (
        ("grads[0]", grads[0] if layers else None, (n, c)),
        ("x0", x0, (n, c)),
        ("x0_lambdas", x0_lambdas, (layers,)),
        ("bigram_lambdas", bigram_lambdas, (layers,)),
        ("table", table, (table.size(0) if table is not None else 0, c)),
    ):
        if tensor is not None and (not tensor.is_contiguous() or tensor.shape != shape):
            raise ValueError(f"residual_gradients: {name} must be contiguous, {tuple(shape)}")
    if len({x is None for x in (tokens, table, bigram_lambdas)}) > 1:
        raise ValueError("residual_gradients: tokens, table and bigram_lambdas go together")
    if table is not None and (
        tokens.numel() != n or not tokens.is_contiguous() or table.size(0) < 2
    ):
        raise ValueError(f"residual_gradients: want {n} contiguous tokens and a table of 2 rows")


def residual_gradients(
    grads,  # (L, N, C), each layer contiguous, layers any stride apart
    x0,  # (N, C)
    x0_lambdas,  # (L,)
    tokens=None,  # (B, T) integer, B*T = N
    table=None,  # (num_rows, C) bigram table
    bigram_lambdas=None,  # (L,)
):
    """Gradients of x0 and e, (N, C) in x0's dtype, and of the lambdas, (L,) fp32.

    All sums accumulate in fp32, in a fixed order.

    Args:
        grads: the gradients g_l of the mixes y_l.
        tokens, table, bigram_lambdas: of the bigram term; all None without it.

    Returns:
        The gradients of x0, x0_lambdas, e and bigram_lambdas; the last two are None without a
        table.

    Raises:
        ValueError: a tensor that is not contiguous or does not fit the others.
    """
    _check(grads, x0, x0_lambdas, tokens, table, bigram_lambdas)
    layers, n, c = grads.shape
    grad_x0, grad_e = torch.empty_like(x0), None if table is None else torch.empty_like(x0)
    config = tuned("residual_gradients", CONFIG)
    programs = triton.cdiv(n, config.positions)
    block = max(triton.next_power_of_2(c), LANE.value)
    grad_lambdas = []  # (group, 2) each
    for first in range(0, layers, config.layers):
        group = min(config.layers, layers - first)
        partial = torch.empty(programs, group, 2, dtype=torch.float32, device=x0.device)
        _residual_gradients_kernel[(programs,)](
            grads[first:],
            x0,
            tokens,
            table,
            x0_lambdas[first:],
            None if table is None else bigram_lambdas[first:],
            grad_x0,
            grad_e,
            partial,
            group,
            n,
            c,
            grads.stride(0),
            tokens.size(1) if tokens is not None else n,
            table.size(0) if table is not None else 0,
            HASH_CURRENT,
            HASH_PREVIOUS,
            ACCUMULATE=first > 0,
            POSITIONS=config.positions,
            BL=triton.next_power_of_2(group),
            BC=block,
            num_warps=min(max(block // (32 * LANE.value), 1), MAX_WARPS),
            maxnreg=config.registers,
        )
        grad_lambdas.append(partial.sum(dim=0))
    grad_lambdas = torch.cat(grad_lambdas)  # (L, 2)
    if table is None:
        return grad_x0, grad_lambdas[:, 0], None, None
    return grad_x0, grad_lambdas[:, 0], grad_e, grad_lambdas[:, 1]
