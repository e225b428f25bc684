"""One timed case per op: its call on inputs of depth 16, and the bytes it must move or its FLOPs.

A case is built for a number of rows (positions, or rows of all matrices together), so that the
tuner can compile candidates on a few, and for a device: on a CPU, for Triton's interpreter, its
other sizes are tiny.
"""

from dataclasses import dataclass

import torch

from nanofuse.bench.bench_muon_update import NUMBERS, fp8_copies, squares_of, state
from nanofuse.bench.bench_residual_mix import Inputs
from nanofuse.bench.harness import copy_ceiling, matmul_ceiling, zipf_tokens
from nanofuse.kernels.adamw import AdamWHyper, AdamWTensors, adamw, adamw_schedule
from nanofuse.kernels.common.fp8 import E4M3, E5M2, Scaling
from nanofuse.kernels.embed_smear import embed_smear_bwd, embed_smear_fwd
from nanofuse.kernels.embedding_grad import embedding_grad, sort_rows
from nanofuse.kernels.gradient_squares import GradientSquares
from nanofuse.kernels.linear_relu_squared import linear_relu_squared_bwd, linear_relu_squared_fwd
from nanofuse.kernels.muon_momentum import muon_momentum
from nanofuse.kernels.muon_update import muon_apply, muon_factors, muon_hyper
from nanofuse.kernels.quantize import quantize
from nanofuse.kernels.relu_squared import relu_squared_bwd, relu_squared_fwd
from nanofuse.kernels.residual_gradients import residual_gradients
from nanofuse.kernels.residual_mix import residual_mix_bwd, residual_mix_fwd
from nanofuse.kernels.rotary_qk_norm import rotary_qk_norm_bwd, rotary_qk_norm_fwd, rotary_table
from nanofuse.kernels.softcap_cross_entropy import (
    softcap_cross_entropy_bwd,
    softcap_cross_entropy_fwd,
)
from nanofuse.kernels.symmetric_matmul import batched_matmul, symmetric_matmul

SEQUENCE = 2048  # tokens of a sequence, at most


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model; its width is heads * head_dim."""

    layers: int
    heads: int
    head_dim: int
    vocab: int

    @property
    def width(self):
        return self.heads * self.head_dim


D16 = Sizes(layers=16, heads=8, head_dim=128, vocab=32768)
TINY = Sizes(layers=2, heads=2, head_dim=32, vocab=64)


@dataclass(frozen=True)
class Case:
    """A call to time, and the bytes that it must move, or its FLOPs if it is compute-bound."""

    run: object
    bytes_moved: float = 0.0
    flops: float = 0.0

    def share(self, seconds):
        """Achieved share of the measured copy bandwidth, or of cuBLAS's FLOP/s if compute-bound."""
        if self.flops:
            return self.flops / seconds / matmul_ceiling()
        return self.bytes_moved / seconds / copy_ceiling()


def sizes(device):
    return D16 if device.type == "cuda" else TINY


def randn(device, *shape):
    return torch.randn(*shape, device=device).bfloat16()


