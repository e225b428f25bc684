"""train.runs: what is said of the runs in a folder, and that looking changes nothing."""

import fcntl
import json
import os
import subprocess
import sys

import pytest

from nanofuse.train import lock as lock_module
from nanofuse.train import run
from nanofuse.train.errors import UserError
from nanofuse.train.lock import LOCK_FILE, RunLock, owner_of
from nanofuse.train.run_folder import META, MODEL
from nanofuse.train.runs import bytes_in, last_change, main
from tests.train.logs import add_checkpoint, write_run
from tests.train.tiny import TINY


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


@pytest.fixture
def listed(capsys):
    """{name: what --json says of it} of a call."""

    def call():
        capsys.readouterr()
        main(["--json"])
        return {each["name"]: each for each in json.loads(capsys.readouterr().out)}

    return call


def everything(folder):
    """Name, size and time of every file, as they are."""
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


def test_states(runs, listed, capsys):
    write_run(runs / "log", {0: 3.2, 100: 1.5})
    for name, step in (("done", 200), ("half", 100)):
        write_run(runs / name, {0: 3.2, 100: 1.25, 200: 1.5}, fp8_clipped=0)
        add_checkpoint(runs / name, step, 200)
    theirs = add_checkpoint(runs / "theirs", 7, 7, bpb=1.75)
    meta = json.loads((theirs / META).read_text())
    kept = ("format", "step", "model_config", "val_bpb")
    (theirs / META).write_text(json.dumps({name: meta[name] for name in kept}))
    (runs / "notes").mkdir()
    (runs / "file").write_text("")
    found = listed()
    states = {name: (each["state"], each["step"], each["steps"]) for name, each in found.items()}
    assert states == {
        "done": ("finished", 200, 200),
        "half": ("stopped", 100, 200),
        "log": ("no checkpoint", 100, None),
        "theirs": ("converted", 7, None),
    }
    assert (found["done"]["bpb"], found["done"]["best_bpb"]) == (1.5, 1.25)
    assert found["done"]["commit"] == "aaaaaaa"
    size = sum(p.stat().st_size for p in (runs / "done").rglob("*") if p.is_file())
    assert found["done"]["bytes"] == size
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].startswith("| half   | ") and " stopped | 100 of 200 | 1.500000 |" in lines[3]


def test_a_run_that_is_running(runs, listed):
    write_run(runs / "a", {0: 3.2, 100: 1.5})
    add_checkpoint(runs / "a", 50, 200)
    write_run(runs / "new", {0: 3.2})
    with RunLock() as one, RunLock() as two:
        one.take(runs / "a")
        two.take(runs / "new")
        before = everything(runs)
        found = listed()
        assert everything(runs) == before
        assert not one.lost and not two.lost
    owner = f"process {os.getpid()} on "
    assert [found[name]["state"] for name in ("a", "new")] == ["running", "running"]
    assert found["a"]["detail"].startswith(owner)
    assert (found["a"]["step"], found["a"]["steps"], found["new"]["step"]) == (100, 200, 1)


def test_a_lock_that_a_killed_process_left_is_no_owner(runs, listed):
    write_run(runs / "a", {0: 3.2})
    (runs / "a" / LOCK_FILE).write_text(f"process {os.getpid()} on here\n")
    assert listed()["a"]["state"] == "no checkpoint"


def test_looking_keeps_nobody_from_a_run(runs, monkeypatch):
    """A reader that has the lock just when a run starts; it has given it back a moment later."""
    write_run(runs / "a", {0: 3.2})
    (runs / "a" / LOCK_FILE).touch()
    reader = os.open(runs / "a" / LOCK_FILE, os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_SH)
    monkeypatch.setattr(lock_module.time, "sleep", lambda seconds: os.close(reader))
    with RunLock() as lock:
        lock.take(runs / "a")
        assert owner_of(runs / "a").startswith("process ")


def test_without_locks_the_file_is_believed(runs, monkeypatch):
    write_run(runs / "a", {0: 3.2})
    assert owner_of(runs / "a") is None
    (runs / "a" / LOCK_FILE).write_text("process 12 on here\n")
    monkeypatch.setattr(lock_module, "fcntl", None)
    assert owner_of(runs / "a") == "process 12 on here"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda run: (run / "step_000100" / META).unlink(), "meta.json is missing, damaged"),
        (lambda run: (run / "step_000100" / META).write_text("{"), "meta.json is missing, damaged"),
        (lambda run: (run / "step_000100" / MODEL).unlink(), "missing or cut short; no checkpoint"),
        (lambda run: (run / "step_000100" / MODEL).write_bytes(b"x" * 9), "missing or cut short"),
        (lambda run: (run / "metrics.jsonl").write_text("?\n"), "line 1 is not of a run's log"),
        (lambda run: (run / "step_000300").mkdir(), "step_000300/meta.json is missing"),
    ],
)
def test_damage_is_said_with_the_way_out(runs, listed, capsys, damage, message):
    write_run(runs / "a", {0: 3.2, 100: 1.5})
    add_checkpoint(runs / "a", 100, 200)
    damage(runs / "a")
    assert listed()["a"]["state"] == "damaged"
    main([])
    assert message in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("folder", ["runs/a", "runs"])
def test_a_folder_that_may_not_be_read_is_said(runs, listed, monkeypatch, folder):
    for name in "ab":
        write_run(runs / name, {0: 3.0, 100: 2.0})
    real = os.listdir

    def refusing(path="."):
        if str(path) == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr("os.listdir", refusing)
    said = f"{folder} cannot be read (Permission denied)"
    if folder == "runs":
        with pytest.raises(UserError) as error:
            main([])
        assert str(error.value) == said
        return
    found = listed()
    assert [found[name]["state"] for name in "ab"] == ["damaged", "no checkpoint"]
    assert found["a"]["detail"] == said


def test_a_real_run(runs, data_dir, listed):
    argv = [*TINY, "--data", str(data_dir), "--num-iterations", "2", "--run", "a"]
    run.main(argv)
    found = listed()["a"]
    assert (found["state"], found["step"], found["steps"]) == ("finished", 2, 2)
    assert found["bpb"] == found["best_bpb"] > 0 and found["changed"] > "2026"


def test_no_runs_and_no_torch(tmp_path):
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    code = (
        f"import sys; sys.path.insert(0, {root!r}); from nanofuse.train.runs import main; "
        "main([]); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert done.stdout == f"no runs in {tmp_path / 'runs'}; python -m train.run makes one\n"


def test_files_that_go_away_meanwhile_do_not_count(tmp_path, monkeypatch):
    for name in "abc":
        (tmp_path / name).write_text("four")
    os.utime(tmp_path / "c", (0, 86400 * 365))
    assert last_change([tmp_path / "gone", tmp_path / "c"])[:4] == "1971"
    assert last_change([tmp_path / "gone"]) is None
    lstat = os.lstat

    def look(path):
        if str(path) == first:
            raise FileNotFoundError(path)
        return lstat(path)

    first = os.path.join(tmp_path, next(os.walk(tmp_path))[2][0])
    monkeypatch.setattr(os, "lstat", look)
    assert bytes_in(tmp_path) == 8
