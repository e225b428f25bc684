"""Options of bench_step."""

from types import SimpleNamespace

import pytest

from nanofuse.bench.conftest import pytest_configure
from nanofuse.bench.training import gpu_workload

DEFAULTS = {"--depth": "", "--fp8": "auto", "--device-batch-size": 32}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"--depth": "4,x"}, "--depth x: give depths such as 4,8,16"),
        ({"--depth": "0"}, "--depth 0: give depths"),
        ({"--fp8": "off,warp"}, "--fp8 warp: choose from auto, te, torch, off"),
        ({"--device-batch-size": 24}, "--device-batch-size 24: give a divisor of 256"),
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
