"""What a sweep is expected to take."""

import pytest

from nanofuse.train.measured import expected_seconds
from nanofuse.train.sweeps import outlook
from nanofuse.train.sweeps.definition import find_sweep, read_sweep


def test_times_are_those_measured_on_such_a_gpu(tmp_path, monkeypatch):
    """d4 on an H200: 81.8 ms for 524,288 tokens, so 14.4 s for 352 steps of half of that, and 5
    evaluations of 5,242,880 tokens at half the price."""
    sweep = read_sweep(find_sweep("parts-d4"), {}, True)
    item = sweep.items[0]
    seconds = expected_seconds("NVIDIA H200", item.settings, item.plan)
    assert seconds == pytest.approx(15 + 0.0818 * (176 + 0.5 * 5 * 10))
    assert expected_seconds("NVIDIA A100", item.settings, item.plan) is None
    assert expected_seconds(None, item.settings, item.plan) is None
    monkeypatch.setattr(outlook, "gpu_name", lambda: "NVIDIA H200")
    clock = outlook.Clock(sweep, tmp_path, True)
    assert clock.seconds(item, 176) == pytest.approx(seconds / 2)
    assert clock.total([(item, 0), (item, 0)], 2) == pytest.approx(seconds)
    clock.taken["dense"] = [10.0, 20.0]
    assert clock.seconds(item) == 15.0


def test_times_are_for_people():
    words = [outlook.in_words(seconds) for seconds in (None, 9.6, 99, 600, 7200)]
    assert words == ["unknown", "10 s", "99 s", "10 min", "2.0 h"]
