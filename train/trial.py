"""--device-batch-size auto: the most rows that fit, by estimate, and by a trial on a GPU.

The trial trains a model of the run's sizes on random tokens until everything has run that takes
memory: FP8 calibration, CUDA graphs, the optimiser, an evaluation. It is made before anything of
the run is there, and leaves nothing behind.
"""

import gc
import os
import sys
import traceback
from dataclasses import replace

import torch

from nanofuse.model.fp8.operands import CALIBRATED_STEPS
from nanofuse.train.assemble import assemble, follow
from nanofuse.train.command import DEBUG_ENV, is_out_of_memory
from nanofuse.train.device import select_products
from nanofuse.train.errors import UserError
from nanofuse.train.memory import (
    GIB,
    fitting_rows,
    free_memory,
    memory_of,
    out_of_memory,
    training_estimate,
)
from nanofuse.train.plan import make_plan
from nanofuse.train.settings import ROWS, Settings

TRIAL_STEPS = CALIBRATED_STEPS + 2  # those that record graphs and replay them included


def choose_rows(settings: Settings, config, machine, fp8, world=1, total=None) -> Settings:
    """Settings with the most rows that are expected to fit in what is free of the memory.

    Args:
        config: GPTConfig.
        machine: train.device.Machine.
        fp8: name of the provider of products.
        world: number of ranks.
        total: tokens of a step, where it is settled.

    Raises:
        UserError: not one row is expected to fit, or the ranks do not divide the batch.
    """
    one = settings.replace({ROWS: 1})
    total = make_plan(one, config, total, world).total_batch_size
    estimate, free = training_estimate(config, machine, fp8), free_memory(machine.device)
    rows = fitting_rows(estimate, config.sequence_len, total, free, world)
    if not rows:
        raise UserError(
            f"--device-batch-size auto: one row of {config.sequence_len:,} tokens is expected to "
            f"take {estimate(1) / GIB:,.1f} GiB, and {free / GIB:,.1f} are free; lower --depth or "
            "--max-seq-len"
        )
    return settings.replace({ROWS: rows})


def _train(settings, config, machine, fp8, say):
    """What takes memory in training, with the rows of the settings."""
    rows, options = settings.horizon.device_batch_size, settings.machine
    built = assemble(
        config,
        machine,
        settings.optim,
        fp8,
        options.attention,
        options.deterministic,
        options.compile_mode,
        options.cuda_graphs,
        rows=rows,
        say=say,
    )
    generator = torch.Generator(machine.device).manual_seed(0)
    shape = rows, config.sequence_len + 1
    tokens = torch.randint(config.vocab_size, shape, generator=generator, device=machine.device)
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()  # (B, T) each
    built.model.train()
    for _ in range(TRIAL_STEPS):
        built.model(*batch).backward()
        built.optimizer.step(1.0, 0.9, 0.0)
        built.optimizer.zero_grad()
        follow(built.model)
    built.model.eval()
    with torch.no_grad():
        built.model(*batch, reduction="none").sum().item()


def fits(settings, config, machine, fp8, say=print):
    """Whether training with the rows of the settings fits: tried, and nothing of it kept.

    Args:
        fp8: providers.Choice of the products.
        say: as of assemble.
    """
    cuda = machine.device.type == "cuda"
    try:
        _train(settings, config, machine, fp8, say)
        return True
    except (MemoryError, RuntimeError) as error:
        told = str(error).lower()
        if not is_out_of_memory(error) and not ("out of memory" in told or "alloc_failed" in told):
            raise
        if not os.environ.get(DEBUG_ENV):
            traceback.clear_frames(error.__traceback__)  # they hold tensors
    finally:
        if cuda:
            if compiler := sys.modules.get("torch._dynamo"):  # torch._dynamo would load it
                compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()
    return False


def settle_rows(start, ready=lambda: None):
    """The Start of a run whose rows fit, tried on a GPU if they were found out; rank 0 says so.
    For all ranks at once.

    Args:
        start: train.start.Start.
        ready: called before the first kernel.

    Raises:
        UserError: not one row fits.
    """
    if not start.auto_rows:
        return start
    device, ranks, tried = start.machine.device, start.ranks, ""
    if device.type == "cuda":
        ranks.by_main(ready)
        while True:
            rows = start.settings.horizon.device_batch_size
            trial = start.settings, start.config, start.machine, start.fp8
            good = fits(*trial, print if ranks.main else lambda line: None)
            peak = torch.cuda.max_memory_reserved(device)
            bad, peak = ranks.agree(not good, peak)
            if not bad:
                tried = f"; {peak / GIB:,.1f} in a trial"
                torch.cuda.reset_peak_memory_stats(device)
                break
            words = out_of_memory(rows, start.estimate, device)
            if rows == 1:
                raise UserError(words)
            if ranks.main:
                print(f"batch: {rows:,} rows do not fit in a trial; half of them is tried")
            torch.cuda.reset_peak_memory_stats(device)
            start = halved(start)
    rows, memory = start.settings.horizon.device_batch_size, memory_of(device)
    if ranks.main:
        of = "" if memory is None else f" of {memory / GIB:,.1f}"
        expected = start.estimate(rows) / GIB
        print(f"batch: {rows:,} rows, auto: {expected:,.1f}{of} GiB expected{tried}", flush=True)
    return start


def halved(start):
    """A Start with half of its rows, and twice the micro-steps."""
    rows = start.settings.horizon.device_batch_size // 2
    settings = start.settings.replace({ROWS: rows})
    fp8 = select_products(settings, start.machine, start.config)
    plan = replace(start.plan, micro_steps=2 * start.plan.micro_steps)
    return replace(start, settings=settings, fp8=fp8, plan=plan)
