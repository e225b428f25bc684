"""Cases of the ops on the stream: quantisation, embedding, residual mix, rotary and gates."""

from dataclasses import replace
from functools import partial

import torch

from nanofuse.bench.cases.case import (
    BIGRAM_FACTOR,
    Case,
    looked_up,
    nbytes,
    randn,
    rows_of_tokens,
    sizes,
)
from nanofuse.bench.harness import zipf_tokens
from nanofuse.kernels.bigram_rows import bigram_rows
from nanofuse.kernels.common.attention_sums import TILE_COLS, TILE_ROWS, AttentionSums
from nanofuse.kernels.common.fp8 import E4M3, E5M2, Scaling
from nanofuse.kernels.common.tuning import sm_count
from nanofuse.kernels.embed_smear import embed_smear_bwd, embed_smear_fwd
from nanofuse.kernels.gate_logits import gate_logits_bwd, gate_logits_fwd
from nanofuse.kernels.linear_residual_norm import linear_residual_norm_fwd
from nanofuse.kernels.linear_residual_norm import takes as takes_norm
from nanofuse.kernels.linear_rotary_qk_norm import linear_rotary_qk_norm_fwd, pack_angles, takes
from nanofuse.kernels.quantize import quantize
from nanofuse.kernels.resid_lambda_grad import resid_lambda_grad
from nanofuse.kernels.residual_gradients import residual_gradients
from nanofuse.kernels.residual_mix import residual_mix_bwd, residual_mix_fwd
from nanofuse.kernels.rotary_qk_norm import rotary_qk_norm_bwd, rotary_qk_norm_fwd, rotary_table
from nanofuse.kernels.transpose import transpose

SMEAR_CHANNELS = 24
GATE_CHANNELS = 12
SECTOR = 32  # bytes, the smallest access to memory: what gate_logits reads of a row of y


def quantize_case(rows, device, factor=1):
    x = randn(device, rows, factor * sizes(device).width)
    scaling = Scaling.from_bound(x.abs().max().item(), E4M3, device)
    return Case(lambda: quantize(x, scaling), tuple(x.shape), x, args=(x, scaling))


def transpose_case(rows, device):
    x, _ = quantize_case(rows, device).args
    x = x.to(E4M3)
    out = torch.empty(x.size(1), x.size(0), dtype=E4M3, device=device)
    return Case(lambda: transpose(x, out), tuple(x.shape), x, out, returns_new=False, args=(x, out))


class Layer:
    """Random tensors of one layer in one micro-step."""

    def __init__(self, rows, device):
        model = sizes(device)
        self.shape = rows, model.width
        self.tokens = zipf_tokens(rows_of_tokens(rows), model.vocab, device)
        self.table = randn(device, BIGRAM_FACTOR * model.vocab, model.width)
        self.rows = bigram_rows(self.tokens, self.table.size(0)).view(-1)
        self.x, self.x0, self.branch, self.h, self.stream = (
            randn(device, *self.shape) for _ in range(5)
        )
        self.rstd = self.branch.float().square().mean(dim=-1).add(2.0**-23).rsqrt()
        self.resid, self.x0_lambda, self.bigram = (
            torch.tensor([v], device=device) for v in (1.1, 0.2, 0.05)
        )
        self.e4m3 = Scaling.from_bound(model.width**0.5, E4M3, device)
        self.e5m2 = Scaling.from_bound(40.0, E5M2, device)

    def opening(self, table=True):
        """The kernel that opens a block, with or without the bigram term."""
        return residual_mix_fwd(
            self.x,
            self.branch,
            self.x0,
            ((self.rows, self.table, self.bigram),) if table else (),
            resid_lambda=self.resid,
            x0_lambda=self.x0_lambda,
            scaling=self.e4m3,
        )


def residual_mix_fwd_case(rows, device):
    i = Layer(rows, device)
    read = i.x, i.branch, i.x0, i.rows, looked_up(i.table, i.rows)
    return Case(i.opening, i.shape, read, args=(i,))


def residual_norm_fwd_case(rows, device):
    i = Layer(rows, device)

    def run():
        return residual_mix_fwd(i.x, i.branch, scaling=i.e4m3)

    return Case(run, i.shape, (i.x, i.branch), args=(i,))


def residual_bwd_case(rows, device, opening):
    """Of the mix that opens a block, or of the residual add in its middle. sum(g * x) follows from
    sum(g * y), so the kernel reads no x."""
    i = Layer(rows, device)
    options = {"x": i.branch, "resid_lambda": i.resid} if opening else {}

    def run():
        return residual_mix_bwd(i.h, i.branch, i.rstd, i.stream, scaling=i.e5m2, **options)

    return Case(run, i.shape, (i.h, i.branch, i.rstd, i.stream), args=(i, options))