def rows_of_tokens(rows):
    """Shape (B, T) of a batch of `rows` positions."""
    return max(rows // SEQUENCE, 1), min(rows, SEQUENCE)


def quantize_case(rows, device):
    x, scaling = randn(device, rows, sizes(device).width), Scaling.from_bound(6.0, E4M3, device)
    return Case(lambda: quantize(x, scaling), 4 * x.numel())


def residual_mix_fwd_case(rows, device):
    inputs = Inputs(device, *rows_of_tokens(rows))
    return Case(inputs.opening, 10 * inputs.x.numel() + inputs.row_bytes)


def residual_norm_fwd_case(rows, device):
    x, branch = (randn(device, rows, sizes(device).width) for _ in range(2))
    scaling = Scaling.from_bound(32.0, E4M3, device)

    def run():
        return residual_mix_fwd(x, branch, scaling=scaling, want_normed=False)

    return Case(run, 8 * x.numel())


def norm_backward_case(rows, device, opening):
    h, y, stream = (randn(device, rows, sizes(device).width) for _ in range(3))
    rstd, one = torch.ones(rows, device=device), torch.ones(1, device=device)
    scaling = Scaling.from_bound(40.0, E5M2, device)
    options = {"x": y, "resid_lambda": one} if opening else {}

    def run():
        return residual_mix_bwd(h, y, rstd, stream, one, scaling=scaling, **options)

    return Case(run, 10 * y.numel())


def residual_gradients_case(rows, device):
    inputs, layers = Inputs(device, *rows_of_tokens(rows)), sizes(device).layers
    grads = randn(device, layers, *inputs.x0.shape)
    lambdas = torch.rand(layers, device=device)

    def run():
        lookups = ((inputs.rows, inputs.table, lambdas),)
        return residual_gradients(grads, inputs.x0, lambdas, lookups)

    return Case(run, (layers + 3) * 2 * inputs.x0.numel() + inputs.row_bytes)


def embed_smear_case(rows, device):
    vocab, width = sizes(device).vocab, sizes(device).width
    tokens = zipf_tokens(rows_of_tokens(rows), vocab, device)
    table, gate = randn(device, vocab, width), torch.rand(1, 24, device=device)
    grad, sigmoid = randn(device, rows, width), torch.rand(rows, device=device)
    args = tokens, table, gate, torch.ones(1, device=device)

    def run():
        embed_smear_fwd(*args)
        return embed_smear_bwd(grad, *args, sigmoid)

    return Case(run, 6 * grad.numel() + 4 * tokens.unique().numel() * width)


def relu_squared_case(rows, device):
    x = randn(device, rows, 4 * sizes(device).width)
    scaling = Scaling.from_bound(30.0, E4M3, device)
    return Case(lambda: relu_squared_fwd(x, scaling, want_plain=False), 4 * x.numel())


def relu_squared_bwd_case(rows, device):
    x, dy = (randn(device, rows, 4 * sizes(device).width) for _ in range(2))
    scaling = Scaling.from_bound(30.0, E5M2, device)
    return Case(lambda: relu_squared_bwd(dy, x, scaling, want_plain=False), 6 * x.numel())


def linear_relu_squared_case(rows, device):
    width = sizes(device).width
    x = quantize(randn(device, rows, width), Scaling.from_bound(6.0, E4M3, device))
    w = randn(device, 4 * width, width) / width**0.5
    w = quantize(w, Scaling.from_bound(0.2, E4M3, device))
    scaling = Scaling.from_bound(30.0, E4M3, device)
    return Case(lambda: linear_relu_squared_fwd(x, w, scaling), flops=8 * rows * width**2)


def linear_relu_squared_bwd_case(rows, device):
    width = sizes(device).width
    dz = quantize(randn(device, rows, width), Scaling.from_bound(6.0, E5M2, device))
    v, y = randn(device, width, 4 * width) / width**0.5, randn(device, rows, 4 * width).abs()
    v = quantize(v, Scaling.from_bound(0.2, E4M3, device))
    y = quantize(y, Scaling.from_bound(6.0, E4M3, device))
    scaling = Scaling.from_bound(30.0, E5M2, device)
    return Case(lambda: linear_relu_squared_bwd(dz, v, y, scaling), flops=8 * rows * width**2)


def linear_relu_squared_bf16_case(rows, device):
    width = sizes(device).width
    x, w = randn(device, rows, width), randn(device, 4 * width, width) / width**0.5
    return Case(lambda: linear_relu_squared_fwd(x, w), flops=8 * rows * width**2)


def linear_relu_squared_bwd_bf16_case(rows, device):
    width = sizes(device).width
    dz, v = randn(device, rows, width), randn(device, width, 4 * width) / width**0.5
    y = randn(device, rows, 4 * width).abs()
    return Case(lambda: linear_relu_squared_bwd(dz, v, y), flops=8 * rows * width**2)


def rotary_inputs(rows, device):
    """Of rotary_qk_norm_fwd: qkv (N, 3*H*D), the arguments from tokens to seq_len, and the bytes of
    the distinct table rows that are looked up."""
    model, length = sizes(device), min(rows, SEQUENCE)
    tokens = zipf_tokens((rows,), model.vocab, device)
    angles = rotary_table(length, model.head_dim, 1e5, device)
    gate = randn(device, rows, model.heads)
    args = tokens, randn(device, model.vocab, model.width), gate, *angles, length
    return randn(device, rows, 3 * model.width), args, 2 * tokens.unique().numel() * model.width


def rotary_qk_norm_case(rows, device):
    qkv, args, table_bytes = rotary_inputs(rows, device)
    heads = sizes(device).heads
    return Case(lambda: rotary_qk_norm_fwd(qkv, *args, heads), 4 * qkv.numel() + table_bytes)


def rotary_qk_norm_bwd_case(rows, device):
    qkv, args, table_bytes = rotary_inputs(rows, device)
    rstd = rotary_qk_norm_fwd(qkv, *args, sizes(device).heads)
    grads = [randn(device, rows, sizes(device).width) for _ in range(3)]
    scaling = Scaling.from_bound(10.0, E5M2, device)

    def run():
        return rotary_qk_norm_bwd(*grads, qkv, rstd, *args, scaling=scaling, want_plain=False)

    # in: three gradients, q, k; out: FP8 in two layouts of three, value gradients: nine bf16 units
    return Case(run, 9 * 2 * grads[0].numel() + table_bytes)


def logits_inputs(rows, device):
    """Logits (N, V), targets (N,) and V."""
    vocab = sizes(device).vocab
    return randn(device, rows, vocab), zipf_tokens((rows,), vocab, device), vocab


def softcap_cross_entropy_fwd_case(rows, device):
    logits, targets, vocab = logits_inputs(rows, device)
    return Case(lambda: softcap_cross_entropy_fwd(logits, targets, vocab), 2 * logits.numel())


def softcap_cross_entropy_bwd_case(rows, device):
    logits, targets, vocab = logits_inputs(rows, device)
    _, lse = softcap_cross_entropy_fwd(logits, targets, vocab)
    scale, scaling = torch.ones(1, device=device), Scaling.from_bound(2.0, E5M2, device)

    def run():
        return softcap_cross_entropy_bwd(logits, targets, lse, scale, vocab, scaling, False)

    return Case(run, 4 * logits.numel())


def embedding_grad_case(rows, device):
    vocab, width = sizes(device).vocab, sizes(device).width
    tokens = zipf_tokens((rows,), vocab, device)
    grad, table_grad = randn(device, rows, width), randn(device, vocab, width)
    order, rows_moved = sort_rows(tokens, vocab), rows + 2 * tokens.unique().numel()
    return Case(lambda: embedding_grad(grad, order, table_grad), 2 * width * rows_moved)


def adamw_case(rows, device):
    width = sizes(device).width
    lists = [[randn(device, rows, width) for _ in range(8)] for _ in range(4)]
    lists[3] = [x.abs() for x in lists[3]]  # second moments
    tensors = AdamWTensors(*lists, [AdamWHyper(0.1, 0.8, 0.99, 1e-10, 0.0)] * 8)
    schedule = adamw_schedule(1.0, 1, device)
    return Case(lambda: adamw(tensors, schedule, clear_grad=True), 16 * 8 * rows * width)


def gradient_squares_case(rows, device):
    width = sizes(device).width
    op = GradientSquares([randn(device, rows, width) for _ in range(8)])
    return Case(op, 2 * 8 * rows * width)


def muon_inputs(rows, device):
    """Shape of a stack of matrices; its parameter, gradient and moments; muon_hyper's tensor."""
    width = sizes(device).width
    shape = (max(rows // (4 * width), 1), 4 * width, width)
    return shape, state(shape, device), muon_hyper(*NUMBERS, device)


def muon_momentum_case(rows, device):
    _, (_, grad, momentum, _), hyper = muon_inputs(rows, device)

    def run():
        return muon_momentum(grad, momentum, hyper, torch.float16, clear_grad=True)

    return Case(run, (4 + 8 + 2 + 4) * grad.numel())


def muon_apply_case(rows, device):
    shape, (param, grad, momentum, second), hyper = muon_inputs(rows, device)
    factors = muon_factors(squares_of(grad, momentum, hyper), second, shape, 0.9, True)
    weights, x = fp8_copies(shape, device), grad.bfloat16()
    return Case(lambda: muon_apply(param, x, factors, hyper, weights), (2 + 8 + 2) * grad.numel())


def matrices(rows, device, aspect=1):
    """Random matrices (N, aspect*C, C) fp16, square or tall."""
    width = sizes(device).width
    count = max(rows // (aspect * width), 1)
    return (torch.randn(count, aspect * width, width, device=device) / width**0.5).half()


def symmetric_matmul_case(rows, device):
    gram = symmetric_matmul(matrices(rows, device))

    def run():
        return symmetric_matmul(gram, factor=2.0, addend=gram, beta=-2.0, diagonal=4.0)

    return Case(run, flops=gram.numel() * gram.size(2))


def symmetric_matmul_transposed_case(rows, device):
    x = matrices(rows, device, aspect=4)
    scale = torch.ones(x.size(0), device=device)
    flops = x.numel() * x.size(2)
    return Case(lambda: symmetric_matmul(x, transpose=True, scale=scale), flops=flops)


def batched_matmul_case(rows, device):
    x = matrices(rows, device)
    scale = torch.ones(x.size(0), device=device)

    def run():  # the last GEMM of the Newton-Schulz iteration
        return batched_matmul(x, x, scale=scale, sums="row", out_dtype=torch.bfloat16)

    return Case(run, flops=2 * x.numel() * x.size(2))
