"""A rank that fails, dies or hangs ends all ranks: by one decision where there can be one."""

import pytest

from nanofuse.train.run_folder import checkpoints
from tests.train.forks import Forks
from tests.train.tiny import TINY, records, strangers


@pytest.fixture(scope="module")
def forks():
    with Forks() as started:
        yield started


@pytest.fixture
def train(forks, data_dir, work_dir):
    """train(fault, flags): exit code, lines of stderr, steps saved."""

    def run(fault, *flags, ranks=2):
        args = [*TINY, "--data", data_dir, "--run", "a", "--gpus", ranks, "--num-iterations", 6]
        code, err = forks.run([*args, *flags], work_dir, fault=fault)
        directory = work_dir / "runs" / "a"
        assert forks.seconds < 25
        assert not directory.exists() or strangers(directory) in ([], [".lock"])
        return code, err.splitlines(), list(checkpoints(directory))

    return run


GO_ON = "; step 2 is saved; go on with python -m train.run --run a --resume --gpus 2"
TOGETHER = [
    ("error", 1, "rank 1: RuntimeError: out of luck (NANOFUSE_DEBUG=1 shows where)"),
    ("memory", 2, "rank 1: --device-batch-size 2 does not fit in the memory of CPU: 0.0 GiB were "
     "expected; 1 should fit (the total batch stays the same)"),
    ("data", 2, "rank 1: shard: Input/output error"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "code", "said"), TOGETHER, ids=lambda x: str(x)[:8])
def test_all_save_the_last_whole_step(train, kind, code, said):
    assert train((kind, 1, 3)) == (code, [f"error: {said}{GO_ON}", "rank 0 ends with rank 1"], [2])


def test_an_error_of_rank_0(train):
    code, lines, saved = train(("error", 0, 3))
    assert code == 1 and saved == [2] and lines[1:] == ["rank 1 ends with rank 0"]
    assert lines[0].startswith("error: RuntimeError: out of luck")


def test_an_error_in_an_evaluation(train):
    code, lines, saved = train(("evaluation", 1, 0), "--eval-every", 2)
    assert code == 1 and saved == [2] and lines[1:] == ["rank 0 ends with rank 1"]
    assert lines[0].startswith("error: rank 1: RuntimeError: no sums")


def test_a_save_that_fails(train):
    code, lines, saved = train(("disk", 1, 0), "--save-every", 2)
    assert (code, saved) == (2, []) and lines[1:] == ["rank 1 ends with rank 0"]
    assert "step_000002 cannot be saved" in lines[0]


def test_an_update_that_one_rank_cannot_make_is_not_saved(train):
    code, lines, saved = train(("update", 1, 3), "--save-every", 1)
    assert code == 1 and saved == [1, 2]
    assert lines[0].startswith("error: rank 1: RuntimeError: no update")
    assert len(lines) == 2 and lines[1].startswith("rank 0 ends with rank 1; ")


def test_gradients_that_are_not_finite_stop_all(train):
    code, lines, saved = train(("nan", 1, 3), "--save-every", 2)
    assert code == 2 and saved == [2] and lines[1:] == ["rank 1 ends with rank 0"]
    assert lines[0].startswith("error: gradients of step 3 are not finite (lm_head.weight)")


def test_gradients_that_are_not_finite_are_left_out_by_all(train, work_dir):
    assert train(("nan", 1, 3), "--on-nonfinite", "skip") == (0, [], [6])
    found = [record["nonfinite_steps"] for record in records(work_dir / "runs" / "a")]
    assert found == [0, 0, 1, 1, 1, 1]


def test_a_killed_rank(train):
    code, lines, saved = train(("SIGKILL", 1, 3), "--save-every", 2)
    assert code == 1 and saved == [2]
    assert lines[0] == "error: rank 1 was killed by SIGKILL; the system may be short of memory"
    assert len(lines) == 2 and lines[1].startswith("rank 0 ends, as another one is gone")
    assert lines[1].endswith("; go on with python -m train.run --run a --resume --gpus 2")


@pytest.mark.parametrize("place", ["the start", "an evaluation", "a save"])
def test_a_rank_that_is_killed_elsewhere(train, place):
    """Nothing half written is left, and nobody waits."""
    flags = ["--save-every", 2, "--eval-every", 2]
    code, lines, saved = train((f"SIGKILL in {place}", 1, 0), *flags)
    assert code == 1 and saved == ([2] if place == "an evaluation" else [])
    assert lines[0] == "error: rank 1 was killed by SIGKILL; the system may be short of memory"
    assert len(lines) == 2 and lines[1].startswith("rank 0 ends, as another one is gone")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank(train, rank):
    """Rank 0 has the store with it, so that nobody can leave a word there."""
    code, lines, saved = train(("SIGSTOP", rank, 3), "--save-every", 2)
    assert code == 1 and saved == [2]
    assert lines[0] == f"error: rank {rank} gives no sign of life for 3 s"
    assert len(lines) <= 3 and not any(line.startswith("error") for line in lines[1:])


def test_a_hanging_rank(train):
    code, lines, saved = train(("hang", 1, 3), "--save-every", 2)
    assert code == 1 and saved == [2] and len(lines) == 2
    assert lines[0].startswith("error: rank 1 hangs since 3 s, in faulty (forks.py:")
    assert lines[1].startswith("rank 0 ends with rank 1")
