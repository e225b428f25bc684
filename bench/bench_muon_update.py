"""muon_update and the whole optimiser step at depth 16, with AdamW for lm_head and the tables."""

import math
from functools import partial

import pytest
import torch

from nanofuse.bench.bench_adamw import BIGRAM_ROWS, BOUND, VOCAB
from nanofuse.bench.cases.optim import (
    APPLY_BYTES,
    BETA2,
    MOMENTUM_BYTES,
    NUMBERS,
    fp8_copies,
    iteration_flops,
    squares_of,
    state,
)
from nanofuse.bench.checks import relative_error
from nanofuse.bench.harness import ON_GPU, compiled, measure, op_benchmark, quantize_both_layouts
from nanofuse.kernels.adamw import AdamWTensors, adamw, adamw_schedule
from nanofuse.kernels.common.fp8 import E4M3
from nanofuse.kernels.muon_momentum import muon_momentum
from nanofuse.kernels.muon_update import (
    muon_apply,
    muon_factors,
    muon_hyper,
    muon_update,
    muon_update_ref,
    reduce_variance_ref,
)
from nanofuse.kernels.newton_schulz import (
    compute_dtype,
    equilibrate_ref,
    initial_scale,
    muon_plus_ref,
)
from nanofuse.train.optim.config import OptimConfig
from nanofuse.train.optim.muon_adamw import MuonAdamW
from nanofuse.train.optim.updates import EagerUpdate

LAYERS, WIDTH = (16, 1024) if ON_GPU else (2, 16)
SHAPES = [
    (4 * LAYERS, WIDTH, WIDTH),
    (LAYERS, 4 * WIDTH, WIDTH),
    (LAYERS, WIDTH, 4 * WIDTH),
]
COMPUTE = torch.bfloat16 if ON_GPU else torch.float32  # of the references' products


def pass_bytes(shape):
    """Bytes that muon_momentum and muon_apply move."""
    return math.prod(shape) * (MOMENTUM_BYTES + APPLY_BYTES)


def passes(param, grad, momentum, second, hyper, squares, weights):
    """muon_update without the Newton-Schulz iteration: x = z. The sums of squares of x, which the
    iteration's last GEMM would compute in its epilogue, are passed in as `squares`."""
    z, norms = muon_momentum(grad, momentum, hyper, compute_dtype(grad.device), clear_grad=True)
    initial_scale(z, norms)
    factors = muon_factors(squares, second, param.shape, BETA2, True)
    muon_apply(param, z, factors, hyper, weights)


def passes_ref(param, grad, momentum_buffer, second, lr, momentum, weight_decay):
    """`passes` in plain torch, for torch.compile: all of the step around the iteration."""
    momentum_buffer.lerp_(grad, 1 - momentum)
    nesterov = grad.lerp(momentum_buffer, momentum)
    x = equilibrate_ref(nesterov.to(COMPUTE), "row")
    u = reduce_variance_ref(muon_plus_ref(x), second, BETA2)
    lr = lr * max(1.0, param.size(1) / param.size(2)) ** 0.5
    param.sub_(lr * u + lr * weight_decay * param * ((u * param) >= 0))
    grad.zero_()
    return quantize_both_layouts(param.flatten(0, 1), E4M3)


@op_benchmark
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_muon_passes(benchmark, device, shape):
    tensors, twin = state(shape, device), state(shape, device)
    numbers = [torch.tensor(x) for x in NUMBERS]
    hyper, start = muon_hyper(*NUMBERS, device), tensors[0].clone()
    squares = squares_of(*tensors[1:3], hyper)
    op = partial(passes, *tensors, hyper, squares, fp8_copies(shape, device))
    op()
    passes_ref(*twin, *numbers)
    assert relative_error(tensors[0] - start, twin[0] - start) < 0.02
    measure(
        benchmark,
        op,
        bytes_moved=pass_bytes(shape),
        alternatives={
            "eager": lambda: passes_ref(*twin, *numbers),
            "compile": lambda: compiled(passes_ref)(*twin, *numbers),
        },
        shape=shape,
    )


