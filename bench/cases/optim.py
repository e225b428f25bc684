"""Cases of the optimiser's ops."""

import torch

from nanofuse.bench.cases.case import D16, Case, sizes
from nanofuse.bench.harness import ON_GPU
from nanofuse.kernels.adamw import AdamWHyper, AdamWTensors, adamw, adamw_schedule
from nanofuse.kernels.common.fp8 import E4M3, Scaling
from nanofuse.kernels.gradient_squares import GradientSquares
from nanofuse.kernels.muon_momentum import muon_momentum
from nanofuse.kernels.muon_update import (
    WeightCopies,
    muon_apply,
    muon_factors,
    muon_hyper,
    second_moment_shape,
)
from nanofuse.kernels.newton_schulz import (
    GRAM_ASPECT,
    POLAR_EXPRESS,
    compute_dtype,
    newton_schulz,
    rescale,
    unit_rows,
)
from nanofuse.kernels.symmetric_matmul import batched_matmul, symmetric_matmul
from nanofuse.model.config import GPTConfig

NUMBERS = 0.02, 0.95, 0.1  # learning rate, momentum, weight decay
BETA2 = 0.9
# Per parameter, for fp32 gradients, which are cleared, and a 16-bit compute dtype:
MOMENTUM_BYTES = 4 + 8 + 2 + 4  # gradient in, momentum in and out, z out, zero out
APPLY_BYTES = 2 + 8 + 1 + 1  # x in, parameter in and out, two FP8 copies out
FP32_ROLES = ("matrices", "lm_head")  # the tables' gradients are bf16


def adamw_case(rows, device, tensors=None):
    """`tensors`: (rows, dtype, AdamWHyper) of each; eight bf16 ones without."""
    width = sizes(device).width
    tensors = tensors or [(rows, torch.bfloat16, AdamWHyper(0.1, 0.8, 0.99, 1e-10, 0.0))] * 8
    generator = torch.Generator(device).manual_seed(0)
    params, grads = (
        [
            torch.randn(n, width, device=device, generator=generator).to(dtype)
            for n, dtype, _ in tensors
        ]
        for _ in range(2)
    )
    lists = params, grads, *([torch.zeros_like(p) for p in params] for _ in range(2))
    state = AdamWTensors(*lists, [hyper for *_, hyper in tensors])
    schedule = adamw_schedule(1.0, 1, device)
    return Case(
        lambda: adamw(state, schedule, clear_grad=True),
        f"{sum(p.numel() for p in params):,} parameters",
        lists,
        lists,
        returns_new=False,
        args=lists,
    )


def gradients(rows):
    """Config of the model whose gradients are watched: the timed one's on a GPU, unless rows are
    few."""
    if ON_GPU and rows > D16.width:
        return GPTConfig.from_depth(sizes(torch.device("cuda")).layers)
    return GPTConfig.from_depth(2, 32, 32, vocab_size=64)


def gradient_squares_case(rows, device):
    """A gradient per role of the recipe's model."""
    grads = [
        torch.randn(n, device=device).to(torch.float32 if role in FP32_ROLES else torch.bfloat16)
        for role, n in gradients(rows).param_counts().items()
    ]
    return Case(GradientSquares(grads), f"{len(grads)} tensors", grads, args=(grads,))


def state(shape, device, seed=0):
    """Parameter, gradient, momentum and second moment of a stack."""
    generator = torch.Generator(device).manual_seed(seed)
    param, grad = (torch.randn(shape, device=device, generator=generator) for _ in range(2))
    second = torch.zeros(second_moment_shape(shape), device=device)
    return param.mul_(0.02), grad, torch.zeros_like(param), second


def fp8_copies(shape, device):
    n = shape[0]
    scaling = Scaling(E4M3, *(torch.full((n,), x, device=device) for x in (448.0, 1 / 448.0, 0.0)))
    return WeightCopies.empty(shape, device, scaling=scaling)


