"""What is made of measured seconds; on a GPU, test_doctor.py measures."""

import subprocess
from types import SimpleNamespace

import pytest
import torch

from nanofuse.train import gpu


@pytest.fixture
def half_a_second(monkeypatch):
    """A GPU whose every call takes 0.5 s; tensors on it have no memory."""
    for name in ("empty", "randn"):
        make = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *size, make=make, **k: make(*size, **{**k, "device": "meta"})
        )
    monkeypatch.setattr(torch, "ones", lambda *size, device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "_median_seconds", lambda function: 0.5)


def test_rates(half_a_second):
    assert gpu.copy_ceiling.__wrapped__() == 2 * 2**30 / 0.5
    assert gpu.matmul_ceiling.__wrapped__() == 2 * 8192**3 / 0.5
    assert gpu.fp8_matmul_ceiling.__wrapped__() == 2 * 8192**3 / 0.5
    assert gpu._flush_buffer() is gpu._flush_buffer()
    gpu._flush_buffer.cache_clear()


def test_no_rates_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for ceiling in (gpu.copy_ceiling, gpu.matmul_ceiling, gpu.fp8_matmul_ceiling):
        assert ceiling.__wrapped__() is None


def test_seconds_are_those_between_two_events_after_a_flush(monkeypatch):
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append(self)

        def synchronize(self):
            assert done[-1] is self

        def elapsed_time(self, end):
            assert done == ["flush", self, "call", end]
            return 250.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    buffer = SimpleNamespace(zero_=lambda: done.append("flush"))
    monkeypatch.setattr(gpu, "_flush_buffer", lambda: buffer)
    assert gpu.gpu_seconds(lambda: done.append("call")) == 0.25


def test_the_first_two_calls_do_not_count(monkeypatch):
    calls = []
    monkeypatch.setattr(gpu, "gpu_seconds", lambda function: function())
    assert gpu._median_seconds(lambda: calls.append(None) or len(calls)) == 2 + (1 + 20) / 2
    assert len(calls) == 2 + gpu.ROUNDS


def test_what_the_driver_says(monkeypatch):
    asked = []

    def answer(query, **options):
        asked.append((query, options["timeout"]))
        assert options["check"] and options["text"] and options["capture_output"]
        return SimpleNamespace(stdout=" 580.1, 700 W\n")

    monkeypatch.setattr(subprocess, "run", answer)
    assert gpu.nvidia_smi("driver_version", "power.limit") == "580.1, 700 W"
    assert asked[0][0][1:] == [
        "-i", "0", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"
    ]  # fmt: skip
    assert 1 <= asked[0][1] <= 60

    for error in (FileNotFoundError("nvidia-smi"), subprocess.TimeoutExpired("nvidia-smi", 20)):

        def fail(query, error=error, **options):
            raise error

        monkeypatch.setattr(subprocess, "run", fail)
        assert gpu.nvidia_smi("driver_version") is None
