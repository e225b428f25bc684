"""Random edits of the files that are read back, and every flag with numbers that are none: exit 0,
or exit 2 with one line; no traceback, no hang, no allocation beyond the estimate.

Everything runs in this process, with a limit on its memory and on the time of each call.
"""

import contextlib
import io
import json
import random
import shutil
import signal
import threading
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from nanofuse.train import convert, generate, run
from nanofuse.train.command import run_command
from nanofuse.train.data import __main__ as data_command
from nanofuse.train.run_folder import run_dir
from nanofuse.train.settings import FLAGS, flag_name
from tests.train.edits import edit_json, edit_tensors

resource = pytest.importorskip("resource")

TINY = (
    "--depth 1 --aspect-ratio 32 --head-dim 16 --max-seq-len 32 --device-batch-size 1 "
    "--total-batch-size 32 --eval-tokens 32 --eval-every -1 --skip-initial-eval --sample-every -1 "
    "--device-type cpu"
).split()
SECONDS = 20
ALLOWANCE = 2 * 2**30
ODD_NUMBERS = ("nan", "inf", "-inf", "-1", "0", "1e999", "-1e999", str(2**63), str(10**400), "")
MINUTES = ("num_iterations", "-1")  # a run as long as the data ratio says


class Late(BaseException):
    """A call takes too long."""


@contextmanager
def limits():
    """Memory beyond the allowance raises MemoryError, a call of more than SECONDS Late."""

    def late(*_):
        raise Late(f"more than {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    old = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ALLOWANCE, before[1]))
    # again and again, as what ends the call may wait as well
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(main, *argv):
    """What is wrong with how a command ends, or None, and its exit code."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    try:
        with limits(), redirect_stdout(out), redirect_stderr(err):
            run_command(lambda: main([str(each) for each in argv]))
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:100]}", None
    errors = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
    lines = len(err.getvalue().splitlines())
    if code not in (0, 2) or (code == 2 and (len(errors) != 1 or lines != 1)):
        return f"exit {code}, {lines} lines: {err.getvalue()[:200]!r}", code
    return None, code


@pytest.fixture
def whole(data_dir, work_dir):
    """A run of three steps of which two are saved; (its folder, its files)."""
    argv = [*TINY, "--data", data_dir, "--run", "a", "--num-iterations", 3, "--save-every", 2]
    assert outcome(run.main, *argv) == (None, 0)
    directory = run_dir("a")
    shutil.rmtree(directory / "step_000003")
    files = {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    return directory, files


def restore(directory, files):
    """The run as it was."""
    shutil.rmtree(directory)
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "edit", "count", "seed"),
    [
        ("step_000002/meta.json", edit_json, 170, 1),
        ("step_000002/loader.safetensors", edit_tensors, 60, 2),
        ("tokenizer.json", edit_json, 80, 3),
    ],
)
def test_random_edits_of_files(whole, name, edit, count, seed):
    directory, files = whole
    draw, wrong, codes = random.Random(seed), [], set()
    for turn in range(count):
        restore(directory, files)
        content, note = edit(files[Path(name)], draw)
        (directory / name).write_bytes(content)
        argv = ["--run", "a", "--resume"]
        call = run.main
        if "loader" not in name and turn % 3 == 2:
            argv, call = ["--run", "a", "--max-tokens", 2, "--device-type", "cpu"], generate.main
        problem, code = outcome(call, *argv)
        codes.add(code)
        if problem:
            wrong.append(f"{note}: {problem}")
        elif code == 0 and "meta" not in name and content != files[Path(name)]:
            if not same(content, files[Path(name)]):
                wrong.append(f"{note}: accepted")
    assert not wrong, f"{len(wrong)} of {count}: {wrong[:5]}"
    assert 2 in codes


def same(a, b):
    """Whether two JSON texts hold the same."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(a) == json.loads(b)
    return False


@pytest.mark.parametrize("value", ODD_NUMBERS)
def test_every_flag_of_a_run_with_odd_numbers(data_dir, work_dir, value):
    wrong = []
    for number, (name, (_, f)) in enumerate(FLAGS.items()):
        if f.type is bool or (name, value) == MINUTES:
            continue
        argv = [*TINY, "--data", str(data_dir), "--run", f"r{number}", "--num-iterations", "1"]
        flag = flag_name(name)
        if flag in argv:
            del argv[argv.index(flag) : argv.index(flag) + 2]
        problem, _ = outcome(run.main, *argv, f"{flag}={value}")
        if problem:
            wrong.append(f"{flag}={value}: {problem}")
    assert not wrong, wrong


@pytest.mark.parametrize("value", ODD_NUMBERS)
def test_every_flag_of_a_resumed_run_with_odd_numbers(whole, value):
    directory, files = whole
    wrong = []
    for name, (_, f) in FLAGS.items():
        if f.type is bool or (name, value) == MINUTES:
            continue
        restore(directory, files)
        problem, _ = outcome(run.main, "--run=a", "--resume", f"{flag_name(name)}={value}")
        if problem:
            wrong.append(f"{flag_name(name)}={value}: {problem}")
    assert not wrong, wrong


@pytest.mark.parametrize("value", ODD_NUMBERS)
def test_flags_of_the_other_commands_with_odd_numbers(whole, data_dir, value):
    wrong = []
    sample = ["--run", "a", "--max-tokens", 2, "--device-type", "cpu"]
    calls = [
        *((generate.main, *sample, f"--{name}={value}") for name in (
            "num-samples", "max-tokens", "temperature", "top-k", "seed", "step")),
        *((convert.main, way, "somewhere", "--run", "b", f"--step={value}") for way in (
            "from-nanochat", "to-nanochat")),
        (data_command.main, "train-tokenizer", "--data", data_dir, f"--vocab-size={value}"),
        *((data_command.main, "download", "--data", "new", f"--{name}={value}") for name in (
            "num-shards", "workers")),
    ]  # fmt: skip
    for call, *argv in calls:
        problem, _ = outcome(call, *argv)
        if problem:
            wrong.append(f"{argv}: {problem}")
    assert not wrong, wrong
    assert threading.active_count() < 50
