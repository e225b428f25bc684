"""Training horizon, batch size and the schedules of learning rate, momentum and weight decay.

Formulas and constants: nanochat's scaling rules, as in recipe.md. All pure functions.
"""

import math
from dataclasses import dataclass

REFERENCE_BATCH = 2**19  # tokens, tuned at d12
BATCH_EXPONENT = 0.383  # optimal batch ~ tokens^0.383 (Power Lines, arXiv 2505.13738)
MOMENTUM_START, MOMENTUM_PEAK, MOMENTUM_END = 0.85, 0.97, 0.90
MOMENTUM_WARMUP_STEPS = 400


def auto_batch_size(tokens, reference_tokens):
    """Tokens per step for a horizon of `tokens`: a power of two near B_ref * (D/D_ref)^0.383."""
    return 2 ** round(math.log2(REFERENCE_BATCH * (tokens / reference_tokens) ** BATCH_EXPONENT))


def batch_lr_scale(batch_size):
    """Factor on every learning rate for a batch of `batch_size` tokens: sqrt(B / B_ref)."""
    return math.sqrt(batch_size / REFERENCE_BATCH)


def scaled_weight_decay(weight_decay, batch_size, tokens, reference_tokens):
    """Muon's decay at this batch and horizon: wd * sqrt(B/B_ref) * D_ref/D."""
    return weight_decay * batch_lr_scale(batch_size) * reference_tokens / tokens


@dataclass(frozen=True)
class Schedule:
    """Multipliers per step of a run of `num_iterations` steps."""

    num_iterations: int
    warmup_steps: int = 40
    warmdown_ratio: float = 0.65
    final_lr_frac: float = 0.05

    @property
    def warmdown_steps(self):
        return round(self.warmdown_ratio * self.num_iterations)

    def _warmdown(self, step):
        """How far the warm-down is at `step`, 0 before it and 1 at the end."""
        start = self.num_iterations - self.warmdown_steps
        if step <= start:
            return 0.0
        return (step - start) / self.warmdown_steps

    def lr(self, step):
        """Learning-rate multiplier: linear warm-up, constant, linear warm-down."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = self._warmdown(step)
        return (1.0 - done) + done * self.final_lr_frac

    def momentum(self, step):
        """Muon's momentum: 0.85 -> 0.97 over 400 steps, then -> 0.90 during the warm-down."""
        if step < MOMENTUM_WARMUP_STEPS:
            frac = step / MOMENTUM_WARMUP_STEPS
            return (1 - frac) * MOMENTUM_START + frac * MOMENTUM_PEAK
        done = self._warmdown(step)
        return (1 - done) * MOMENTUM_PEAK + done * MOMENTUM_END

    def weight_decay(self, step):
        """Weight-decay multiplier: half a cosine from 1 to 0."""
        return 0.5 * (1 + math.cos(math.pi * step / self.num_iterations))
