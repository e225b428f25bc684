"""Token embedding, RMSNorm and smear, which adds to each position a gated share of the previous
position's normalised embedding (karpathy/nanochat at dc54a1a).

    n_t = rms_norm(wte[token_t]);   gate_t = W . n_t[:G]
    y_t = n_t + smear_lambda * sigmoid(gate_t) * n_{t-1},        y_0 = n_0

`embed_smear` computes all of it in one kernel, forward and backward. With g the upstream gradient
(of y), s = sigmoid(gate) and q_t = g_t . n_{t-1}:

    grad gate_t = smear_lambda * s_t * (1 - s_t) * q_t,      grad smear_lambda = sum_t s_t * q_t
    grad n_t    = g_t + smear_lambda * s_{t+1} * g_{t+1} + grad gate_t * W

and the backward pass of the norm turns grad n_t into the gradient of the looked-up table row, which
kernels/embedding_grad.py adds up by token. Bytes, N positions of width C at s bytes: forward
2*N*C*s, backward 3*N*C*s (rows of neighbouring positions hit in the cache). FLOPs: about 8 forward,
15 backward per element.
"""

import torch
import torch.nn.functional as F

from nanofuse.kernels.common.checks import check_scalars, check_tensor
from nanofuse.kernels.common.jit import tl, triton
from nanofuse.kernels.common.rms_norm import RMS_NORM_EPS, rms_norm_ref
from nanofuse.kernels.common.tuning import Tile, tuned
from nanofuse.kernels.embedding_grad import embedding_grad, sort_rows

TILE = Tile(rows=1, cols=0, warps=2)  # whole rows


def smear_ref(
    x,  # (B, T, D) normalised embeddings
    gate,  # (B, T, 1) logits
    smear_lambda,  # (1,)
    prev_embedding=None,  # (B, D): x before x[:, 0], or None at the start of a row
):
    """Smeared embeddings, (B, T, D) in x's dtype; without prev_embedding x[:, 0] is unchanged."""
    scale = smear_lambda.to(x.dtype) * torch.sigmoid(gate)  # (B, T, 1)
    if prev_embedding is None:
        return torch.cat([x[:, :1], x[:, 1:] + scale[:, 1:] * x[:, :-1]], dim=1)
    previous = torch.cat([prev_embedding[:, None], x[:, :-1]], dim=1)  # (B, T, D)
    return x + scale * previous


def embed_smear_ref(
    tokens,  # (B, T) integer
    table,  # (V, C) token embeddings
    gate_weight,  # (1, G)
    smear_lambda,  # (1,)
):
    """Token embedding, RMSNorm and smear, (B, T, C) in the table's dtype."""
    x = rms_norm_ref(F.embedding(tokens, table))
    gate = F.linear(x[..., : gate_weight.size(1)], gate_weight.to(x.dtype))
    return smear_ref(x, gate, smear_lambda)


@triton.jit
def _normed_rows(
    table_ptr,  # (V, C)
    tokens,  # (BM,) int64
    ok,  # (BM, BC) bool
    cols,  # (BC,)
    V,
    C,
    eps,
):
    """Look up and normalise table rows: the result (BM, BC) in fp32, the same rounded to the
    table's dtype (BM, BC), and the inverse root mean squares rstd (BM,). A token outside of the
    table reads nothing and gives NaN."""
    known = (tokens >= 0) & (tokens < V)
    ok = ok & known[:, None]
    e = tl.load(table_ptr + tokens[:, None] * C + cols[None, :], mask=ok, other=0.0)
    e = e.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(e * e, axis=1) / C + eps)
    rstd = tl.where(known, rstd, float("nan"))
    normed = e * rstd[:, None]
    return normed, normed.to(table_ptr.dtype.element_ty).to(tl.float32), rstd


