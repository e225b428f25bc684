import os
import time

import pytest

from nanofuse.train import clock


@pytest.fixture
def process(tmp_path, monkeypatch):
    """Makes a process whose first module was loaded 5 s ago, and which began `seconds` ago."""
    stat = tmp_path / "stat"
    monkeypatch.setattr(clock, "Path", lambda name: stat)
    monkeypatch.setattr(clock, "LOADED", 95.0)
    monkeypatch.setattr(time, "perf_counter", lambda: 100.0)
    monkeypatch.setattr(time, "clock_gettime", lambda which: 1000.0)
    monkeypatch.setattr(os, "sysconf", lambda name: 50)

    def make(seconds, name="python) 3"):
        fields = ["R", *range(4, 22), round((1000 - seconds) * 50), *range(23, 53)]
        stat.write_text(f"123 ({name}) " + " ".join(map(str, fields)) + "\n")

    return make


@pytest.mark.parametrize("seconds", [5, 7.5, 65])
def test_seconds_since_the_start_of_the_process(process, seconds):
    process(seconds)
    assert clock.process_seconds() == seconds


@pytest.mark.parametrize("seconds", [-3, 4.5, 65.5])
def test_clocks_that_do_not_fit_together(process, seconds):
    """As in some containers: then it is the time since the first module."""
    process(seconds)
    assert clock.process_seconds() == 5.0


def test_where_the_system_does_not_tell(process, monkeypatch):
    assert clock.process_seconds() == 5.0  # there is no file
    process(7.5)
    monkeypatch.delattr(time, "CLOCK_BOOTTIME")
    assert clock.process_seconds() == 5.0


def test_phases_end_one_after_the_other(monkeypatch):
    now = iter([3.0, 4.5, 4.75])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    phases = clock.Phases(1.0)
    for name in ("imports", "model", "imports"):
        phases.end(name)
    assert phases == {"imports": 2.25, "model": 1.5} and phases.started == 1.0
    assert str(phases) == "imports 2.2, model 1.5"
