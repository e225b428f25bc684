"""What bench.tune times for each op: inputs at d16, and the bytes or FLOPs that the op must do.

A case is made for a number of rows (positions, or rows of all matrices), so that the tuner can
compile candidates on few.
"""

from dataclasses import dataclass

import torch

from bench.bench_bigram_residual import WIDTH, Inputs
from bench.bench_muon_update import NUMBERS, fp8_copies, squares_of, state
from bench.harness import copy_ceiling, matmul_ceiling, zipf_tokens
from kernels.adamw import AdamWHyper, AdamWTensors, adamw, adamw_schedule
from kernels.bigram_residual import bigram_residual_bwd, bigram_residual_fwd
from kernels.embedding_grad import embedding_grad, sort_rows
from kernels.fp8 import E5M2, Scaling
from kernels.linear_relu_squared import linear_relu_squared_bwd, linear_relu_squared_fwd
from kernels.muon_momentum import muon_momentum
from kernels.muon_update import muon_apply, muon_factors, muon_hyper
from kernels.quantize import quantize
from kernels.relu_squared import relu_squared_bwd, relu_squared_fwd
from kernels.residual_gradients import residual_gradients
from kernels.rotary_qk_norm import rotary_qk_norm_bwd, rotary_qk_norm_fwd, rotary_table
from kernels.smear import embed_smear_bwd, embed_smear_fwd
from kernels.softcap_cross_entropy import softcap_cross_entropy_bwd, softcap_cross_entropy_fwd
from kernels.symmetric_matmul import batched_matmul, symmetric_matmul

LAYERS, HEADS, HEAD_DIM, VOCAB = 16, 8, 128, 32768


@dataclass(frozen=True)
class Case:
    """What is timed, and the bytes that it must move or the FLOPs that it must do."""

    run: object
    bytes_moved: float = 0.0
    flops: float = 0.0

    def share(self, seconds):
        """Share of the measured copy bandwidth, or of cuBLAS's rate."""
        if self.flops:
            return self.flops / seconds / matmul_ceiling()
        return self.bytes_moved / seconds / copy_ceiling()


def randn(*shape):
    return torch.randn(*shape, device="cuda").bfloat16()


def quantize_case(rows):
    x, scaling = randn(rows, WIDTH), Scaling.from_bound(6.0)
    return Case(lambda: quantize(x, scaling), 4 * x.numel())


