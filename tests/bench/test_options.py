"""Options of bench_step and bench_scaling."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanofuse.bench.conftest import pytest_configure
from nanofuse.bench.training import gpu_workload
from nanofuse.model.providers import PRODUCTS, choices

ROOT = Path(__file__).parents[2]
DEFAULTS = {
    "--depth": "",
    "--fp8": "auto",
    "--device-batch-size": 32,
    "--rounds": 20,
    "--bigram-factor": 5,
    "--worlds": "",
    "--schemes": "owned",
}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"--depth": "4,x"}, "--depth x: give depths such as 4,8,16"),
        ({"--depth": "0"}, "--depth 0: give depths"),
        ({"--depth": "9" * 5000}, "give depths"),  # more digits than Python converts
        ({"--rounds": 0}, "--rounds: give a number"),
        ({"--rounds": 2**63}, "--rounds: give a number"),
        ({"--bigram-factor": -1}, "--bigram-factor: give a number"),
        ({"--fp8": "off,warp"}, f"--fp8 warp: choose from {', '.join(choices(PRODUCTS))}"),
        ({"--worlds": "1,3"}, "--worlds 3: choose from 1, 2, 4, 8"),
        (
            {"--schemes": "owned,ddp"},
            "--schemes ddp: choose from owned, nanochat, all-reduce",
        ),
        ({"--device-batch-size": 24}, "--device-batch-size 24: give a divisor of 256"),
        ({"--device-batch-size": 2**63}, "give a divisor of 256"),
        ({"--device-batch-size": 0}, "--device-batch-size 0: give a divisor of 256"),
    ],
)
def test_bad_options_are_refused(given, message):
    options = DEFAULTS | given
    with pytest.raises(pytest.UsageError, match=message):
        pytest_configure(SimpleNamespace(getoption=options.get))


@pytest.mark.parametrize("rows", [1, 16, 32, 256])
def test_a_step_has_as_many_tokens_in_any_micro_batches(rows):
    pytest_configure(SimpleNamespace(getoption=(DEFAULTS | {"--device-batch-size": rows}).get))
    assert gpu_workload(4, rows=rows).tokens == 524_288


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU benches run by themselves")
def test_benchmarks_run_untimed():
    """--benchmark-disable calls each once; then there are no times to report."""
    command = [
        sys.executable, "-m", "pytest", "bench", "-q", "--benchmark-disable", "-p",
        "no:cacheprovider", "-k",
        "bench_cache or bench_tokenizer or bench_relu_squared or bench_step",
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]
    assert " passed" in result.stdout
