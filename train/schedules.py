"""Training horizon, batch size and the schedules of learning rate, momentum and weight decay.

Formulas and constants: nanochat's scaling rules, as in docs/recipe.md. All pure functions.
"""

import math
from dataclasses import dataclass

from nanofuse.model.option import option

REFERENCE_BATCH = 2**19  # tokens, tuned at d12
BATCH_EXPONENT = 0.383  # optimal batch ~ tokens^0.383 (Power Lines, arXiv 2505.13738)
MOMENTUM_START, MOMENTUM_PEAK, MOMENTUM_END = 0.85, 0.97, 0.90
MOMENTUM_WARMUP_STEPS = 400


def auto_batch_size(tokens: float, reference_tokens: float) -> int:
    """Tokens per step for a horizon of `tokens`: a power of two near B_ref * (D/D_ref)^0.383."""
    return 2 ** round(math.log2(REFERENCE_BATCH * (tokens / reference_tokens) ** BATCH_EXPONENT))


def batch_lr_scale(batch_size: int) -> float:
    """Factor on learning rates for a batch of `batch_size` tokens: sqrt(B / B_ref)."""
    return math.sqrt(batch_size / REFERENCE_BATCH)


def scaled_weight_decay(
    weight_decay: float, batch_size: int, tokens: float, reference_tokens: float
) -> float:
    """Muon's decay at this batch and horizon: wd * sqrt(B/B_ref) * D_ref/D."""
    return weight_decay * batch_lr_scale(batch_size) * reference_tokens / tokens


@dataclass(frozen=True)
class ScheduleConfig:
    """Shape of the learning rate's schedule."""

    warmup_steps: int = option(40, "steps of linear warm-up", least=0, most=10**12)
    warmdown_ratio: float = option(
        0.65, "last share of the steps, with linear warm-down", least=0, most=1
    )
    final_lr_frac: float = option(
        0.05, "share of the learning rate left at the end", least=0, most=1000
    )


@dataclass(frozen=True)
class Schedule:
    """Multipliers per step of a run of `num_iterations` steps."""

    num_iterations: int
    config: ScheduleConfig = ScheduleConfig()

    @property
    def warmdown_steps(self) -> int:
        return round(self.config.warmdown_ratio * self.num_iterations)

    def _warmdown(self, step: int) -> float:
        """How far the warm-down is at `step`, 0 before it and 1 at the end."""
        start = self.num_iterations - self.warmdown_steps
        if step <= start:
            return 0.0
        return (step - start) / self.warmdown_steps

    def lr(self, step: int) -> float:
        """Learning-rate multiplier: linear warm-up, constant, linear warm-down."""
        if step < self.config.warmup_steps:
            return (step + 1) / self.config.warmup_steps
        done = self._warmdown(step)
        return (1.0 - done) + done * self.config.final_lr_frac

    def momentum(self, step: int) -> float:
        """Muon's momentum: 0.85 -> 0.97 over 400 steps, then -> 0.90 during the warm-down."""
        if step < MOMENTUM_WARMUP_STEPS:
            frac = step / MOMENTUM_WARMUP_STEPS
            return (1 - frac) * MOMENTUM_START + frac * MOMENTUM_PEAK
        done = self._warmdown(step)
        return (1 - done) * MOMENTUM_PEAK + done * MOMENTUM_END

    def weight_decay(self, step: int) -> float:
        """Weight-decay multiplier: half a cosine from 1 to 0."""
        return 0.5 * (1 + math.cos(math.pi * step / self.num_iterations))
