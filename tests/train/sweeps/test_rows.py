"""Rows for runs that ask for auto: found as the run would, and what they depend on."""

from dataclasses import replace

import pytest

from nanofuse.train import trial
from nanofuse.train.errors import UserError
from nanofuse.train.memory import take_part
from nanofuse.train.settings import ROWS
from nanofuse.train.sweeps import rows
from nanofuse.train.sweeps.definition import read_sweep
from nanofuse.train.sweeps.jobs import State
from tests.train.tiny import TINY

FILE = """
seeds = [1]
[flags]
total-batch-size = 65_536
device-batch-size = "auto"
[grid]
fp8-gradients = ["e5m2", "e4m3"]
depth = [1, 2]
"""


@pytest.fixture
def items(tmp_path):
    path = tmp_path / "s.toml"
    path.write_text(FILE)
    return read_sweep(path, {"device_type": "cpu"}, False).items


def test_equal_sizes_are_one_search_that_is_kept(items, tmp_path):
    """The first run is new, the second stopped with 8 rows, the others are new."""
    states = [State("new"), State("stopped", 5, rows=8), State("new"), State("new")]
    asked = []

    def search(searches):
        for each in searches:
            asked.append(each.item.run)
            each.out.write_text(f"{16 // each.item.settings.model.depth}\n")
            yield each, type("Ended", (), {"kind": "finished"})

    known = items, states, tmp_path, 1, None, search
    found = [item.given[ROWS] for item in rows.settle_rows(*known)]
    assert found == [16, 8, 16, 8]
    assert asked == ["s.fp8-gradients-e5m2_depth-1.1", "s.fp8-gradients-e4m3_depth-2.1"]
    settled = rows.settle_rows(*known)
    assert len(asked) == 2 and [item.settings.flat()[ROWS] for item in settled] == found
    assert [item.plan.micro_steps for item in settled] == [16, 32, 16, 32]
    assert "--device-batch-size=16" in settled[0].command(False)
    assert not list(tmp_path.glob("*.found"))
    for number, gpu in ((2, None), (1, "H200")):
        rows.settle_rows(items, states, tmp_path, number, gpu, search)
    assert len(asked) == 6
    (tmp_path / rows.FILE).write_text("[1]")
    with pytest.raises(UserError, match="rows.json is damaged"):
        rows.settle_rows(*known)


def test_other_data_may_have_another_vocabulary(items):
    first = items[0]
    other = replace(first, settings=first.settings.replace({"data": "elsewhere"}))
    longer = replace(first, settings=first.settings.replace({"num_iterations": 99}))
    keys = [rows.sizes(item, 1, None) for item in (first, longer, other)]
    assert keys[0] == keys[1] != keys[2]


def test_a_search_that_fails_names_the_variant(items, tmp_path):
    def search(searches):
        yield searches[0], type("Ended", (), {"kind": "failed", "text": "exit code 2: no room"})

    with pytest.raises(UserError, match="^fp8-gradients-e5m2_depth-1: no rows for auto, exit"):
        rows.settle_rows(items, [State("new")] * 4, tmp_path, 1, None, search)


def test_the_rows_are_those_that_such_a_run_takes(data_dir, work_dir, monkeypatch, capsys):
    at = TINY.index("--device-batch-size")
    flags = [*TINY[:at], *TINY[at + 2 :], "--data", str(data_dir), f"--device-batch-size={'auto'}"]
    parts = []
    monkeypatch.setattr("nanofuse.train.memory.take_part", lambda *args: parts.append(args))
    monkeypatch.setattr(trial, "free_memory", lambda device: None)
    rows.main(["out", "1", "--run", "a", *flags])
    assert (work_dir / "out").read_text() == "4\n"  # the batch of 256 tokens
    assert parts == [] and not (work_dir / "runs").exists()
    rows.main(["out", "3", "--run", "a", *flags])
    [(part, device)] = parts
    assert (part, device.type) == (pytest.approx(0.3), "cpu")


def test_a_part_of_the_memory_is_a_part_of_what_is_free(monkeypatch):
    from nanofuse.train import memory

    monkeypatch.setattr(memory, "_part", 1.0)
    cpu = trial.torch.device("cpu")
    monkeypatch.setattr(memory, "memory_of", lambda device: 2**20)
    whole = memory.free_memory(cpu)
    take_part(0.25, cpu)
    assert memory.free_memory(cpu) == whole // 4