def bigram_residual_fwd_case(rows):
    inputs = Inputs(torch.device("cuda"), max(rows // 2048, 1), min(rows, 2048))
    return Case(inputs.opening, 10 * inputs.x.numel() + inputs.row_bytes)


def residual_norm_fwd_case(rows):
    x, branch, scaling = randn(rows, WIDTH), randn(rows, WIDTH), Scaling.from_bound(32.0)

    def run():
        return bigram_residual_fwd(x, branch, scaling=scaling, want_normed=False)

    return Case(run, 8 * x.numel())


def norm_backward_case(rows, opening):
    h, y, stream = (randn(rows, WIDTH) for _ in range(3))
    rstd, one = torch.ones(rows, device="cuda"), torch.ones(1, device="cuda")
    scaling = Scaling.from_bound(40.0, E5M2)
    options = {"x": y, "resid_lambda": one} if opening else {}

    def run():
        return bigram_residual_bwd(h, y, rstd, stream, one, scaling=scaling, **options)

    return Case(run, 10 * y.numel())


def residual_gradients_case(rows):
    inputs = Inputs(torch.device("cuda"), max(rows // 2048, 1), min(rows, 2048))
    grads, lambdas = randn(LAYERS, rows, WIDTH), torch.rand(LAYERS, device="cuda")

    def run():
        return residual_gradients(grads, inputs.x0, lambdas, inputs.tokens, inputs.table, lambdas)

    return Case(run, (LAYERS + 3) * 2 * rows * WIDTH + inputs.row_bytes)


def embed_smear_case(rows):
    tokens = zipf_tokens((max(rows // 2048, 1), min(rows, 2048)), VOCAB, "cuda")
    table, gate = randn(VOCAB, WIDTH), torch.rand(1, 24, device="cuda")
    grad, sigmoid = randn(rows, WIDTH), torch.rand(rows, device="cuda")
    args = tokens, table, gate, torch.ones(1, device="cuda")

    def run():
        embed_smear_fwd(*args)
        return embed_smear_bwd(grad, *args, sigmoid)

    return Case(run, 6 * grad.numel() + 4 * tokens.unique().numel() * WIDTH)


def relu_squared_case(rows):
    x, scaling = randn(rows, 4 * WIDTH), Scaling.from_bound(30.0)
    return Case(lambda: relu_squared_fwd(x, scaling, want_plain=False), 4 * x.numel())


def relu_squared_bwd_case(rows):
    x, dy, scaling = randn(rows, 4 * WIDTH), randn(rows, 4 * WIDTH), Scaling.from_bound(30.0, E5M2)
    return Case(lambda: relu_squared_bwd(dy, x, scaling, want_plain=False), 6 * x.numel())


def linear_relu_squared_case(rows):
    x, w = quantize(randn(rows, WIDTH), Scaling.from_bound(6.0)), randn(4 * WIDTH, WIDTH)
    w, scaling = quantize(w / WIDTH**0.5, Scaling.from_bound(0.2)), Scaling.from_bound(30.0)
    return Case(lambda: linear_relu_squared_fwd(x, w, scaling), flops=8 * rows * WIDTH**2)


def linear_relu_squared_bwd_case(rows):
    dz, v = quantize(randn(rows, WIDTH), Scaling.from_bound(6.0, E5M2)), randn(WIDTH, 4 * WIDTH)
    v, y = quantize(v / WIDTH**0.5, Scaling.from_bound(0.2)), randn(rows, 4 * WIDTH).abs()
    y, scaling = quantize(y, Scaling.from_bound(6.0)), Scaling.from_bound(30.0, E5M2)
    return Case(lambda: linear_relu_squared_bwd(dz, v, y, scaling), flops=8 * rows * WIDTH**2)


def linear_relu_squared_bf16_case(rows):
    x, w = randn(rows, WIDTH), randn(4 * WIDTH, WIDTH) / WIDTH**0.5
    return Case(lambda: linear_relu_squared_fwd(x, w), flops=8 * rows * WIDTH**2)


def linear_relu_squared_bwd_bf16_case(rows):
    dz, v, y = randn(rows, WIDTH), randn(WIDTH, 4 * WIDTH) / WIDTH**0.5, randn(rows, 4 * WIDTH)
    y = y.abs()
    return Case(lambda: linear_relu_squared_bwd(dz, v, y), flops=8 * rows * WIDTH**2)


def rotary_inputs(rows):
    width, t = HEADS * HEAD_DIM, min(rows, 2048)
    tokens = zipf_tokens((rows,), VOCAB, "cuda")
    angles = rotary_table(t, HEAD_DIM, 1e5, "cuda")
    gate = torch.randn(rows, HEADS, device="cuda").bfloat16()
    args = tokens, randn(VOCAB, width), gate, *angles, t
    return randn(rows, 3 * width), args, 2 * tokens.unique().numel() * width


def rotary_qk_norm_case(rows):
    qkv, args, table_bytes = rotary_inputs(rows)
    return Case(lambda: rotary_qk_norm_fwd(qkv, *args, HEADS), 4 * qkv.numel() + table_bytes)


def rotary_qk_norm_bwd_case(rows):
    qkv, args, table_bytes = rotary_inputs(rows)
    rstd = rotary_qk_norm_fwd(qkv, *args, HEADS)
    grads = [randn(rows, HEADS * HEAD_DIM) for _ in range(3)]
    scaling = Scaling.from_bound(10.0, E5M2)

    def run():
        return rotary_qk_norm_bwd(*grads, qkv, rstd, *args, scaling=scaling, want_plain=False)

    # three gradients, q and k in; FP8 twice and the value gradients out: nine units of 2 bytes
    return Case(run, 9 * 2 * rows * HEADS * HEAD_DIM + table_bytes)


def logits_inputs(rows):
    return randn(rows, VOCAB), zipf_tokens((rows,), VOCAB, "cuda")


def softcap_cross_entropy_fwd_case(rows):
    logits, targets = logits_inputs(rows)
    return Case(lambda: softcap_cross_entropy_fwd(logits, targets, VOCAB), 2 * logits.numel())


def softcap_cross_entropy_bwd_case(rows):
    logits, targets = logits_inputs(rows)
    _, lse = softcap_cross_entropy_fwd(logits, targets, VOCAB)
    scale, scaling = torch.ones(1, device="cuda"), Scaling.from_bound(2.0, E5M2)

    def run():
        return softcap_cross_entropy_bwd(logits, targets, lse, scale, VOCAB, scaling, False)

    return Case(run, 4 * logits.numel())


def embedding_grad_case(rows):
    tokens = zipf_tokens((rows,), VOCAB, "cuda")
    grad, table_grad, order = randn(rows, WIDTH), randn(VOCAB, WIDTH), sort_rows(tokens, VOCAB)
    rows_moved = rows + 2 * tokens.unique().numel()
    return Case(lambda: embedding_grad(grad, order, table_grad), 2 * WIDTH * rows_moved)


def adamw_case(rows):
    lists = [[randn(rows, WIDTH) for _ in range(8)] for _ in range(4)]
    tensors = AdamWTensors(*lists, [AdamWHyper(0.1, 0.8, 0.99, 1e-10, 0.0)] * 8)
    schedule = adamw_schedule(1.0, 1, "cuda")
    return Case(lambda: adamw(tensors, schedule, clear_grad=True), 16 * 8 * rows * WIDTH)


def muon_case(rows):
    shape = (max(rows // 4096, 1), 4096, 1024)
    hyper = muon_hyper(*NUMBERS, "cuda")
    return shape, state(shape, "cuda"), hyper, shape[0] * shape[1] * shape[2]


def muon_momentum_case(rows):
    _, (_, grad, momentum, _), hyper, numel = muon_case(rows)

    def run():
        return muon_momentum(grad, momentum, hyper, torch.float16, clear_grad=True)

    return Case(run, (4 + 8 + 2 + 4) * numel)


def muon_apply_case(rows):
    shape, (param, grad, momentum, second), hyper, numel = muon_case(rows)
    factors = muon_factors(squares_of(grad, momentum, hyper), second, shape, 0.9, True)
    weights, x = fp8_copies(shape, "cuda"), grad.bfloat16()
    return Case(lambda: muon_apply(param, x, factors, hyper, weights), (2 + 8 + 2) * numel)


def matrices(rows, *shape):
    count = max(rows // 1024, 1)
    return (torch.randn(count, *shape, device="cuda") / 32).half(), count


def symmetric_matmul_case(rows):
    x, count = matrices(rows, 1024, 1024)
    gram = symmetric_matmul(x)

    def run():
        return symmetric_matmul(gram, factor=2.0, addend=gram, beta=-2.0, diagonal=4.0)

    return Case(run, flops=count * 1024**3)


def symmetric_matmul_transposed_case(rows):
    x, count = matrices(rows // 4, 4096, 1024)
    scale = torch.ones(count, device="cuda")
    return Case(lambda: symmetric_matmul(x, transpose=True, scale=scale), flops=4 * count * 1024**3)


def batched_matmul_case(rows):
    x, count = matrices(rows, 1024, 1024)
    scale = torch.ones(count, device="cuda")

    def run():  # the last product of the iteration
        return batched_matmul(x, x, scale=scale, sums="row", out_dtype=torch.bfloat16)

    return Case(run, flops=2 * count * 1024**3)
