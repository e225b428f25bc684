"""A run's folder has one owner, and its name is free where nothing came of a start."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from nanofuse.train.bpb import Validation
from nanofuse.train.errors import RunEnded, UserError
from nanofuse.train.lock import LOCK_FILE, RunLock, Taken
from nanofuse.train.loop import Trainer
from nanofuse.train.run import main
from nanofuse.train.run_folder import run_dir
from tests.train.tiny import TINY, losses, records, steps, strangers

HOLDER = """
import sys, time
from pathlib import Path
from nanofuse.train.lock import RunLock
with RunLock() as lock:
    lock.take(Path(sys.argv[1]))
    print("taken", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def args(data_dir, work_dir):
    return [*TINY, "--data", str(data_dir), "--num-iterations", "3"]


@pytest.fixture
def holder(tmp_path):
    """Locks a folder in another process; ends with kill -9."""
    started = []

    def hold(directory):
        root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
        command = [sys.executable, "-c", HOLDER, str(directory)]
        process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "taken\n"
        started.append(process)
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()


def test_a_live_run_is_not_taken_and_a_killed_one_is(args, work_dir, holder):
    main([*args, "--run", "a", "--save-every", "1"])
    for path in (run_dir("a") / "step_000003").iterdir():
        path.unlink()
    process = holder(work_dir / "runs" / "a")
    for stopped in (False, True):
        if stopped:
            process.send_signal(signal.SIGSTOP)
        with pytest.raises(Taken, match=f"process {process.pid} on .* is training it"):
            main(["--run", "a", "--resume"])
    assert len(records(run_dir("a"))) == 3
    process.kill()
    process.wait()
    assert (run_dir("a") / LOCK_FILE).exists()
    main(["--run", "a", "--resume"])
    assert steps("a") == [1, 2, 3] and len(losses(run_dir("a"))) == 3
    assert not (run_dir("a") / LOCK_FILE).exists()


def test_a_start_beside_a_live_one(args, work_dir, holder):
    process = holder(work_dir / "runs" / "d1")
    for flags in ([*args, "--run", "d1"], ["--run", "d1", "--resume"]):  # no checkpoint yet
        with pytest.raises(Taken, match=f"process {process.pid} on .* is training it"):
            main(flags)
    main(args)  # without a name: the next one
    assert steps("d1-2") == [3] and not steps("d1")


def test_a_start_that_fails_leaves_nothing(args, work_dir, monkeypatch):
    def broken(*args):
        raise UserError("no")

    with monkeypatch.context() as patch, pytest.raises(UserError):
        patch.setattr("nanofuse.train.building.assemble", broken)
        main([*args, "--run", "a"])
    assert not (work_dir / "runs").exists()
    with monkeypatch.context() as patch, pytest.raises(UserError):
        patch.setattr(Validation, "check", broken)
        main([*args, "--run", "a"])
    assert not (work_dir / "runs").exists()


def test_a_start_killed_before_its_first_checkpoint_frees_its_name(args, work_dir, capsys):
    """The folder is there with everything but a checkpoint; the next start begins anew in it."""
    directory = run_dir("a")
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 9.0}\n')
    (directory / "tokenizer.json").write_text("of another")
    (directory / LOCK_FILE).write_text("process 1 on elsewhere\n")
    (directory / ".step_000002.0a1b2c3d").mkdir()
    (directory / "notes.txt").write_text("mine")
    main([*args, "--run", "a"])
    assert "its 1 records are dropped" in capsys.readouterr().out
    assert [r["step"] for r in records(directory)] == [1, 2, 3]
    assert strangers(directory) == ["notes.txt"]


def test_what_is_no_start_is_not_touched(args, work_dir):
    run_dir("photos").mkdir(parents=True)
    (run_dir("photos") / "metrics.txt").write_text("mine")
    with pytest.raises(UserError, match="runs/photos exists and is not a run's"):
        main([*args, "--run", "photos"])
    main([*args, "--run", "a"])
    with pytest.raises(UserError, match="runs/a exists; add --resume or choose another"):
        main([*args, "--run", "a"])
    assert steps("a") == [3] and strangers(run_dir("a")) == []
    assert [path.name for path in run_dir("photos").iterdir()] == ["metrics.txt"]


