"""Options of the benchmarks, and the machine's facts in every result."""

import subprocess

import pytest
import torch

from train.device import device_name, select_device


def pytest_addoption(parser):
    parser.addoption("--depth", default="", help="depths to benchmark, comma-separated")
    parser.addoption("--rounds", type=int, default=20, help="timed steps of bench_step")


def _clocks():
    """SM and memory clock and power limit as nvidia-smi reads them now; None without it."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _commit():
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@pytest.fixture(scope="session")
def rounds(request):
    return request.config.getoption("--rounds")


@pytest.fixture(scope="session")
def device():
    return select_device("auto")


@pytest.fixture(scope="session")
def machine_info(device):
    """GPU, versions and commit for extra_info."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": _commit(),
    }


@pytest.fixture(autouse=True)
def record_machine(benchmark, machine_info):
    benchmark.extra_info.update(machine_info)
    yield
    benchmark.extra_info["clocks"] = _clocks()