def residual_gradients_case(rows, device):
    i, layers = Layer(rows, device), sizes(device).layers
    grads = randn(device, layers, *i.shape)
    lambdas = [torch.rand(layers, device=device) for _ in range(2)]

    def run(table=True):
        lookups = ((i.rows, i.table, lambdas[1]),) if table else ()
        return residual_gradients(grads, i.x0, lambdas[0], lookups)

    read = grads, i.x0, i.rows, looked_up(i.table, i.rows)
    return Case(run, (layers, *i.shape), read, args=(i, grads, lambdas))


def embed_smear_inputs(rows, device, dtype=torch.bfloat16):
    """tokens (B, T), table (V, C), gate_weight (1, 24), smear_lambda (1,)."""
    model = sizes(device)
    tokens = zipf_tokens(rows_of_tokens(rows), model.vocab, device)
    table = torch.randn(model.vocab, model.width, device=device).to(dtype)
    gate = torch.rand(1, SMEAR_CHANNELS, device=device)
    return tokens, table, gate, torch.tensor([0.3], device=device)


def embed_smear_fwd_case(rows, device, dtype=torch.bfloat16):
    args = embed_smear_inputs(rows, device, dtype)
    read = args[0], looked_up(args[1], args[0])
    return Case(lambda: embed_smear_fwd(*args), (rows, args[1].size(1)), read, args=args)


def embed_smear_bwd_case(rows, device, dtype=torch.bfloat16):
    args = embed_smear_inputs(rows, device, dtype)
    grad = torch.randn(rows, args[1].size(1), device=device).to(dtype)
    gate = embed_smear_fwd(*args)[1]
    read = grad, args[0], looked_up(args[1], args[0]), gate
    return Case(
        lambda: embed_smear_bwd(grad, *args, gate),
        tuple(grad.shape),
        read,
        args=(grad, *args),
    )


def embed_smear_case(rows, device):
    """Both passes, which share a configuration."""
    forward, backward = (
        make(rows, device) for make in (embed_smear_fwd_case, embed_smear_bwd_case)
    )
    read = forward.read, backward.read
    return Case(lambda: (forward.run(), backward.run()), forward.shape, read)


def rotary_inputs(rows, device, value, model, length):
    """qkv (N, 3*H*D); the arguments from tokens to seq_len; the bytes that are looked up."""
    angles = rotary_table(length, model.head_dim, 1e5, device)
    qkv = randn(device, rows, 3 * model.width)
    if not value:
        return qkv, (None, None, None, *angles, length), 0
    tokens = zipf_tokens((rows,), model.vocab, device)
    table, gate = randn(device, model.vocab, model.width), randn(device, rows, model.heads)
    args = tokens, table, gate, *angles, length
    return qkv, args, nbytes(tokens, gate) + looked_up(table, tokens)


def rotary_qk_norm_case(rows, device, value=True):
    """In place: q and k, and v where it has a value embedding."""
    model = sizes(device)
    qkv, args, extra = rotary_inputs(rows, device, value, model, rows_of_tokens(rows)[1])
    moved = nbytes(qkv) // 3 * (3 if value else 2)
    return Case(
        lambda: rotary_qk_norm_fwd(qkv, *args, model.heads),
        (rows, model.heads, model.head_dim),
        (moved, extra),
        moved,
        args=(qkv, *args),
    )


def linear_rotary_qk_norm_case(rows, device, value=True):
    """Where the op does not take it, a product and a rotation, as in a training pass. The case's
    last argument is what rotary_qk_norm takes beside qkv."""
    model = sizes(device)
    _, args, extra = rotary_inputs(rows, device, value, model, rows_of_tokens(rows)[1])
    scaling = partial(Scaling.from_bound, dtype=E4M3, device=device)
    bound = 6 / model.width**0.5
    x = quantize(randn(device, rows, model.width), scaling(6.0))
    w = quantize(randn(device, 3 * model.width, model.width) * (bound / 6), scaling(bound))
    *values, cos, sin, length = args
    angles = pack_angles(cos[:length], sin[:length])

    def run():
        if takes(x, w, model.head_dim):
            return linear_rotary_qk_norm_fwd(x, w, *values, angles, model.heads)
        qkv = (x.dequantize() @ w.dequantize().t()).to(torch.bfloat16)
        return qkv, rotary_qk_norm_fwd(qkv, *args, model.heads)

    return Case(
        run,
        (rows, model.width, 3 * model.width),
        (x.data, w.data, extra),
        flops=2 * rows * 3 * model.width**2,
        args=(x, w, args),
    )


