"""Windows of steps on a clock and a counter of energy that are made up."""

from types import SimpleNamespace

import pytest

from nanofuse.train import clock, step_times
from nanofuse.train.step_times import StepTimes


@pytest.fixture
def now(monkeypatch):
    time = SimpleNamespace(now=0.0, perf_counter=lambda: time.now)
    monkeypatch.setattr(step_times, "time", time)
    monkeypatch.setattr(clock, "time", time)
    return time


def window(times, now, steps, seconds):
    """A window of steps, as the loop has it."""
    times.open()
    for _ in range(steps):
        times.steps += 1
        now.now += seconds / steps
    return times.close(times.seconds(), times.take_steps())


@pytest.mark.parametrize("joules", [True, False])
def test_the_first_window_is_the_start_and_the_others_are_steady(now, joules):
    meter = SimpleNamespace(joules=lambda: 3 * now.now if joules else None)
    phases = clock.Phases(-20.0)
    times = StepTimes(meter, phases)
    assert times.windows == 0 and times.first_step_seconds is None
    assert window(times, now, 1, 30.0)
    assert times.first_step_seconds == 50.0 and phases == {"step": 50.0}
    assert (times.steady_steps, times.steady_joules) == (0, None)
    now.now += 1000.0  # evaluations
    assert not window(times, now, 4, 8.0)
    now.now += 1000.0
    assert not window(times, now, 2, 6.0)
    assert (times.steady_seconds, times.steady_steps, times.windows) == (14.0, 6, 3)
    assert times.steady_joules == (3 * 14.0 if joules else None)
    assert times.steps == times.take_steps() == 0
