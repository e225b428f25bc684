"""Every matrix product of a training pass at --depth, by every provider that loads: FP8 and bf16.

Columns: Transformer Engine, torch, nvmath with cuBLASLt's first choice, and nvmath as tuned: what
`--fp8 nvmath` (`off-nvmath`) takes, measured here and not read from the user's file, with the
library that won. Each cell: microseconds with a cold L2 cache, TFLOP/s, and the share of the rate
of an 8192^3 product of that dtype. Weight gradients are added to fp32. The forward products of fc
and lm_head and mlp_proj's input gradient are in kernels of ours in training
(bench_linear_relu_squared.py, bench_linear_softcap_cross_entropy.py); here they are plain.
"""

import functools
import statistics
from functools import partial

import pytest
import torch

from nanofuse.bench.checks import relative_error
from nanofuse.bench.harness import ALTERNATIVE_ROUNDS, CLOCK, ON_GPU, listed, op_benchmark
from nanofuse.kernels.common.store import Store
from nanofuse.model.config import GPTConfig
from nanofuse.model.fp8.shapes import KINDS, product_shapes
from nanofuse.model.fp8.tuned import random_operands
from nanofuse.model.providers import PRODUCTS
from nanofuse.train.gpu import fp8_matmul_ceiling, matmul_ceiling

WEIGHTS = "qkv", "attn_proj", "fc", "mlp_proj", "lm_head"
CHECKED_ROWS = 64
BOUND = 0.02  # between two libraries: fast accumulation and rounding
TUNED = "nvmath", "off-nvmath"


@functools.cache
def providers(fp8):
    """{column: provider} of the libraries that load, and the reasons of the others."""
    found, reasons = {}, []
    for record in PRODUCTS:
        if ("fp8" in record.dtypes) != fp8:
            continue
        try:
            made = record.build()
        except ValueError as error:
            reasons.append(str(error))
            continue
        name = "torch" if record.name == "off" else record.name.removeprefix("off-")
        if record.name in TUNED:
            found[f"{name}, first choice"] = made
            made = type(made)(Store(None, ""))
        found[f"{name}, tuned" if record.name in TUNED else name] = made
    return found, reasons


def calls(shape, fp8):
    """{column: function} of a Shape's product by every provider, checked against each other."""
    operands, found = random_operands(shape, fp8), {}
    out = torch.zeros(shape.n, shape.k, device="cuda")
    for name, gemm in providers(fp8)[0].items():
        if "tuned" in name:
            gemm.prepare([shape], say=lambda line: None)
        if shape.adds:
            g, x = operands
            found[name] = partial(gemm.weight_grad, g, gemm.keep(x), out)
        else:
            found[name] = partial(getattr(gemm, shape.kind), *operands)
    expected = None
    for name, call in found.items():
        result = call()
        if result is None:
            result = out.clone()
            out.zero_()
        rows = result[-CHECKED_ROWS:].clone()
        expected = rows if expected is None else expected
        assert relative_error(rows, expected) < BOUND, name
    return found


def seconds_in_turns(calls):
    """{name: median seconds with a cold L2 cache} of {name: function}, one call each in turn: a
    GPU at its power limit slows down on the way."""
    times = {name: [] for name in calls}
    for _ in range(ALTERNATIVE_ROUNDS):
        for name, call in calls.items():
            times[name].append(CLOCK.timed(call))
    return {name: statistics.median(taken) for name, taken in times.items()}


def pytest_generate_tests(metafunc):
    if "depth" in metafunc.fixturenames:
        depths = [int(depth) for depth in listed(metafunc.config.getoption("--depth"))] or [16]
        metafunc.parametrize("depth", depths, ids=lambda depth: f"d{depth}")


@op_benchmark
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
def bench_products(benchmark, request, depth, fp8, weight, kind):
    if not ON_GPU:
        pytest.skip("times of CUDA libraries: needs a GPU")
    config = GPTConfig.from_depth(depth)
    positions = request.config.getoption("--device-batch-size") * config.sequence_len
    (shape,) = (
        shape
        for shape in product_shapes(config, positions)
        if (shape.weight, shape.kind) == (weight, kind)
    )
    found, (made, reasons) = calls(shape, fp8), providers(fp8)
    benchmark.pedantic(CLOCK.timed, [next(iter(found.values()))], rounds=2, warmup_rounds=1)
    if benchmark.disabled:
        return
    ceiling = fp8_matmul_ceiling() if fp8 else matmul_ceiling()
    benchmark.extra_info["product"] = {
        "name": f"d{depth} {'FP8' if fp8 else 'bf16'} {weight} {kind}",
        "shape": [shape.positions, shape.n, shape.k],
        "flops": shape.flops,
        "ceiling": ceiling,
        "seconds": seconds_in_turns(found),
        "tuned": next((gemm.chosen(shape) for name, gemm in made.items() if "tuned" in name), ""),
        "left_out": reasons,
    }
    del found
    torch.cuda.empty_cache()