def linear_residual_norm_case(rows, device):
    """Where the op does not take it, a product and a norm, as in a training pass."""
    width = sizes(device).width
    scaling = partial(Scaling.from_bound, dtype=E4M3, device=device)
    bound = 6 / width**0.5
    a = quantize(randn(device, rows, width), scaling(6.0))
    w = quantize(randn(device, width, width) * (bound / 6), scaling(bound))
    x, norm = randn(device, rows, width), scaling(width**0.5)

    def run():
        if takes_norm(a, w, x):
            return linear_residual_norm_fwd(a, w, x, norm)
        branch = (a.dequantize() @ w.dequantize().t()).to(torch.bfloat16)
        return residual_mix_fwd(x, branch, scaling=norm)

    return Case(
        run, (rows, width, width), (a.data, w.data, x), flops=2 * rows * width**2,
        args=(a, w, x, norm),
    )  # fmt: skip


def rotary_qk_norm_bwd_case(rows, device, value=True, bound=10.0, summed=False):
    """`bound`: of the gradients, for their FP8 scale; `summed`: that of q is AttentionSums, which
    want a wider head than a tiny model's."""
    model, length = sizes(device), rows_of_tokens(rows)[1]
    if summed and model.head_dim != TILE_COLS:
        model, rows, length = replace(model, heads=1, head_dim=TILE_COLS), TILE_ROWS, TILE_ROWS
    qkv, args, extra = rotary_inputs(rows, device, value, model, length)
    rstd = rotary_qk_norm_fwd(qkv, *args, model.heads)
    grads = [randn(device, rows, model.width) for _ in range(3)]
    if summed:
        grads[0] = AttentionSums.of(grads[0].view(-1, length, model.heads, TILE_COLS))
    scaling = Scaling.from_bound(bound, E5M2, device)

    def run():
        return rotary_qk_norm_bwd(*grads, qkv, rstd, *args, scaling=scaling)

    shape = rows, model.heads, model.head_dim
    of_q = grads[0].sums if summed else grads[0]
    read = of_q, grads[1:], nbytes(qkv) // 3 * 2, rstd, extra  # of q, k and v only q and k
    return Case(run, shape, read, args=(grads, qkv, rstd, *args, scaling))


def rotary_qk_norm_bwd_sums_case(rows, device, value=True, bound=10.0):
    return rotary_qk_norm_bwd_case(rows, device, value, bound, summed=True)


def gate_inputs(rows, device):
    """y (N, C), rstd (N,), weight (H, 12)."""
    model = sizes(device)
    weight = torch.randn(model.heads, GATE_CHANNELS, device=device)
    return randn(device, rows, model.width), torch.rand(rows, device=device), weight


def gate_logits_case(rows, device):
    args = gate_inputs(rows, device)
    shape = rows, *args[2].shape
    return Case(lambda: gate_logits_fwd(*args), shape, (SECTOR * rows, args[1]), args=args)


def gate_logits_bwd_case(rows, device):
    """Adds to a sector of each row of grad_normed, and to grad_weight."""
    y, rstd, weight = gate_inputs(rows, device)
    grad, grad_normed = torch.randn(rows, weight.size(0), device=device), torch.zeros_like(y)
    args = grad, y, rstd, weight, grad_normed, torch.zeros_like(weight)
    return Case(
        lambda: gate_logits_bwd(*args),
        (rows, *weight.shape),
        (2 * SECTOR * rows, rstd, grad),
        SECTOR * rows,
        returns_new=False,
        args=args,
    )


def resid_lambda_grad_case(rows, device, value=0.0):
    """An ordinary lambda only returns; `value` 0.0 is a small one."""
    width = sizes(device).width
    g, x = randn(device, 2, rows, width)
    a = quantize(randn(device, rows, 4 * width), Scaling.from_bound(6.0, E4M3, device))
    w = torch.rand(width, 4 * width, device=device).bfloat16()
    w = quantize(w, Scaling.from_bound(1.0, E4M3, device))
    resid = torch.tensor([value], device=device)
    args = g, x, a, w, resid, torch.zeros(sm_count(g.device), device=device)
    return Case(
        lambda: resid_lambda_grad(*args),
        (rows, width, 4 * width),
        resid if value else (g, x, a.data, w.data),
        flops=0 if value else 8 * rows * width**2,
        returns_new=not value,
        args=args,
    )
