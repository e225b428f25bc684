"""Whole training steps: the fused path against compiled baselines, in one process.

On a GPU, for every --depth and --fp8: 524,288 tokens a step in micro-steps of 32 x 2048 (or
--device-batch-size rows). The baselines (--baselines, attention backends) are torch.compile with
FP8 through torch._scaled_mm. Every contender is built and takes its first steps alone, which gives
its time to the first step (imports not included, compile caches as they are) and its own peak
memory. Then they take turns, one step each on the same batches, until every one has --rounds timed
steps; medians are reported. Last, each takes steps in a row, from which its energy is read where
nvidia-ml-py is installed. Tokens come from a Zipf law. On a CPU the same code runs a tiny model,
eager and in Triton's interpreter. `python -m bench.report` reads what --benchmark-json saves.
"""

import gc
import math
import statistics
import time
from dataclasses import dataclass

import pytest
import torch

from nanofuse.bench.harness import CLOCK, ON_GPU, listed
from nanofuse.bench.roofline import floor_ms
from nanofuse.bench.training import PhaseClock, gpu_workload, synchronize, tiny_workload, train_step
from nanofuse.model.backends.choice import select_attention
from nanofuse.model.fp8.scaling import CALIBRATED_STEPS
from nanofuse.model.fused import kernels_are_interpreted
from nanofuse.model.providers import in_fp8
from nanofuse.train.assemble import assemble
from nanofuse.train.device import bf16_peak, device_name, select_fp8, select_machine
from nanofuse.train.energy import EnergyMeter, joules_per_million_tokens
from nanofuse.train.loop import settle_garbage
from nanofuse.train.optim.config import OptimConfig

GIB = 2**30
FIRST_STEPS = CALIBRATED_STEPS + 1 if ON_GPU else 2  # of each contender alone: till graphs run
WARMUP_ROUNDS = 1 if ON_GPU else 0
CPU_ROUNDS = 2
ENERGY_SECONDS = 3.0  # of steps in a row: the GPU's counter moves every 20 to 100 ms
FIRST_LOSS_TOLERANCE = 0.02  # between contenders: same weights, same batch


@dataclass(frozen=True)
class Entry:
    """One contender: its backend, attention, FP8 provider and CUDA graphs, as train.run's flags."""

    backend: str
    attention: str = "auto"
    fp8: str = "auto"
    cuda_graphs: bool = True


class Contender:
    """A model in training: builds it, takes and checks its first steps, records its timed steps."""

    def __init__(self, entry, workload, batches, device):
        gc.collect()
        if ON_GPU:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        started = time.perf_counter()
        machine = select_machine(device.type, entry.backend)
        fp8 = select_fp8(entry.fp8, machine, workload.config, workload.rows)
        self.backend, self.fp8, self.batches = entry.backend, fp8.name, batches
        self.built = assemble(
            workload.config,
            machine,
            OptimConfig(),
            fp8,
            attention=entry.attention,
            cuda_graphs=entry.cuda_graphs,
            rows=workload.rows,
        )
        self.attention = self.built.attention.name
        self.times, self.losses = [], []
        self.step()
        self.first_step_seconds = time.perf_counter() - started
        for _ in range(FIRST_STEPS - 1):
            self.step()
        self.peak_gib = self.reserved_gib = None
        if ON_GPU:
            self.peak_gib = (torch.cuda.max_memory_allocated() - before[0]) / GIB
            self.reserved_gib = (torch.cuda.max_memory_reserved() - before[1]) / GIB
        expected = math.log(workload.config.vocab_size)  # logits are ~0 at the start
        assert abs(self.losses[0] - expected) < 0.05, f"{self.name}: {self.losses[0]}"

    @property
    def name(self):
        return f"{self.backend} {self.attention} fp8={self.fp8}"

    def step(self):
        """Take one step; keeps its seconds by phase and its loss, and returns all its seconds."""
        clock = PhaseClock()
        loss = train_step(self.built, self.batches, clock)
        self.times.append(clock.seconds())
        self.losses.append(loss.item())
        return sum(self.times[-1].values())

    def joules(self, tokens, meter):
        """Joules per million tokens over steps in a row, without turns; None where the GPU's energy
        is not read."""
        synchronize()
        before, started, steps = meter.joules(), time.perf_counter(), 0
        if before is None:
            return None
        while time.perf_counter() - started < ENERGY_SECONDS:
            train_step(self.built, self.batches, PhaseClock())
            synchronize()
            steps += 1
        return joules_per_million_tokens(meter.joules() - before, steps * tokens)

    def figures(self, rounds, tokens):
        """Medians over the last `rounds` steps and everything else that is reported."""
        times = self.times[-rounds:]
        totals = [sum(phases.values()) for phases in times]
        seconds = statistics.median(totals)
        figures = {
            "backend": self.backend,
            "attention": self.attention,
            "fp8": self.fp8,
            "ms_per_step": 1e3 * seconds,
            "ms_range": [1e3 * min(totals), 1e3 * max(totals)],
            "tok_per_s": tokens / seconds,
            "peak_gib": self.peak_gib,
            "reserved_gib": self.reserved_gib,  # CUDA graphs keep their memory
            "time_to_first_step_s": self.first_step_seconds,
            "losses": [self.losses[0], self.losses[1], self.losses[-1]],
            "facts": self.built.facts,
        }
        for phase in times[0]:
            figures[f"{phase}_ms"] = 1e3 * statistics.median(one[phase] for one in times)
        return figures


