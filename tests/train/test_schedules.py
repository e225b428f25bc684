import math

import pytest

from nanofuse.train.schedules import (
    Schedule,
    ScheduleConfig,
    auto_batch_size,
    batch_lr_scale,
    scaled_weight_decay,
)
from tests.helpers import ranges

RUN = Schedule(num_iterations=3584)


def test_defaults_and_bounds_move_on_purpose_only():
    assert ranges(ScheduleConfig) == {
        "warmup_steps": (40, 0, 10**12),
        "warmdown_ratio": (0.65, 0, 1),
        "final_lr_frac": (0.05, 0, 1000),
    }


def test_lr_warms_up_stays_and_warms_down():
    assert RUN.lr(0) == 1 / 40 and RUN.lr(19) == 0.5 and RUN.lr(39) == 1.0
    assert RUN.lr(40) == RUN.lr(1000) == RUN.lr(3584 - 2330) == 1.0  # warm-down: 2330 steps
    assert RUN.lr(3584 - 1165) == pytest.approx(1 - 0.5 * 0.95)
    assert RUN.lr(3584) == pytest.approx(0.05)
    steps = [RUN.lr(step) for step in range(1254, 3585)]
    assert all(a > b for a, b in zip(steps, steps[1:], strict=False))


def test_momentum_rises_and_falls():
    assert RUN.momentum(0) == 0.85 and RUN.momentum(200) == pytest.approx(0.91)
    assert RUN.momentum(400) == RUN.momentum(1254) == 0.97
    assert RUN.momentum(3584 - 1165) == pytest.approx(0.935)
    assert RUN.momentum(3584) == pytest.approx(0.90)


def test_weight_decay_is_half_a_cosine():
    assert RUN.weight_decay(0) == 1.0
    assert RUN.weight_decay(1792) == pytest.approx(0.5)
    assert RUN.weight_decay(896) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert RUN.weight_decay(3584) == pytest.approx(0.0)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_no_warmdown_and_nothing_else(ratio):
    schedule = Schedule(100, ScheduleConfig(warmup_steps=0, warmdown_ratio=ratio))
    assert schedule.lr(100) == (1.0 if ratio == 0 else pytest.approx(0.05))
    assert schedule.lr(0) == 1.0


def test_batch_rules():
    assert auto_batch_size(1e9, 1e9) == 2**19
    assert auto_batch_size(8e9, 1e9) == 2**20  # 2^(19 + 3 * 0.383) rounds to 2^20
    assert auto_batch_size(1e9 / 8, 1e9) == 2**18
    assert batch_lr_scale(2**21) == 2.0
    assert batch_lr_scale(1_048_576) == 2**0.5
    assert scaled_weight_decay(0.28, 2**21, 4e9, 1e9) == pytest.approx(0.28 * 2 / 4)
