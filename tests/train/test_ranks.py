"""Several ranks train as one process does: the same rows, losses and evaluations."""

import signal

import pytest

from nanofuse.train.run_folder import checkpoints
from tests.train.forks import Forks
from tests.train.tiny import TINY, losses, records, strangers

BATCH = ["--total-batch-size", 2 * 64 * 6, "--eval-tokens", 64 * 9]  # 6 micro-steps, 4.5 batches


@pytest.fixture(scope="module")
def forks():
    with Forks() as started:
        yield started


@pytest.fixture
def train(forks, data_dir, work_dir):
    """train(name, ranks, flags): the run's folder, after it ended well."""

    def run(name, ranks, *flags, **more):
        args = [*TINY, "--data", data_dir, *BATCH, "--run", name, "--gpus", ranks, *flags]
        code, err = forks.run(args, work_dir, **more)
        assert (code, err) == (0, "")
        return work_dir / "runs" / name

    return run


def bpbs(directory):
    return {record["step"]: record["bpb"] for record in records(directory, "val")}


@pytest.mark.parametrize("world", [2, 3])
def test_the_methods(forks, work_dir, world):
    assert forks.run(["--gpus", world], work_dir, job="tests.train.rank_jobs:methods") == (0, "")


def test_a_rank_that_fails_ends_all_with_its_line(forks, work_dir):
    code, err = forks.run(["--gpus", 3], work_dir, job="tests.train.rank_jobs:one_fails")
    lines = err.splitlines()
    assert code == 1 and lines[0] == "error: ValueError: of rank 1"
    assert sorted(lines[1:]) == ["rank 0 ends with rank 1", "rank 2 ends with rank 1"]
    assert forks.seconds < 10


def test_ranks_in_different_calls_end(forks, work_dir):
    code, err = forks.run(["--gpus", 2], work_dir, job="tests.train.rank_jobs:out_of_step")
    assert code == 1 and forks.seconds < 10
    said = [f"rank {rank} ends, as the ranks are out of step" for rank in range(2)]
    assert sorted(err.splitlines()) == said


def test_losses_and_bpb_are_those_of_one_rank(train):
    """The first evaluation, of the same weights, to the bit."""
    flags = ["--num-iterations", 4, "--eval-every", 2, "--no-skip-initial-eval"]
    flags.remove("--no-skip-initial-eval")
    alone = train("w1", 1, *flags)
    for world in (2, 3):
        shared = train(f"w{world}", world, *flags)
        assert losses(shared) == pytest.approx(losses(alone), abs=1e-6)
        assert bpbs(shared) == pytest.approx(bpbs(alone), abs=1e-6)
        for record in records(shared):
            assert record["ranks"] == world and record["skew"] >= 1
            rate = record["tok_per_s_per_rank"]
            assert rate * world == pytest.approx(record["tok_per_s"])
        assert strangers(shared) == []


def test_another_number_of_ranks_goes_on(train, forks, work_dir, data_dir):
    whole = train("whole", 1, "--num-iterations", 6)
    for name, ranks in (("a", (1, 2, 3)), ("b", (3, 1, 2))):
        train(name, ranks[0], "--num-iterations", 6, "--save-every", 2, "--keep", 9)
        for step in (6, 4):  # as if it had been cut off after step 2
            folder = checkpoints(work_dir / "runs" / name)[step]
            folder.rename(work_dir / f"{name}-{step}")
        for world, stop in zip(ranks[1:], (4, 6), strict=True):
            args = ["--run", name, "--resume", "--gpus", world]
            assert forks.run(args, work_dir) == (0, "")
            if stop == 4:
                checkpoints(work_dir / "runs" / name)[6].rename(work_dir / f"{name}-6-{world}")
        assert losses(work_dir / "runs" / name) == pytest.approx(losses(whole), abs=1e-5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_once_and_the_run_goes_on(forks, train, data_dir, work_dir, number):
    directory = work_dir / "runs" / "a"
    args = [*TINY, "--data", data_dir, *BATCH, "--run", "a", "--gpus", 2, "--num-iterations", 300]
    code, err = forks.run(args, work_dir, number, 0.05, directory / "metrics.jsonl", 3)
    assert code == 128 + number
    (step,) = checkpoints(directory)
    assert err.startswith(
        f"stopped by {number.name} after step {step}; step {step} is saved; go on"
    )
    assert err.endswith("--run a --resume --gpus 2\n") and err.count("\n") == 1
    args = ["--run", "a", "--resume", "--gpus", 2, "--num-iterations", step + 2]
    assert forks.run(args, work_dir) == (0, "")
    assert list(losses(directory)) == list(range(1, step + 3))


def test_a_signal_to_one_rank_ends_all(forks, data_dir, work_dir):
    args = [*TINY, "--data", data_dir, *BATCH, "--run", "a", "--gpus", 2, "--num-iterations", 9]
    code, err = forks.run(args, work_dir, fault=("SIGTERM", 1, 3))
    assert code == 143 and err.startswith("stopped by SIGTERM after step 3; step 3 is saved")
    assert err.count("\n") == 1
