"""Options of the benchmarks, and the machine's facts in every result."""

import subprocess

import pytest
import torch

from bench.harness import copy_ceiling, matmul_ceiling
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


def _row(bench):
    info = bench.extra_info
    speedups = {k[8:]: v for k, v in info.items() if k.startswith("speedup_")}
    return [
        bench.name.removeprefix("bench_"),
        info["shape"],
        f"{info['us']:.1f}",
        f"{info['gb_per_s']:.0f}",
        f"{100 * info['copy_share']:.0f} %" if "copy_share" in info else "",
        f"{info['tflop_per_s']:.0f}" if "tflop_per_s" in info else "",
        f"{100 * info['matmul_share']:.0f} %" if "matmul_share" in info else "",
        ", ".join(f"{name} {ratio:.2f}" for name, ratio in speedups.items()),
    ]


def pytest_terminal_summary(terminalreporter, config):
    """Markdown table of the ops: time, rates, shares of this machine's ceilings, speed-ups."""
    session = getattr(config, "_benchmarksession", None)
    ops = [b for b in getattr(session, "benchmarks", []) if "us" in b.extra_info]
    if not ops:
        return
    head = ["op", "shape", "us", "GB/s", "of copy", "TFLOP/s", "of cuBLAS", "times faster than"]
    terminalreporter.section("ops")
    for cells in [head, ["---"] * len(head), *map(_row, ops)]:
        terminalreporter.write_line(f"| {' | '.join(cells)} |")
    if copy_ceiling():
        terminalreporter.write_line(
            f"ceilings: copy {copy_ceiling() / 1e9:.0f} GB/s, "
            f"bf16 {matmul_ceiling() / 1e12:.0f} TFLOP/s"
        )