def entries(device, attentions, fp8, config, cuda_graphs=True):
    """The Entries of all contenders, the fused pass first; and a line on every baseline left out.

    Args:
        attentions: attention backends of the compiled baselines.
    """
    if device.type != "cuda":
        fused = [Entry("fused")] if kernels_are_interpreted() else []
        return [*fused, Entry("eager")], []
    found = [Entry("fused", fp8=fp8, cuda_graphs=cuda_graphs)]
    need = select_machine(device.type, "compile").need()
    reasons, left_out = {}, []
    for attention in attentions:
        chosen = select_attention(attention, need, config=config)
        name, why = chosen.name, chosen.why
        if name in reasons:
            left_out.append(f"baseline {attention} is {name} again ({reasons[name]}; {why})")
            continue
        reasons[name] = why
        found.append(Entry("compile", name, "auto" if in_fp8(fp8) else "off"))
    return found, left_out


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    if "depth" in metafunc.fixturenames:
        depths = [int(depth) for depth in listed(option("--depth"))] or [16 if ON_GPU else 2]
        metafunc.parametrize("depth", depths, ids=lambda depth: f"d{depth}")
        metafunc.parametrize("fp8", listed(option("--fp8")), ids=lambda fp8: f"fp8-{fp8}")


@pytest.mark.benchmark(timer=CLOCK)
def bench_step(benchmark, device, request, rounds, depth, fp8):
    option = request.config.getoption
    bigram_factor = option("--bigram-factor")
    if ON_GPU:
        workload = gpu_workload(depth, bigram_factor, option("--device-batch-size"))
    else:
        workload = tiny_workload(depth, bigram_factor)
    rounds = rounds if ON_GPU else min(rounds, CPU_ROUNDS)
    torch._dynamo.reset()
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
    batches = workload.batches(device)
    found, left_out = entries(
        device, listed(option("--baselines")), fp8, workload.config, not option("--no-cuda-graphs")
    )
    contenders = [Contender(entry, workload, batches, device) for entry in found]
    product = contenders[0]
    for other in contenders[1:]:
        gap = abs(other.losses[0] - product.losses[0])
        assert gap < FIRST_LOSS_TOLERANCE, f"{product.name}, {other.name}: losses {gap} apart"

    def one_round():
        seconds = [contender.step() for contender in contenders]
        CLOCK.now += seconds[0]

    settle_garbage()
    retries = _allocation_retries()
    try:
        benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=WARMUP_ROUNDS)
    finally:
        gc.unfreeze()
    if benchmark.disabled:
        return
    retries = _allocation_retries() - retries
    for contender in contenders:
        assert contender.losses[-1] < contender.losses[0] - 0.1, f"{contender.name} does not learn"
    figures = [contender.figures(rounds, workload.tokens) for contender in contenders]
    meter = EnergyMeter(device)
    for contender, figure in zip(contenders, figures, strict=True):
        figure["joules_per_million_tokens"] = contender.joules(workload.tokens, meter)
    left_out += [meter.missing] if meter.missing else []
    info = {
        "depth": workload.config.n_layer,
        "bigram_factor": bigram_factor,
        "tokens": workload.tokens,
        "micro_steps": workload.micro_steps,
        "contenders": figures,
        "left_out": left_out,
        "allocation_retries": retries,  # above 0 the contenders crowd each other's memory
    }
    if ON_GPU:
        per_micro_step = floor_ms(workload.config, workload.rows, in_fp8(product.fp8))
        info["floor_ms"] = workload.micro_steps * per_micro_step
    peak = bf16_peak(device_name(device))
    if peak:
        flops = figures[0]["tok_per_s"] * workload.config.flops_per_token
        info["mfu_bf16"] = flops / peak
    benchmark.extra_info.update(info)


def _allocation_retries():
    """How often torch's allocator had to free its cache because the GPU's memory was full."""
    synchronize()
    return torch.cuda.memory_stats().get("num_alloc_retries", 0) if ON_GPU else 0
