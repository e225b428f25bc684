"""A training step on 1, 2, 4 and 8 GPUs of a machine, with the same global batch.

For every --depth and every number of ranks that the machine has GPUs for (--worlds takes fewer):

1. The schemes take turns, a step each on the same batches, in the other order every second time,
   till every one has --rounds steps, without the first few, for which memory is still found:
   "owned" is the product (train/optim/sharing.py), "nanochat" and "all-reduce" are written for the
   bench (bench/schemes.py) on the same model and kernels. A scheme that memory has no room for
   beside the others is left out, and that is said; --schemes chooses.
2. The library's own reduce-scatter of as many bytes as the gradients have, and all-gather of the
   values', on GPUs that do nothing else.
3. Every GPU trains by itself, all at once, when they are as hot as before: the step that others are
   held against, and how far the GPUs are apart (skew: the slowest in times of the mean).

Before a number counts, losses are compared, and weights of all ranks. Steps begin on all ranks at
once; a step's time is the slowest rank's, medians are reported. On a CPU one and two processes of
Gloo train a tiny model, which times nothing.
"""

import statistics

import pytest
import torch

from nanofuse.bench.harness import CLOCK, ON_GPU, listed
from nanofuse.bench.scaling import (
    WORLDS,
    Crew,
    differences,
    own_seconds,
    scheme_figures,
    step_seconds,
    take_turns,
)
from nanofuse.bench.scaling_worker import Task
from nanofuse.bench.training import STEP_ROWS, Workload, gpu_workload, tiny_workload

CPU_ROUNDS, CPU_WORLDS = 1, (1, 2)
WARMUP_ROUNDS = 8 if ON_GPU else 0  # building a scheme frees what those before it kept for reuse
FIRST_LOSS_TOLERANCE, LOSS_TOLERANCE = 0.02, 0.1  # and of the other first steps'


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    if "world" not in metafunc.fixturenames:
        return
    depths = [int(depth) for depth in listed(option("--depth"))] or [16 if ON_GPU else 1]
    asked = [int(world) for world in listed(option("--worlds"))]
    there = [w for w in WORLDS if w <= torch.cuda.device_count()] if ON_GPU else CPU_WORLDS
    metafunc.parametrize("depth", depths, ids=lambda depth: f"d{depth}")
    metafunc.parametrize("fp8", listed(option("--fp8")), ids=lambda fp8: f"fp8-{fp8}")
    metafunc.parametrize("world", asked or there, ids=lambda world: f"ranks-{world}")


def workload_of(depth, bigram_factor, rows, world):
    """A step's workload, in micro-steps that the ranks divide."""
    if ON_GPU:
        return gpu_workload(depth, bigram_factor, min(rows, STEP_ROWS // world))
    tiny = tiny_workload(depth, bigram_factor)
    return Workload(tiny.config, tiny.rows, world)


@pytest.mark.benchmark(timer=CLOCK)
def bench_scaling(benchmark, request, rounds, depth, fp8, world):
    option = request.config.getoption
    sizes = option("--bigram-factor"), option("--device-batch-size")
    workload = workload_of(depth, *sizes, world)
    rounds = rounds if ON_GPU else CPU_ROUNDS
    wanted = listed(option("--schemes")) if world > 1 else []
    task = Task(workload, "fused" if ON_GPU else "eager", fp8)
    with Crew(world, task) as crew:
        told = {name: crew.ask("build", name) for name in wanted}
        running = [name for name in wanted if told[name][0]]
        steps = take_turns(crew, running, rounds, WARMUP_ROUNDS)
        library, nbytes = {}, 0
        if world > 1:
            crew.ask("drop")
            library, nbytes = crew.ask("library")[0]
        told["alone"] = crew.ask("build", "alone")
        steps |= take_turns(crew, ["alone"], rounds, WARMUP_ROUNDS)
    taken = map(step_seconds, steps[[*running, "alone"][0]])

    def pass_time():
        CLOCK.now += next(taken)

    benchmark.pedantic(pass_time, rounds=rounds)
    alone = zip(*steps["alone"], strict=True)
    by_gpu = [statistics.median(map(own_seconds, each)) for each in alone]
    whole = told["alone"][0]["losses"]
    for name in running:
        # of each step's first micro-step, which rank 0 has everywhere
        losses = told[name][0]["losses"]
        gaps = [abs(loss - other) for loss, other in zip(losses, whole, strict=True)]
        close = gaps[0] < FIRST_LOSS_TOLERANCE and max(gaps) < LOSS_TOLERANCE
        assert close, f"{name}: losses {losses}, of one process {whole}"
    if benchmark.disabled:
        return
    benchmark.extra_info.update(
        depth=workload.config.n_layer,
        world=world,
        tokens=workload.tokens,
        rows=workload.rows,
        facts=told["alone"][0]["facts"],
        alone_ms=[1e3 * seconds for seconds in by_gpu],
        alone_peak_gib=[each["peak_gib"] for each in told["alone"]],
        library_ms={name: 1e3 * seconds for name, seconds in library.items()},
        nbytes=nbytes,  # of all gradients, as of all values
        schemes={name: scheme_figures(steps[name], told[name], by_gpu) for name in running},
        against=differences(steps, running),
        left_out=[f"{name} is left out: no room" for name in wanted if name not in running],
    )
