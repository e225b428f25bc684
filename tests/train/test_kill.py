"""Runs that are killed and interrupted at random moments, and go on."""

import random
import signal

import pytest

from nanofuse.train.files import LEFTOVER
from nanofuse.train.run_folder import checkpoints
from tests.conftest import write_data
from tests.train.forks import Forks
from tests.train.tiny import TINY, assert_same_run, strangers

KILLS = 50
STEPS = 100


@pytest.fixture(scope="module")
def forks():
    with Forks() as started:
        yield started


@pytest.fixture(scope="module")
def whole(forks, tokenizer, tmp_path_factory):
    """Arguments of a run, and its folder after it ended undisturbed."""
    place = tmp_path_factory.mktemp("whole")
    data_dir = write_data(place / "data", tokenizer)
    args = [*TINY, "--data", data_dir, "--num-iterations", STEPS]
    code, err = forks.run([*args, "--run", "whole"], place)
    assert code == 0, err
    return args, place / "runs" / "whole"


def test_fifty_kills_fail_no_resume_and_leave_nothing(forks, whole, work_dir):
    """Saves at every step. Kills fall, in turns, into a start and beside a save; a run that ends is
    followed by another, and ends bit for bit as one that was not disturbed."""
    args, undisturbed = whole
    draw, kills, runs = random.Random(1), 0, 0
    while kills < KILLS:
        runs += 1
        name = f"r{runs}"
        directory = work_dir / "runs" / name
        code = None
        while code != 0:
            more = [*args, "--save-every", 1, "--keep", 3]
            if checkpoints(directory):
                more = ["--resume"]
            number = signal.SIGKILL if kills < KILLS else None
            moment = (draw.uniform(0.0, 0.3),)
            if kills % 2:
                lines = max(checkpoints(directory), default=0) + draw.randint(1, 8)
                moment = draw.uniform(0.0, 0.02), directory / "metrics.jsonl", lines
            code, err = forks.run([*more, "--run", name], work_dir, number, *moment)
            if "has finished" in err:  # killed between its last line and its end
                break
            assert code in (0, -signal.SIGKILL), err
            kills += code != 0
            half = [p.name for p in directory.rglob(".*") if LEFTOVER.fullmatch(p.name)]
            assert len(half) <= 2  # those of the process that was killed last
        assert strangers(directory) == [] and list(directory.rglob(".*")) == []
        assert_same_run(undisturbed, directory, STEPS)
    print(f"{kills} kills in {runs} runs")


def test_five_terminations_end_bit_for_bit(forks, whole, work_dir):
    """Nothing is saved but by the signals."""
    args, undisturbed = whole
    directory, draw, newest = work_dir / "runs" / "a", random.Random(2), 0
    metrics = directory / "metrics.jsonl"
    for _ in range(5):
        more = ["--resume"] if newest else args
        lines = newest + draw.randint(1, 9)
        code, err = forks.run(
            [*more, "--run", "a"], work_dir, signal.SIGTERM, draw.uniform(0, 0.01), metrics, lines
        )
        assert code == 128 + signal.SIGTERM and err.count("\n") == 1, err
        assert "--run a --resume" in err
        newest = max(checkpoints(directory))
        assert newest >= lines
    code, err = forks.run(["--run", "a", "--resume"], work_dir)
    assert code == 0 and strangers(directory) == [], err
    assert_same_run(undisturbed, directory, STEPS)


def test_a_termination_before_the_first_step_leaves_nothing(forks, whole, work_dir):
    args, _ = whole
    for after in (0.05, 0.1, 0.15):
        code, err = forks.run([*args, "--run", "b"], work_dir, signal.SIGTERM, after)
        if code == 128 + signal.SIGTERM and "before the first step" in err:
            assert not (work_dir / "runs" / "b").exists()
        assert "Traceback" not in err


def test_five_kills_between_saves_end_bit_for_bit(forks, whole, work_dir):
    args, undisturbed = whole
    directory, draw, kills = work_dir / "runs" / "a", random.Random(3), 0
    code = None
    while code != 0:
        more = ["--resume"] if checkpoints(directory) else [*args, "--save-every", 3]
        number = signal.SIGKILL if kills < 5 else None
        code, err = forks.run([*more, "--run", "a"], work_dir, number, draw.uniform(0.4, 1.0))
        if "has finished" in err:
            break
        assert code in (0, -signal.SIGKILL), err
        kills += code != 0
    assert_same_run(undisturbed, directory, STEPS)
