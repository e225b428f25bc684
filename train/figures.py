"""The figures of a run: those of a window of steps, and those of the whole."""

import math
from dataclasses import dataclass

import torch

from nanofuse.model.fused import FusedGPT
from nanofuse.train.energy import joules_per_million_tokens


@dataclass(frozen=True)
class Crew:
    """The ranks of a window of steps.

    Attributes:
        size: their number.
        skew: time of the slowest in its own micro-steps, in times the mean.
        exposed_ms: of a step, in which the device waits for other ranks' parts, and adds them: of
            the rank that waits least, which is the last to come.
        peak_gib: memory of the fullest GPU, None on CPUs.
    """

    size: int
    skew: float
    exposed_ms: float
    peak_gib: float | None

    @classmethod
    def of(cls, ranks, steps):
        """Of each rank's (seconds in micro-steps, those exposed, bytes at most or None)."""
        seconds, exposed, peaks = zip(*ranks, strict=True)
        peaks = [peak for peak in peaks if peak is not None]
        mean = sum(seconds) / len(seconds)
        skew = max(seconds) / mean if mean else 1.0
        return cls(
            len(ranks), skew, 1e3 * min(exposed) / steps, max(peaks) / 2**30 if peaks else None
        )


def window_figures(trainer, loss, found, step_seconds, crew):
    """Figures of the steps since the last report.

    Args:
        loss: of the last of them.
        found: their Gradients (train.optim.watch).
        step_seconds: of one step.
        crew: Crew.

    Returns:
        {name: number} for the metrics, and a line for people.
    """
    progress = trainer.progress
    tok_per_s = trainer.plan.total_batch_size / step_seconds
    lr_mult = trainer.schedule.lr(progress.step - 1)
    smoothed = progress.smoothed_loss
    values = {
        "loss": loss if math.isfinite(loss) else None,
        "loss_ema": smoothed,
        "grad_norm": found.norm if math.isfinite(found.norm) else None,
        "nonfinite_steps": found.nonfinite_steps,
        "lr_mult": lr_mult,
        "ms_per_step": 1e3 * step_seconds,
        "tok_per_s": tok_per_s,
        "epoch": trainer.state.epoch,
        "train_seconds": progress.train_seconds,
    }
    status = (
        f"loss {smoothed:.4f} (step {loss:.4f})  |g| {found.norm:.3g}  lr x{lr_mult:.3f}  "
        f"epoch {values['epoch']}  {1e3 * step_seconds:.1f} ms/step  {tok_per_s:,.0f} tok/s"
    )
    if crew.size > 1:
        values |= {
            "ranks": crew.size,
            "tok_per_s_per_rank": tok_per_s / crew.size,
            "skew": crew.skew,
            "exposed_ms": crew.exposed_ms,
            "peak_gib": crew.peak_gib,
        }
        status += f" on {crew.size} ranks, skew {crew.skew:.3f}, exposed {crew.exposed_ms:.1f} ms"
    model = trainer.model
    if isinstance(model, FusedGPT):
        values["lse_min"], values["lse_max"] = (
            x if math.isfinite(x) else None for x in model.lse_range()
        )
        if (clipped := model.fp8_clipped()) is not None:
            values["fp8_clipped"] = clipped
    if peak := trainer.peak_flops:
        flops = trainer.raw_model.config.flops_per_token
        values["mfu"] = tok_per_s * flops / (peak * crew.size)
        status += f"  MFU {100 * values['mfu']:.1f} % of {peak / 1e12:.0f} TFLOP/s"
    return values, status


def summary(trainer):
    """The run in one JSON-able dict; memory is that of the fullest rank."""
    progress, times, device = trainer.progress, trainer.times, trainer.device
    steps = times.steady_steps
    peak = reserved = None
    if device.type == "cuda":
        own = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        peaks, reserves = zip(*trainer.ranks.collect(own), strict=True)
        peak, reserved = max(peaks) / 2**30, max(reserves) / 2**30  # CUDA graphs' included
    used = trainer.ranks.collect(times.steady_joules)
    used = None if None in used else sum(used)
    energy = joules_per_million_tokens(used, steps * trainer.plan.total_batch_size)
    read = {} if energy is None else {"joules_per_million_tokens": round(energy, 1)}
    return {
        "run": trainer.directory.name,
        "ranks": trainer.ranks.world,
        "steps": progress.step,
        "tokens": progress.step * trainer.plan.total_batch_size,
        "loss": progress.loss,
        "loss_ema": progress.smoothed_loss,
        "val_bpb": progress.val_bpb,
        "best_bpb": progress.best_bpb,
        "train_seconds": round(progress.train_seconds, 3),
        "train_seconds_nanochat": round(progress.counted_seconds, 3),  # without the first 11 steps
        "ms_per_step": 1e3 * times.steady_seconds / steps if steps else None,
        "time_to_first_step_s": times.first_step_seconds,
        "first_evaluation_s": trainer.phases.get("evaluation", 0.0),
        "start_seconds": {name: round(seconds, 3) for name, seconds in trainer.phases.items()},
        "peak_gib": peak,
        "reserved_gib": reserved,
        **read,
    }