@triton.jit
def _embed_smear_fwd_kernel(
    tokens_ptr,  # (N,) integer
    table_ptr,  # (V, C)
    weight_ptr,  # (G,)
    lambda_ptr,  # (1,)
    y_ptr,  # (N, C)
    gate_ptr,  # (N,) fp32: sigmoid(gate), written
    N,
    V,
    C,
    T,
    eps,
    G: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.arange(0, BC)
    row_ok, first = rows < N, rows % T == 0
    ok = row_ok[:, None] & (cols < C)[None, :]
    token = tl.load(tokens_ptr + rows, mask=row_ok, other=0).to(tl.int64)
    _, x, _ = _normed_rows(table_ptr, token, ok, cols, V, C, eps)
    token = tl.load(tokens_ptr + rows - 1, mask=row_ok & ~first, other=0).to(tl.int64)
    _, previous, _ = _normed_rows(table_ptr, token, ok & ~first[:, None], cols, V, C, eps)
    weight = tl.load(weight_ptr + cols, mask=cols < G, other=0.0).to(tl.float32)  # (BC,)
    gate = 1.0 / (1.0 + tl.exp(-tl.sum(x * weight[None, :], axis=1)))  # (BM,)
    scale = tl.load(lambda_ptr).to(tl.float32) * gate
    y = x + scale[:, None] * previous
    offsets = rows.to(tl.int64)[:, None] * C + cols[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=ok)
    tl.store(gate_ptr + rows, gate, mask=row_ok)


@triton.jit
def _embed_smear_bwd_kernel(
    grad_ptr,  # (N, C) gradient of y
    tokens_ptr,  # (N,) integer
    table_ptr,  # (V, C)
    weight_ptr,  # (G,)
    lambda_ptr,  # (1,)
    gate_ptr,  # (N,) fp32: sigmoid(gate), from the forward pass
    grad_rows_ptr,  # (N, C) gradient of the looked-up rows
    partial_ptr,  # (programs, G + 1) fp32: gradients of gate_weight (G) and smear_lambda (1)
    N,
    V,
    C,
    T,
    eps,
    G: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.arange(0, BC)
    row_ok, first = rows < N, rows % T == 0
    last = (rows + 1) % T == 0
    ok = row_ok[:, None] & (cols < C)[None, :]
    offsets = rows.to(tl.int64)[:, None] * C + cols[None, :]
    grad = tl.load(grad_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
    after_ok = (rows + 1 < N) & ~last
    after = tl.load(grad_ptr + offsets + C, mask=ok & after_ok[:, None], other=0.0).to(tl.float32)
    token = tl.load(tokens_ptr + rows, mask=row_ok, other=0).to(tl.int64)
    normed, x, rstd = _normed_rows(table_ptr, token, ok, cols, V, C, eps)
    token = tl.load(tokens_ptr + rows - 1, mask=row_ok & ~first, other=0).to(tl.int64)
    _, previous, _ = _normed_rows(table_ptr, token, ok & ~first[:, None], cols, V, C, eps)
    weight = tl.load(weight_ptr + cols, mask=cols < G, other=0.0).to(tl.float32)  # (BC,)
    smear_lambda = tl.load(lambda_ptr).to(tl.float32)
    gate = tl.load(gate_ptr + rows, mask=row_ok, other=0.0)  # (BM,)
    gate_after = tl.load(gate_ptr + rows + 1, mask=after_ok, other=0.0)
    grad_scale = tl.sum(grad * previous, axis=1)  # (BM,), 0 at first positions
    grad_gate = smear_lambda * gate * (1.0 - gate) * grad_scale
    grad_x = grad + (smear_lambda * gate_after)[:, None] * after
    grad_x += grad_gate[:, None] * weight[None, :]
    mean = tl.sum(grad_x * normed, axis=1) / C
    grad_row = rstd[:, None] * (grad_x - normed * mean[:, None])
    tl.store(grad_rows_ptr + offsets, grad_row.to(grad_rows_ptr.dtype.element_ty), mask=ok)
    partial_ptr += tl.program_id(0) * (G + 1)
    tl.store(partial_ptr + cols, tl.sum(grad_gate[:, None] * x, axis=0), mask=cols < G)
    tl.store(partial_ptr + G, tl.sum(gate * grad_scale, axis=0))


def _launch(tokens, table, gate_weight, smear_lambda):
    """Check the inputs; the grid, and sizes and tile of the forward and backward launch.

    Raises:
        ValueError: as embed_smear.
    """
    for name, tensor in (("tokens", tokens), ("table", table), ("gate_weight", gate_weight)):
        if not tensor.is_contiguous():
            raise ValueError(f"embed_smear takes contiguous {name}; call .contiguous() on it")
    check_scalars("embed_smear", smear_lambda=smear_lambda)
    if tokens.dim() != 2 or table.dim() != 2:
        raise ValueError("embed_smear: tokens must be (B, T) and the table (V, C)")
    if gate_weight.numel() > table.size(1):
        raise ValueError(
            f"embed_smear: the gate reads {gate_weight.numel()} channels of {table.size(1)}"
        )
    config = tuned("embed_smear", TILE, table.size(1))
    n, c = tokens.numel(), table.size(1)
    tile = {
        "G": gate_weight.numel(),
        "BM": config.rows,
        "BC": triton.next_power_of_2(c),
        "num_warps": config.warps,
    }
    sizes = {"N": n, "V": table.size(0), "C": c, "T": tokens.size(1), "eps": RMS_NORM_EPS}
    return (triton.cdiv(n, config.rows),), sizes | tile


def embed_smear_fwd(
    tokens,  # (B, T) integer
    table,  # (V, C)
    gate_weight,  # (1, G)
    smear_lambda,  # (1,)
):
    """Smeared embeddings y (B*T, C) in the table's dtype, and sigmoid(gate) (B*T,) fp32.

    A token outside of [0, V) gives NaN, at its position and at the next one of its row, which takes
    a part of it; in backward its gradients are NaN too, but for the table, where it has no row.

    Raises:
        ValueError: a tensor that is not contiguous, or a gate wider than the table.
    """
    grid, sizes = _launch(tokens, table, gate_weight, smear_lambda)
    n, c = tokens.numel(), table.size(1)
    y = torch.empty(n, c, dtype=table.dtype, device=table.device)
    gate = torch.empty(n, dtype=torch.float32, device=table.device)
    _embed_smear_fwd_kernel[grid](
        tokens_ptr=tokens,
        table_ptr=table,
        weight_ptr=gate_weight,
        lambda_ptr=smear_lambda,
        y_ptr=y,
        gate_ptr=gate,
        **sizes,
    )
    return y, gate


def embed_smear_bwd(
    grad,  # (B*T, C) upstream gradient
    tokens,  # (B, T) integer
    table,  # (V, C)
    gate_weight,  # (1, G)
    smear_lambda,  # (1,)
    gate,  # (B*T,) fp32: sigmoid(gate), from embed_smear_fwd
):
    """Gradients of the looked-up rows (B*T, C) in grad's dtype, and of gate_weight (1, G) and
    smear_lambda (1,) in fp32.

    Raises:
        ValueError: as embed_smear_fwd, or a grad or gate that is not contiguous or of another
            shape.
    """
    grid, sizes = _launch(tokens, table, gate_weight, smear_lambda)
    n = tokens.numel()
    check_tensor("embed_smear", "grad", grad, (n, table.size(1)))
    check_tensor("embed_smear", "gate", gate, (n,), torch.float32)
    grad_rows = torch.empty_like(grad)
    partial = torch.empty(grid[0], sizes["G"] + 1, dtype=torch.float32, device=grad.device)
    _embed_smear_bwd_kernel[grid](
        grad_ptr=grad,
        tokens_ptr=tokens,
        table_ptr=table,
        weight_ptr=gate_weight,
        lambda_ptr=smear_lambda,
        gate_ptr=gate,
        grad_rows_ptr=grad_rows,
        partial_ptr=partial,
        **sizes,
    )
    sums = partial.sum(dim=0)  # (G + 1,)
    return grad_rows, sums[:-1].view(1, -1), sums[-1:]


class EmbedSmear(torch.autograd.Function):
    """embed_smear for autograd: gradients of table, gate_weight and smear_lambda."""

    @staticmethod
    def forward(
        ctx,
        tokens,  # (B, T)
        table,  # (V, C)
        gate_weight,  # (1, G)
        smear_lambda,  # (1,)
    ):
        y, gate = embed_smear_fwd(tokens, table, gate_weight, smear_lambda)
        ctx.save_for_backward(tokens, table, gate_weight, smear_lambda, gate)
        return y.view(*tokens.shape, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx,
        grad,  # (B, T, C)
    ):
        tokens, table, gate_weight, smear_lambda, gate = ctx.saved_tensors
        grad = grad.contiguous().view(-1, grad.size(-1))
        grad_rows, grad_gate_weight, grad_lambda = embed_smear_bwd(
            grad, tokens, table, gate_weight, smear_lambda, gate
        )
        grad_table = torch.zeros_like(table)
        embedding_grad(grad_rows, sort_rows(tokens, table.size(0)), grad_table)
        return (
            None,
            grad_table,
            # copies: both lie in one buffer, and .grad of two leaves may not share memory
            grad_gate_weight.to(gate_weight.dtype, copy=True),
            grad_lambda.to(smear_lambda.dtype, copy=True),
        )


def embed_smear(
    tokens,  # (B, T) integer, contiguous
    table,  # (V, C) token embeddings, contiguous
    gate_weight,  # (1, G), G <= C
    smear_lambda,  # (1,)
):
    """Token embedding, RMSNorm and smear, (B, T, C) in the table's dtype; differentiable.

    A token outside of the table gives NaN (see embed_smear_fwd); embed_smear_ref raises.

    Raises:
        ValueError: a tensor that is not contiguous, or a gate wider than the table.
    """
    return EmbedSmear.apply(tokens, table, gate_weight, smear_lambda)