@op_benchmark
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_muon_update(benchmark, device, shape):
    tensors, twin = state(shape, device), state(shape, device)
    numbers = [torch.tensor(x) for x in NUMBERS]
    options = BETA2, "row", True

    def reference(update):
        update(*twin, *numbers, *options, COMPUTE)

    hyper, start = muon_hyper(*NUMBERS, device), tensors[0].clone()
    muon_update(*tensors, hyper, *options)
    reference(muon_update_ref)
    assert relative_error(tensors[0] - start, twin[0] - start) < 0.05
    weights = fp8_copies(shape, device)
    measure(
        benchmark,
        partial(muon_update, *tensors, hyper, *options, weights, clear_grad=True),
        bytes_moved=pass_bytes(shape),
        flops=iteration_flops(shape),
        alternatives={
            "eager": lambda: reference(muon_update_ref),
            "compile": lambda: reference(compiled(muon_update_ref)),
        },
        shape=shape,
    )


def roles(device):
    """{role: [(name, parameter with a gradient)]} at depth 16, as MuonAdamW takes them."""
    generator = torch.Generator(device).manual_seed(0)

    def parameters(role, count, rows, cols, dtype=torch.float32):
        result = []
        for i in range(count):
            param, grad = (
                torch.randn(rows, cols, device=device, generator=generator).to(dtype)
                for _ in range(2)
            )
            param.mul_(0.02).requires_grad_().grad = grad
            result.append((f"{role}.{rows}x{cols}.{i}", param))
        return result

    table = torch.bfloat16
    return {
        "lm_head": parameters("lm_head", 1, VOCAB, WIDTH),
        "wte": parameters("wte", 1, VOCAB, WIDTH, table),
        "value_embeds": parameters("value_embeds", LAYERS // 2, VOCAB, WIDTH, table),
        "bigram_embed": parameters("bigram_embed", 1, BIGRAM_ROWS, WIDTH, table),
        "matrices": [x for shape in SHAPES for x in parameters("matrices", *shape)],
    }


class KernelStep:
    """MuonAdamW's step by the kernels, on stacked copies of an optimiser's parameters."""

    def __init__(self, optimizer, device):
        self.matrices = []  # (param, grad, momentum, second, WeightCopies)
        for stack in optimizer.stacks:
            stacks = [x.detach() for x in stack.gather()]
            moments = stack.momentum.clone(), stack.second.clone()
            weights = fp8_copies(stacks[0].shape, device)
            self.matrices.append((*stacks, *moments, weights))
        tables = optimizer.tables
        params = [table.param.detach().clone() for table in tables]
        grads = [table.grad.clone() for table in tables]
        moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
        hypers = [table.hyper for table in tables]
        self.adamw = AdamWTensors(params, grads, *moments, hypers)
        self.schedule = adamw_schedule(1.0, 1, device)
        self.hyper = muon_hyper(optimizer.config.matrix_lr, *NUMBERS[1:], device)

    def __call__(self):
        adamw(self.adamw, self.schedule, clear_grad=True)
        for *tensors, weights in self.matrices:
            muon_update(*tensors, self.hyper, BETA2, "row", True, weights, clear_grad=True)


@op_benchmark
def bench_optimizer_step(benchmark, device):
    parameters = roles(device)
    update = partial(EagerUpdate, compile=ON_GPU, newton_schulz_dtype=COMPUTE)
    optimizer = MuonAdamW(parameters, OptimConfig(), WIDTH, update=update)

    def theirs():
        optimizer.step(momentum=NUMBERS[1], weight_decay=NUMBERS[2])

    op = KernelStep(optimizer, device)
    starts = [param.clone() for param, *_ in op.matrices]
    op()
    theirs()
    for stack, (ours, *_), start in zip(optimizer.stacks, op.matrices, starts, strict=True):
        assert relative_error(ours - start, stack.gather()[0] - start) < 0.05
    for table, (ours, *_) in zip(optimizer.tables, op.adamw.tensors, strict=True):
        assert relative_error(ours, table.param) < BOUND
    tables = [p for role in parameters if role != "matrices" for _, p in parameters[role]]
    table_bytes = sum(8 * p.numel() * p.element_size() for p in tables)
    measure(
        benchmark,
        op,
        bytes_moved=table_bytes + sum(pass_bytes(shape) for shape in SHAPES),
        flops=sum(iteration_flops(shape) for shape in SHAPES),
        alternatives={"compile": theirs},
        shape=f"d16, {LAYERS} layers",
    )
