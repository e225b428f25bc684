"""Processes that --gpus and torchrun start, and one exit code for all of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanofuse.train import launch
from nanofuse.train.errors import UserError
from nanofuse.train.run import main
from nanofuse.train.run_folder import checkpoints
from tests.train.tiny import TINY, losses

ROOT = Path(__file__).parent.parent.parent
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


@pytest.fixture
def gpus(monkeypatch):
    """gpus(count, visible): what nvidia-smi lists, and CUDA_VISIBLE_DEVICES."""

    def there(count, visible=None):
        lines = "".join(f"GPU {i}: NVIDIA H200 (UUID: x)\n  MIG 1g: y\n" for i in range(count))
        done = subprocess.CompletedProcess([], 0, stdout=lines)
        monkeypatch.setattr(launch.subprocess, "run", lambda *a, **k: done)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return there


def test_auto_takes_every_gpu_that_is_visible(gpus):
    for count, visible, expected in (
        (0, None, ""), (3, None, "0 1 2"), (8, "3, GPU-5", "3 GPU-5"), (8, "", ""),
        (4, "0,-1,2", "0"), (2, "0,1,2", "0 1"),
    ):  # fmt: skip
        gpus(count, visible)
        assert launch.visible_gpus() == expected.split()
        assert launch.number_of_ranks("auto", "auto") == max(len(expected.split()), 1)
        assert launch.number_of_ranks("auto", "cpu") == 1


def test_more_ranks_than_gpus_are_refused_and_cpus_take_any(gpus):
    gpus(2)
    assert launch.number_of_ranks("2", "auto") == 2
    assert launch.number_of_ranks("5", "cpu") == 5
    with pytest.raises(UserError, match="--gpus 3: 2 GPUs are visible; lower it"):
        launch.number_of_ranks("3", "cuda")
    gpus(0)
    assert launch.number_of_ranks("3", "auto") == 3
    for text in ("0", "-1", "two", "1.5", "٣", "", "99999"):
        with pytest.raises(UserError, match="--gpus must be a number"):
            launch.number_of_ranks(text, "auto")


def process(code):
    """A process that does what Python is told in one line."""
    return subprocess.Popen([sys.executable, "-c", f"import os, signal, sys, time; {code}"])


@pytest.mark.parametrize(
    ("codes", "expected", "said"),
    [
        (("pass", "pass"), 0, ""),
        (("time.sleep(0.3); sys.exit(5)", "sys.exit(3)"), 3, ""),
        (("time.sleep(0.3)", "os.kill(os.getpid(), 9)"), 1, "error: rank 1 was killed by SIGKILL;"),
        (("os.kill(os.getpid(), 11)", "pass"), 1, "error: rank 0 was killed by SIGSEGV\n"),
    ],
)
def test_the_exit_code_is_that_of_the_first_that_failed(capfd, codes, expected, said):
    assert launch._wait([process(code) for code in codes], []) == expected
    err = capfd.readouterr().err
    assert err.startswith(said) and err.count("\n") == (said != "")


def test_a_stopped_rank_goes_on_when_another_fails_and_one_that_stays_is_killed(monkeypatch):
    monkeypatch.setattr(launch, "GOING_SECONDS", 1)
    stopped = process("os.kill(os.getpid(), signal.SIGSTOP)")
    stays = process("time.sleep(600)")
    failed = process("time.sleep(0.7); sys.exit(4)")
    assert launch._wait([stopped, stays, failed], []) == 4
    assert (stopped.returncode, stays.returncode) == (0, -signal.SIGKILL)


def test_signals_go_to_every_rank_and_a_rank_that_was_not_ready_is_no_fault(capfd):
    deaf = process("signal.signal(15, lambda *_: sys.exit(143)); time.sleep(600)")
    young = process("time.sleep(600)")
    time.sleep(0.3)
    assert launch._wait([deaf, young], [signal.SIGTERM]) == 143
    assert capfd.readouterr().err == ""


def test_bad_input_ends_all_ranks_with_one_line(data_dir, work_dir):
    command = [
        sys.executable,
        "-m",
        "nanofuse.train.run",
        *TINY,
        "--data",
        "nowhere",
        "--gpus",
        "2",
    ]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: data directory nowhere does not exist; fetch some with")
    assert done.stderr.count("\n") == 1 and not (work_dir / "runs").exists()


def test_torchrun(data_dir, work_dir):
    args = [*TINY, "--data", str(data_dir), "--num-iterations", "3"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, "-m", "nanofuse.train.run", "--", *args, "--run", "a"]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 x CPU" in done.stdout and done.stdout.count("step      3  saved") == 1
    main([*args, "--run", "b"])
    runs = [work_dir / "runs" / name for name in "ab"]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=1e-6)
    assert [list(checkpoints(run)) for run in runs] == [[3], [3]]


def test_ranks_without_their_parent_save_and_end(data_dir, work_dir):
    args = [*TINY, "--data", str(data_dir), "--num-iterations", "1000000", "--gpus", "2"]
    command = [sys.executable, "-m", "nanofuse.train.run", *args, "--run", "a"]
    parent = subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    metrics, until = work_dir / "runs" / "a" / "metrics.jsonl", time.monotonic() + 60
    while time.monotonic() < until and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    parent.kill()
    err = parent.communicate(timeout=120)[1].decode()  # until the last process has ended
    assert err.startswith("stopped by SIGTERM after step") and err.count("\n") == 1
    assert len(checkpoints(work_dir / "runs" / "a")) == 1
