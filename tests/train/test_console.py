"""Output that cannot be shown ends no command."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanofuse.train.console import drop_failing_output, flush_or_drop, name_stdout
from nanofuse.train.run import main
from nanofuse.train.run_folder import run_dir
from tests.train.tiny import TINY, losses, records, steps

ROOT = Path(__file__).parent.parent.parent


def start(module, *args, env=None, **options):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(env or {})}
    command = [sys.executable, "-m", module, *map(str, args)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, **options)


@pytest.fixture
def args(data_dir, work_dir):
    more = ["--data", data_dir, "--num-iterations", 3, "--run", "a", "--sample-every", 1]
    return [*TINY, *more]


def assert_whole():
    assert list(losses(run_dir("a"))) == [1, 2, 3] and steps("a") == [3]
    assert len(records(run_dir("a"), "sample")) == 3


def close_all():
    for number in (0, 1, 2):
        os.close(number)


def test_streams_that_are_closed_or_full(args):
    """Nothing else gets the numbers of the streams: metrics.jsonl holds records only."""
    for number, options in enumerate(
        ({"preexec_fn": close_all}, {"stdout": open("/dev/full", "w"), "stderr": open("/dev/full")})
    ):
        name = f"s{number}"
        process = start("train.run", *args, "--run", name, **options)
        process.communicate()
        assert process.returncode == 0
        assert list(losses(run_dir(name))) == [1, 2, 3] and steps(name) == [3]


def test_a_reader_that_leaves(args):
    process = start("train.run", *args)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
    assert_whole()


def test_a_console_and_a_locale_without_the_characters(args, data_dir):
    folder = data_dir.with_name("δεδομένα")
    data_dir.rename(folder)
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    process = start("train.run", *args, "--data", folder, "--save-every", 2, env=plain)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert err == b"" and out.isascii()
    assert_resumed_under_another_locale()
    more = ["--run", "a", "--max-tokens", "4", "--prompt", "the αρχή", "--num-samples", "2"]
    process = start("train.generate", *more, env={"PYTHONIOENCODING": "latin-1"})
    _, err = process.communicate()
    assert process.returncode == 0 and b"Traceback" not in err


def assert_resumed_under_another_locale():
    """The data's folder is found by the name that meta.json has."""
    from nanofuse.train.files import remove_folder

    remove_folder(run_dir("a") / "step_000003")
    process = start("train.run", "--run", "a", "--resume", env={"LC_ALL": "C.UTF-8"})
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert list(losses(run_dir("a"))) == [1, 2, 3] and steps("a") == [2, 3]


def test_generation_into_a_pipe_that_closes_or_a_full_disk(args):
    main(list(map(str, args)))
    process = start("train.generate", "--run", "a", "--num-samples", 40, "--max-tokens", 100)
    process.stdout.read(1)
    process.stdout.close()
    assert b"Error" not in process.stderr.read() and process.wait() == 0
    full = open("/dev/full", "w")
    process = start("train.generate", "--run", "a", "--max-tokens", 4, stdout=full)
    _, err = process.communicate()
    assert process.returncode == 2 and err.count(b"\n") == 1 and b"No space left" in err


def test_streams_of_no_file_stay(monkeypatch):
    """As those of a notebook, or of a test."""
    stream = io.TextIOWrapper(io.BytesIO())
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream)
    drop_failing_output("stdout", "stderr")
    name_stdout()
    assert sys.stdout is sys.stderr is stream


def test_what_stdout_does_not_take_is_dropped(monkeypatch, tmp_path):
    for path in (tmp_path / "file", "/dev/full"):
        with open(path, "w") as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            stream.write("a line")
            flush_or_drop()
            stream.write("another")
            stream.flush()
            monkeypatch.undo()
    assert (tmp_path / "file").read_text() == "a lineanother"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_stdout_or_stderr(unbuffered, work_dir, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    with open("/dev/full", "w") as full:
        _, err = start("train.runs", stdout=full).communicate()
        assert err == b"error: stdout: No space left on device\n"
        process = start("train.sweep", "none", stderr=full)
        process.communicate()
        assert process.returncode == 2
