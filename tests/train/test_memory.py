"""How much memory there is, and that the estimates refuse exactly what is beyond it."""

from types import SimpleNamespace

import pytest
import torch

from nanofuse.model.config import GPTConfig
from nanofuse.train import memory
from nanofuse.train.disk import in_units
from nanofuse.train.errors import UserError
from nanofuse.train.memory import (
    cgroup_limits,
    check_inference_memory,
    check_training_memory,
    fitting_rows,
    free_memory,
    memory_of,
    out_of_memory,
    training_estimate,
)
from nanofuse.train.settings import resolve

CPU = torch.device("cpu")


@pytest.fixture
def has(monkeypatch):
    """Sets the bytes of memory that there are; None: unknown."""
    return lambda count: monkeypatch.setattr(memory, "memory_of", lambda device: count)


def test_limits_of_control_groups_of_both_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "Path", lambda path: tmp_path / path.lstrip("/"))
    assert list(cgroup_limits()) == []
    groups = tmp_path / "sys/fs/cgroup"
    for file, text in (
        (tmp_path / "proc/self/cgroup", "12:memory:/a/b\n0::/c\n"),
        (groups / "memory/a/b/memory.limit_in_bytes", "1000\n"),
        (groups / "c/memory.max", "2000\n"),
        (groups / "memory.max", "max\n"),
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert sorted(cgroup_limits()) == [1000, 2000]


def test_the_least_limit_counts(monkeypatch):
    limits, groups = {1: (700, 1), 2: (-1, -1)}, [900, 800]
    fake = SimpleNamespace(RLIMIT_AS=1, RLIMIT_DATA=2, RLIM_INFINITY=-1, getrlimit=limits.get)
    monkeypatch.setattr(memory, "resource", fake)
    monkeypatch.setattr(memory, "cgroup_limits", lambda: groups)
    sizes = {"SC_PHYS_PAGES": 10, "SC_PAGE_SIZE": 100}
    monkeypatch.setattr(memory.os, "sysconf", sizes.get)
    assert memory_of(CPU) == 700
    limits[2] = 600, 1
    assert memory_of(CPU) == 600
    limits[1] = limits[2] = -1, -1
    assert memory_of(CPU) == 800
    groups.clear()
    assert memory_of(CPU) == 1000
    monkeypatch.setattr(memory, "resource", None)  # Windows
    monkeypatch.setattr(memory.os, "sysconf_names", {})
    assert memory_of(CPU) is None


@pytest.mark.parametrize(("rows", "positions"), [(1, 0), (1, 40), (3, 40)])
def test_a_model_that_generates(rows, positions, has):
    """Weights, two rotary tables twice, a cache twice, four copies of a position's logits."""
    config = GPTConfig.from_depth(4, 8, 16, 1, sequence_len=8, vocab_size=60)
    needed = 2 * config.num_params + 2 * 2 * 4 * (10 * 8) * 16
    if positions:
        needed += 2 * 2 * (rows * positions * 4 * 16) * 2 + 4 * 4 * rows * 64
    arguments = config, 2, CPU, rows, positions, "this"
    has(needed)
    assert check_inference_memory(*arguments) == f"about {in_units(needed)} of {in_units(needed)}"
    has(None)
    assert check_inference_memory(*arguments) == f"about {in_units(needed)}"
    has(needed - 1)
    with pytest.raises(UserError, match="needs about 0.0 GiB .* are 0.0; lower this") as error:
        check_inference_memory(*arguments)
    assert ("with 3 rows of 40 tokens" in str(error.value)) == (rows > 1)


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        ({"depth": 20, "vocab_size": 512}, "--depth or --aspect-ratio"),
        (
            {"depth": 1, "vocab_size": 2**18, "max_seq_len": 64},
            "--vocab-size or --bigram-embed-factor",
        ),
        ({"depth": 4, "vocab_size": 512, "device_batch_size": 512}, "--device-batch-size or "),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["eager", "fused"])
@pytest.mark.parametrize("fp8", ["off", "te"])
def test_a_run_and_the_flags_to_lower(flags, hint, backend, fp8, has):
    settings = resolve({"device_batch_size": 1, **flags}, "cpu")
    config, rows = settings.model.config(), settings.horizon.device_batch_size
    machine = SimpleNamespace(dtype=torch.bfloat16, backend=backend, device=CPU)
    needed = config.memory_estimate(rows, 2, fp8=fp8 == "te", backend=backend)
    has(needed)
    words = f"about {in_units(needed)} of {in_units(needed)}"
    assert check_training_memory(settings, config, machine, fp8) == words
    has(needed - 1)
    with pytest.raises(UserError, match=f"with {rows} rows of .*lower {hint}"):
        check_training_memory(settings, config, machine, fp8)


def test_what_is_free_is_a_share_of_what_nobody_has(tmp_path, monkeypatch, has):
    has(1000 * 1024)
    monkeypatch.setattr(memory, "Path", lambda path: tmp_path / path.lstrip("/"))
    assert free_memory(CPU) == 750 * 1024
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:     400 kB\n")
    assert free_memory(CPU) == 300 * 1024
    has(100 * 1024)
    assert free_memory(CPU) == 75 * 1024
    has(None)
    assert free_memory(CPU) == 300 * 1024
    (tmp_path / "proc/meminfo").write_text("")
    assert free_memory(CPU) is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 9))
    assert free_memory(torch.device("cuda", 0)) == 5


def test_the_rows_are_the_most_that_the_estimate_lets_through():
    config = GPTConfig.from_depth(4)
    machine = SimpleNamespace(dtype=torch.float32, backend="eager", device=CPU)
    estimate, length = training_estimate(config, machine, "off"), config.sequence_len
    assert estimate(3) == config.memory_estimate(3, 4)
    free = estimate(16)
    assert fitting_rows(estimate, length, 2**30, free) == 16
    assert fitting_rows(estimate, length, 2**30, free - 1) == 8
    assert fitting_rows(estimate, length, 2**30, estimate(1) - 1) == 0
    assert fitting_rows(estimate, length, 4 * length, None) == 4
    assert fitting_rows(estimate, length, 24 * length, None) == 8
    assert fitting_rows(estimate, length, 24 * length, None, world=4) == 2
    assert fitting_rows(estimate, length, 2**40, None) == 4096


def test_words_for_rows_that_do_not_fit(has, monkeypatch):
    def estimate(rows):
        return (1 + 2 * rows) * 2**30

    has(20 * 2**30)
    said = out_of_memory(8, estimate, CPU)
    assert said == (
        "--device-batch-size 8 does not fit in the memory of CPU: 17.0 GiB were expected; "
        "4 should fit (the total batch stays the same)"
    )
    assert "; 3 should fit" in out_of_memory(9, estimate, CPU)
    has(5 * 2**30)
    assert "; 2 should fit" in out_of_memory(8, estimate, CPU)
    assert out_of_memory(1, estimate, CPU).endswith("; lower --depth or --max-seq-len")
    has(None)
    assert "; 4 should fit" in out_of_memory(8, estimate, CPU)
    has(20 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 19 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    said = out_of_memory(8, estimate, torch.device("cuda", 0))
    assert "of H200: 17.0 GiB were expected, 19.0 were taken at most, and there are 20.0" in said
