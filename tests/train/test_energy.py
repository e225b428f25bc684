"""Joules from a counter that stands in for NVML's, and what a run makes of them."""

import itertools
import sys
import types

import pytest
import torch

from nanofuse.train.energy import EnergyMeter, joules_per_million_tokens
from nanofuse.train.figures import summary
from tests.train.test_loop import make_trainer  # noqa: F401 - a fixture

CUDA = torch.device("cuda", 1)


@pytest.fixture
def nvml(monkeypatch):
    """A driver of one GPU, whose counter stands at `millijoules`."""
    fake = types.ModuleType("pynvml")
    fake.NVMLError = type("NVMLError", (Exception,), {})
    fake.millijoules = 5000
    fake.nvmlInit = lambda: None
    fake.nvmlDeviceGetHandleByUUID = lambda uuid: {b"GPU-1234": "handle"}[uuid]
    fake.nvmlDeviceGetTotalEnergyConsumption = lambda handle: fake.millijoules
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    properties = types.SimpleNamespace(uuid="1234")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    return fake


def test_the_counter_is_read_in_joules(nvml):
    meter = EnergyMeter(CUDA)
    before, nvml.millijoules = meter.joules(), 7500
    assert (before, meter.joules(), meter.missing) == (5.0, 7.5, None)
    assert joules_per_million_tokens(2.5, 5000) == 500.0
    assert joules_per_million_tokens(None, 5) is joules_per_million_tokens(1.0, 0) is None


def test_without_a_counter_that_is_said_in_a_line(nvml, monkeypatch):
    def refuse(handle):
        raise nvml.NVMLError("Not Supported")

    nvml.nvmlDeviceGetTotalEnergyConsumption = refuse
    meter = EnergyMeter(CUDA)
    assert meter.joules() is None and meter.missing.endswith("(Not Supported)")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    meter = EnergyMeter(CUDA)
    assert meter.joules() is None and "pip install 'nanofuse[energy]'" in meter.missing
    meter = EnergyMeter(torch.device("cpu"))  # nothing to say
    assert meter.joules() is meter.missing is None


def test_a_run_sums_the_steps_after_the_first(make_trainer):  # noqa: F811
    trainer = make_trainer(num_iterations=3, train_log_every=1, total_batch_size=128)
    trainer.between_steps = lambda due: None  # neither saves nor evaluations
    assert "joules_per_million_tokens" not in summary(trainer)
    reads = itertools.count(100.0, 0.5)  # half a joule between two reads
    trainer.energy.joules = lambda: next(reads)
    trainer.run()
    assert trainer.times.steady_joules == 0.5 * 2
    assert summary(trainer)["joules_per_million_tokens"] == round(1e6 / (2 * 128), 1)