def squares_of(grad, momentum, hyper):
    """The sums of squares that muon_factors takes, of z in place of the iteration's result; grad
    and momentum are not changed."""
    z = muon_momentum(grad, momentum.clone(), hyper, torch.float32)[0]
    return z.square().sum(-1 if z.size(1) >= z.size(2) else -2)


def stack_shape(rows, device, aspect=4):
    """Of a stack of matrices with `rows` rows together."""
    width = sizes(device).width
    return max(rows // (aspect * width), 1), aspect * width, width


def muon_momentum_case(rows, device):
    shape = stack_shape(rows, device)
    _, grad, momentum, _ = state(shape, device)
    hyper = muon_hyper(*NUMBERS, device)

    def run():
        return muon_momentum(grad, momentum, hyper, torch.float16, clear_grad=True)

    return Case(run, shape, MOMENTUM_BYTES * grad.numel(), returns_new=False)


def muon_apply_case(rows, device):
    shape, hyper = stack_shape(rows, device), muon_hyper(*NUMBERS, device)
    param, grad, momentum, second = state(shape, device)
    factors = muon_factors(squares_of(grad, momentum, hyper), second, shape, BETA2, True)
    weights, x = fp8_copies(shape, device), grad.bfloat16()

    def run():
        return muon_apply(param, x, factors, hyper, weights)

    return Case(run, shape, APPLY_BYTES * grad.numel(), returns_new=False)


def matrices(rows, device, aspect=1):
    """Random matrices (N, aspect*C, C) fp16, square or tall."""
    shape = stack_shape(rows, device, aspect)
    return (torch.randn(shape, device=device) / shape[2] ** 0.5).half()


def unit_rows_case(rows, device):
    x = torch.randn(stack_shape(rows, device), device=device)
    return Case(lambda: unit_rows(x), tuple(x.shape), x)


def rescale_case(rows, device):
    x = torch.randn(stack_shape(rows, device), device=device).to(compute_dtype(device))
    sums = x.float().square().sum(-1)
    return Case(lambda: rescale(x, sums), tuple(x.shape), (x, sums))


def iteration_flops(shape):
    """FLOPs of the iteration's GEMMs, plain or Gram, with symmetric results at half cost."""
    n, *sides = shape
    small, large = sorted(sides)
    if large >= GRAM_ASPECT * small:
        return n * (6 * small**2 * large + 14 * small**3)
    return n * len(POLAR_EXPRESS) * (3 * small**2 * large + small**3)


def newton_schulz_case(device, shapes):
    """The whole iteration on stacks of these shapes."""
    stacks = [torch.randn(shape, device=device).bfloat16() for shape in shapes]

    def run():
        return [newton_schulz(x) for x in stacks]

    return Case(run, shapes, stacks, flops=sum(map(iteration_flops, shapes)), args=(stacks,))


def symmetric_matmul_case(rows, device):
    gram = symmetric_matmul(matrices(rows, device))
    options = {"factor": 2.0, "addend": gram, "beta": -2.0, "diagonal": 4.0}
    return Case(
        lambda: symmetric_matmul(gram, **options),
        tuple(gram.shape),
        gram,
        flops=gram.numel() * gram.size(2),
        args=(gram, options),
    )


def symmetric_matmul_transposed_case(rows, device):
    x = matrices(rows, device, aspect=4)
    options = {"transpose": True, "scale": torch.ones(x.size(0), device=device)}
    return Case(
        lambda: symmetric_matmul(x, **options),
        tuple(x.shape),
        x,
        flops=x.numel() * x.size(2),
        args=(x, options),
    )


def batched_matmul_case(rows, device):
    x = matrices(rows, device)
    scale = torch.ones(x.size(0), device=device)

    def run():  # the last GEMM of the Newton-Schulz iteration
        return batched_matmul(x, x, scale=scale, sums="row", out_dtype=torch.bfloat16)

    flops = 2 * x.numel() * x.size(2)
    return Case(run, tuple(x.shape), (x, x), flops=flops, args=(x, scale))
