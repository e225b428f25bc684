"""Timing of one op against its alternatives: checked first, then timed L2-cold with CUDA events.

A benchmark builds the op and its alternatives as functions without arguments, asserts that they
agree, and calls `measure`. pytest-benchmark runs the rounds of the op itself; the alternatives get
medians by the same method. Times are intervals between CUDA events, with a cold L2 cache
(train/gpu.py). On a CPU the same benchmarks run on tiny shapes in Triton's interpreter, so that a
call that no longer matches its op's signature fails there too; their times mean nothing, and the
alternatives are only called, not timed.
"""

import functools
import math
import statistics
import time

import pytest
import torch

from nanofuse.kernels.quantize import quantize_ref
from nanofuse.train.gpu import copy_ceiling, gpu_seconds, matmul_ceiling

ZIPF_OFFSET = 2.7  # of the Zipf-Mandelbrot law
MAX_ROUNDS = 10**6
ON_GPU = torch.cuda.is_available()
ROUNDS, WARMUP_ROUNDS, ALTERNATIVE_ROUNDS = (30, 3, 20) if ON_GPU else (2, 0, 1)
# Factor on the error bounds of results in FP8 or bf16: the interpreter truncates where a GPU rounds
# to nearest, and flushes the smallest FP8 numbers to zero.
CAST_ERROR = 1 if ON_GPU else 3


def listed(text):
    """The non-empty parts of a comma-separated option."""
    return [part for part in text.split(",") if part]


class OpClock:
    """A timer for pytest-benchmark whose time advances by the GPU time of each `timed` call."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def timed(self, function):
        """Call `function` and return its seconds."""
        if ON_GPU:
            seconds = gpu_seconds(function)
        else:
            start = time.perf_counter()
            function()
            seconds = time.perf_counter() - start
        self.now += seconds
        return seconds


CLOCK = OpClock()
op_benchmark = pytest.mark.benchmark(timer=CLOCK, disable_gc=True)


@functools.cache
def compiled(function):
    """torch.compile of a reference for fixed shapes; the function itself on a CPU."""
    return torch.compile(function, dynamic=False, fullgraph=True) if ON_GPU else function


def median_seconds(function, rounds=ALTERNATIVE_ROUNDS):
    """Median time of a function after two warm-up calls."""
    for _ in range(2):
        function()
    return statistics.median(CLOCK.timed(function) for _ in range(rounds))


def zipf_tokens(shape, vocab_size, device, seed=0):
    """Random tokens with p(rank) ~ 1 / (rank + 2.7), int64."""
    weights = 1 / (torch.arange(vocab_size, device=device) + ZIPF_OFFSET)
    generator = torch.Generator(device).manual_seed(seed)
    count = math.prod(shape)
    return torch.multinomial(weights, count, replacement=True, generator=generator).view(shape)


def quantize_both_layouts(
    x,  # (M, N)
    dtype,
):
    """Quantise x as the compiled baseline does for its FP8 GEMMs: dynamic scale, cast, transposed
    copy. Returns q (M, N), its transpose (N, M), both FP8, and the inverse scale ()."""
    q, inverse_scale = quantize_ref(x, dtype)
    return q, q.t().contiguous(), inverse_scale


def measure_case(benchmark, case, alternatives=None):
    """As `measure`, of a bench.cases.case.Case that was already checked."""
    work = case.bytes_moved, case.flops
    return measure(benchmark, case.run, *work, alternatives=alternatives, shape=case.shape)


def measure(
    benchmark,
    op,
    bytes_moved,
    flops=0,
    alternatives=None,
    shape=None,
    rounds=ROUNDS,
):
    """Time `op` and its alternatives; returns the extra_info that is reported. Under pytest's
    --benchmark-disable all of them are called once, and there are no times.

    Args:
        benchmark: pytest-benchmark's fixture of a test marked `op_benchmark`.
        op: function without arguments, already checked against its reference.
        bytes_moved: the bytes that the op must at least read and write.
        flops: floating-point operations of its matrix products; 0 for a memory-bound op.
        alternatives: {name: function}, such as "eager", "compile" and a library's name; timed on
            a GPU, called once on a CPU.
        shape: reported with the times.
    """
    benchmark.pedantic(lambda: CLOCK.timed(op), rounds=rounds, warmup_rounds=WARMUP_ROUNDS)
    if benchmark.disabled:
        for function in (alternatives or {}).values():
            function()
        return {"shape": str(shape)}
    seconds = benchmark.stats.stats.median
    info = {
        "shape": str(shape),
        "us": 1e6 * seconds,
        "bytes": bytes_moved,
        "flops": flops,
        "gb_per_s": bytes_moved / seconds / 1e9,
    }
    if ON_GPU:
        info["copy_share"] = bytes_moved / seconds / copy_ceiling()
    if flops:
        info["tflop_per_s"] = flops / seconds / 1e12
        if ON_GPU:
            info["matmul_share"] = flops / seconds / matmul_ceiling()
    for name, function in (alternatives or {}).items():
        if ON_GPU:
            info[f"speedup_{name}"] = median_seconds(function) / seconds
        else:
            function()
    benchmark.extra_info.update(info)
    return info