def test_a_run_without_a_checkpoint_keeps_its_metrics(args, monkeypatch):
    def broken(self):
        raise UserError("no")

    monkeypatch.setattr(Trainer, "save", broken)
    with pytest.raises(UserError):
        main([*args, "--run", "a"])
    assert len(records(run_dir("a"))) == 3 and strangers(run_dir("a")) == []
    monkeypatch.undo()


def test_folders_that_cannot_be_written_to_are_found_first(args, work_dir, monkeypatch, data_dir):
    (data_dir / "tokenizer.json").unlink()

    def denied(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.mkdir", denied)
        with pytest.raises(UserError, match=r"runs/a cannot be written to .Permission denied"):
            main([*args, "--run", "a"])
    (work_dir / "runs").write_text("a file")
    with pytest.raises(UserError, match="runs is not a folder"):
        main([*args, "--run", "a"])
    assert not (data_dir / "tokenizer.json").exists()


@pytest.mark.parametrize("gone", ["a", "runs"])
def test_a_folder_removed_under_the_run_is_made_again(args, work_dir, monkeypatch, gone):
    real, path = Trainer.train_step, work_dir / "runs"

    def stepping(self):
        if self.progress.step == 2:
            (path if gone == "runs" else path / "a").rename(work_dir / "away")
        return real(self)

    monkeypatch.setattr(Trainer, "train_step", stepping)
    with pytest.raises(
        RunEnded, match="runs/a was removed under the run: nothing from before"
    ) as e:
        main([*args, "--run", "a", "--save-every", "1"])
    assert e.value.code == 1 and steps("a") == [3]
    assert len(records(run_dir("a"))) == 3 and (run_dir("a") / "tokenizer.json").exists()


def test_a_folder_removed_after_the_last_save_is_made_again(args, work_dir, monkeypatch):
    def sampling(self):
        (work_dir / "runs" / "a").rename(work_dir / "away")

    monkeypatch.setattr(Trainer, "sample", sampling)
    with pytest.raises(RunEnded, match="step 3 is saved"):
        main([*args, "--run", "a", "--sample-every", "0"])
    assert steps("a") == [3] and (run_dir("a") / "tokenizer.json").exists()


def test_files_removed_under_the_run_are_made_again(args, monkeypatch, capsys):
    real = Trainer.train_step
    names = (".lock", "metrics.jsonl", "tokenizer.json")

    def stepping(self):
        if self.progress.step == 2:
            for name in names:
                (run_dir("a") / name).unlink()
        return real(self)

    monkeypatch.setattr(Trainer, "train_step", stepping)
    main([*args, "--run", "a", "--save-every", "1"])
    out = capsys.readouterr().out
    assert "run: .lock, tokenizer.json, metrics.jsonl of runs/a was removed; made again" in out
    assert steps("a") == [1, 2, 3] and len(records(run_dir("a"))) == 3
    assert (run_dir("a") / "tokenizer.json").exists()


def test_a_folder_that_another_run_has_taken_is_left_to_it(args, monkeypatch):
    real, other = Trainer.train_step, RunLock()

    def stepping(self):
        if self.progress.step == 2:
            shutil.rmtree(run_dir("a"))
            other.take(run_dir("a"))
        return real(self)

    monkeypatch.setattr(Trainer, "train_step", stepping)
    with other, pytest.raises(UserError, match="--run a: process .* is training it"):
        main([*args, "--run", "a"])


def test_a_full_disk_leaves_no_lock(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.write", full)
        with RunLock() as lock, pytest.raises(UserError, match="No space left"):
            lock.take(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_lock_follows_the_folder_of_its_name(tmp_path):
    """An owner that leaves removes its file; whoever waited for that one takes the next."""
    with RunLock() as first:
        first.take(tmp_path / "a")
        with RunLock() as second, pytest.raises(Taken):
            second.take(tmp_path / "a")
        assert not first.lost
    with RunLock() as third:
        third.take(tmp_path / "a")
        (tmp_path / "a").rename(tmp_path / "b")
        assert third.lost
        third.retake()
        assert not third.lost
