"""train.sweep from start to end, with small processes in place of training."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from nanofuse.train.command import run_command
from nanofuse.train.sweep import main
from nanofuse.train.sweeps import jobs

ROOT = Path(__file__).parent.parent.parent
FAKE = [sys.executable, str(ROOT / "tests/train/sweeps/fake_run.py")]
FILE = """
about = "Two rates"
seeds = [1, 2]
[flags]
depth = 1
aspect-ratio = 32
head-dim = 16
max-seq-len = 32
vocab-size = 320
device-batch-size = 1
total-batch-size = 32
num-iterations = 9
device-type = "cpu"
[[variants]]
name = "low"
matrix-lr = 0.25
[[variants]]
name = "high"
matrix-lr = 0.5
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch, capsys):
    """sweep(*flags, fake={}, drawn=False): exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(jobs.Pool.__init__, "__defaults__", (FAKE,))
    (tmp_path / "s.toml").write_text(FILE)

    def run(*flags, fake=None, drawn=False):
        code = 0
        with monkeypatch.context() as patch:
            patch.setenv("FAKE", json.dumps(fake or {}))
            if not drawn:
                patch.setattr("nanofuse.train.pictures.draw", lambda *args: None)
            try:
                run_command(lambda: main(["s.toml", *flags]))
            except SystemExit as stop:
                code = stop.code
        return (code, *capsys.readouterr())

    return run


def started():
    path = Path("started.txt")
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return sorted(line.rpartition(" ")[0] for line in lines)


ALL = ["s.high.1 new", "s.high.2 new", "s.low.1 new", "s.low.2 new"]


@pytest.mark.cpu
def test_a_sweep_fails_in_part_goes_on_and_is_compared(sweep, monkeypatch):
    code, out, err = sweep("--jobs", "2", fake={"high": "fail"})
    assert code == 1 and started() == ALL
    assert "s.high.1: failed, exit code 2: --matrix-lr does not suit me (sweeps/s/s.high" in out
    assert err.startswith("error: 2 of 4 runs failed (s.high.1, s.high.2); the same command")
    assert "| low     |    2 | 1.265000 ± 0.007071 |" in out
    code, out, err = sweep("--jobs", "2", drawn=True)
    assert (code, err) == (0, "") and started() == ALL[:2]
    assert "2 finished, 2 new" in out and "[2/2] s.high." in out
    assert "| high    |    2 | 1.515000 ± 0.007071 | +0.250000 | +0.250000 to +0.250000" in out
    found = json.loads(Path("sweeps/s/table.json").read_text())
    assert found["variants"][1]["difference"]["mean"] == pytest.approx(0.25)
    names = {path.name for path in Path("sweeps/s").iterdir()}
    assert {"table.md", "curves.png", "curves.svg", "s.low.1.txt"} <= names
    assert sweep("--drop-weights")[0] == 0 and started() == []
    assert not list(Path("runs").glob("*/step_*")) and sweep()[0] == 0 and started() == []
    there = ModuleSpec("a tracker", None, origin="there")
    monkeypatch.setattr("nanofuse.train.trackers.find_spec", lambda name: there)
    for flag in ("--wandb", "--trackio", "--tensorboard"):
        assert sweep(flag)[0] == 0 and started() == []
    code, out, err = sweep("--depth", "2")
    assert (code, started()) == (2, [])
    assert "runs/s.low.1 was made with --depth 1, and the sweep says 2; move that run away" in err


@pytest.mark.cpu
def test_several_runs_share_a_gpu(sweep, monkeypatch):
    monkeypatch.setattr("nanofuse.train.sweep.visible_gpus", lambda: ["3", "5"])
    code, out, err = sweep("--per-gpu", "2")
    assert (code, err) == (0, "") and "on 2 GPUs, 4 at a time; 4 new" in out
    lines = Path("started.txt").read_text().splitlines()
    assert sorted(line.split()[-1] for line in lines) == ["3", "3", "5", "5"]
    assert started() == ALL and out.count("10.0 ms/step of a shared GPU") == 4
    assert "10.0 (shared) |" in out and "compared with nothing" in out
    assert not list(Path("sweeps/s").glob("*.shared"))
    code, out, _ = sweep("--jobs", "1")
    assert (code, started()) == (0, []) and "10.0 (shared) |" in out
    for flags, words in (
        (["--jobs", "3"], "--jobs 3: 2 GPUs are visible, 2 runs at a time; lower it, drop it, or"),
        (["--per-gpu", "2", "--jobs", "5"], "--jobs 5: 2 GPUs are visible, 4 runs at a time"),
        (["--per-gpu", "2", "--device-type", "cpu"], "--per-gpu 2 needs a GPU; use --jobs on a"),
    ):
        code, _, err = sweep(*flags)
        assert code == 2 and words in err


def test_rows_are_found_once_for_equal_sizes(sweep, tmp_path):
    text = FILE.replace("device-batch-size = 1", 'device-batch-size = "auto"')
    (tmp_path / "s.toml").write_text(text.replace("total-batch-size = 32", "total-batch-size = 64"))
    code, _, err = sweep(fake={"rows": "fail"})
    assert code == 2 and err.startswith("error: low: no rows for auto, exit code 1: not one row")
    assert started() == ["rows of s.low.1 for 1"]
    code, out, err = sweep("--jobs", "2", fake={"high": "fail"})
    assert code == 1 and "rows: low 2, high 2" in out
    assert started() == ["rows of s.low.1 for 2", *ALL]
    assert sweep("--jobs", "2")[0] == 0 and started() == ALL[:2]
    note = json.loads(Path("sweeps/s/s.high.2.json").read_text())
    assert note["settings"]["device_batch_size"] == 2
    flags = json.loads(Path("sweeps/s/table.json").read_text())["flags"]
    assert flags["low"]["device_batch_size"] == 2
    assert sweep()[0] == 0 and started() == []


def test_a_signal_stops_all_and_a_second_call_goes_on(sweep, tmp_path):
    env = {**os.environ, "FAKE": json.dumps({"low": "wait", "high": "wait"})}
    script = (
        f"from nanofuse.train.sweeps import jobs; jobs.Pool.__init__.__defaults__ = ({FAKE!r},)\n"
        "from nanofuse.train import sweep; from nanofuse.train.command import run_command\n"
        "run_command(lambda: sweep.main(['s.toml', '--jobs', '2']))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], env=env, stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    while len(list(tmp_path.glob("runs/*/ready"))) < 2:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    assert "runs this sweep; wait for it" in sweep()[2]
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1] == b"stopped; the same command goes on\n"
    assert process.returncode == 143
    assert sorted((tmp_path / "signalled.txt").read_text().split()) == ["s.high.1", "s.low.1"]
    assert len(started()) == 2
    code, out, _ = sweep("--dry-run")
    assert code == 0 and out.count("goes on at step 5") == 2 and out.count("starts") == 2
    assert started() == [] and "low: --matrix-lr=0.25" in out
    code, out, _ = sweep("--jobs", "2")
    assert (code, started()) == (
        0, ["s.high.1 resumed", "s.high.2 new", "s.low.1 resumed", "s.low.2 new"],
    )  # fmt: skip


@pytest.mark.cpu
def test_a_bpb_that_is_not_expected_ends_with_1(sweep, tmp_path):
    """The run of `low` ends at 1.27."""
    text = "tolerance = 2e-3\n" + FILE.replace("[1, 2]", "[2]")
    text += "[expected.low]\n0 = 3.0\n9 = 1.2675\n"
    (tmp_path / "s.toml").write_text(text)
    code, out, err = sweep()
    assert code == 1 and "error: 1 values are not what s.toml expects" in err
    assert "s.low.2: BPB 1.270000 at step 9, expected 1.2675 ± 0.002" in out
    (tmp_path / "s.toml").write_text(text.replace("9 = 1.2675", "8 = 1.0"))
    assert sweep()[0] == 2
    with pytest.MonkeyPatch.context() as patch:  # as where its line of the log is lost
        patch.setattr("nanofuse.train.sweeps.definition.refuse_unevaluated", lambda *args: None)
        assert "s.low.2: no evaluation at step 8, where 1.0 is expected" in sweep()[1]
    (tmp_path / "s.toml").write_text(text.replace("2e-3", "3e-3"))
    assert sweep()[0] == 0


def test_what_is_expected_of_other_data_is_not_compared(sweep, tmp_path, monkeypatch):
    text = (
        'tolerance = 2e-3\ncorpus = "9-a"\n'
        + FILE.replace("1, 2", "2")
        + "[expected.low]\n9 = 9.0\n"
    )
    (tmp_path / "s.toml").write_text(text)
    monkeypatch.setattr("nanofuse.train.sweep.other_data", lambda *args: "this is other data")
    code, out, err = sweep()
    assert (code, err, out.splitlines()[-1]) == (0, "", "this is other data")
    monkeypatch.setattr("nanofuse.train.sweep.other_data", lambda *args: None)
    assert sweep()[0] == 1


def test_bad_input_ends_with_2_and_starts_nothing(sweep, tmp_path):
    for flags in (["--jobs", "0"], ["--bogus"], ["--seed", "3"], ["--matrix-lr", "1"],
                  ["--per-gpu", "0"], ["--per-gpu", "2"]):  # fmt: skip
        assert sweep(*flags)[0] == 2
    (tmp_path / "s.toml").write_text(FILE.replace("depth = 1", "depth = 0"))
    code, _, err = sweep()
    assert (code, err) == (2, "error: s.toml, [flags]: --depth must be at least 1, got 0\n")
    assert started() == [] and not (tmp_path / "sweeps").exists()
