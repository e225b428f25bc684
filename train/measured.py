"""What was measured on known GPUs, by the name that the driver gives them (records/)."""

from dataclasses import dataclass

from nanofuse.train.plan import Plan
from nanofuse.train.settings import Settings

STEP_TOKENS = 524288  # of a measured step
START_SECONDS = 15.0  # of a run with warm caches, and of its end; about
EVALUATION = 0.5  # of a training step's time for as many tokens; about


@dataclass(frozen=True)
class Ceilings:
    """Rates that a GPU reaches: copies in bytes/s, read + written; products of 8192^3 in FLOP/s."""

    copy: float
    bf16: float
    fp8: float | None
    records: str


CEILINGS = {
    "NVIDIA H200": Ceilings(4254e9, 792e12, 1449e12, "2026-11-28-watch, 2026-11-29-doctor"),
    "NVIDIA H100 80GB HBM3": Ceilings(3000e9, 800e12, None, "2026-11-25-depths"),
}

# Milliseconds of a step by depth, of --backend fused with FlashAttention 4 and --fp8 as named, and
# the record of each.
STEPS = {
    ("NVIDIA H200", "nvmath"): ({4: 81.8, 8: 242.5, 16: 1037.8}, "2026-11-29-loss-products"),
    ("NVIDIA H200", "te"): ({4: 104.9, 8: 273.8, 16: 1113.3}, "2026-11-28-house"),
    ("NVIDIA H200", "off"): ({16: 1555.7}, "2026-11-28-house"),
    ("NVIDIA H100 80GB HBM3", "te"): (
        {4: 116.2, 12: 606.5, 16: 1155.2, 20: 1962.5},
        "2026-11-25-depths",
    ),
    ("NVIDIA H100 80GB HBM3", "off"): ({16: 1578.3}, "2026-11-25-depths"),
}


def measured_step(gpu: str, depth: int, fp8: str, attention: str) -> tuple[float, str] | None:
    """(milliseconds of a step, its record) with these providers, or None: not measured."""
    times, record = STEPS.get((gpu, fp8), ({}, ""))
    return (times[depth], record) if attention == "fa4" and depth in times else None


def expected_seconds(gpu: str | None, settings: Settings, plan: Plan) -> float | None:
    """Seconds that a run takes in all, about; None: its step is not measured on this GPU.

    Args:
        gpu: its name, or None without one.
    """
    machine, depth = settings.machine, settings.model.depth
    if gpu is None or machine.backend not in ("auto", "fused"):
        return None
    attention = "fa4" if machine.attention == "auto" else machine.attention
    products = ("nvmath", "te") if machine.fp8 == "auto" else (machine.fp8,)
    found = (measured_step(gpu, depth, name, attention) for name in products)
    step = next((ms for ms, _ in filter(None, found)), None)
    if step is None:
        return None
    reports, steps = settings.reports, plan.num_iterations
    evaluations = 1 + (not reports.skip_initial_eval)
    if reports.eval_every > 0:
        evaluations += (steps - 1) // reports.eval_every
    evaluated = EVALUATION * evaluations * plan.eval_rows * settings.model.max_seq_len
    return START_SECONDS + step * (plan.tokens + evaluated) / STEP_TOKENS / 1e3
