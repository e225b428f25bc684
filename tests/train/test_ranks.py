"""Several ranks train as one process does: the same rows, losses and evaluations."""

import shutil
import signal

import pytest
import torch

from nanofuse.kernels.common.jit import HAS_TRITON
from nanofuse.train.ranks import in_rounds
from nanofuse.train.run_folder import checkpoints
from tests.train.bundles import write_bundle
from tests.train.forks import Forks
from tests.train.tiny import TINY, losses, records, strangers

ARGS = [flag for flag in TINY if flag != "--skip-initial-eval"]
ARGS += ["--total-batch-size", 2 * 64 * 6, "--eval-tokens", 64 * 9]  # 6 micro-steps, 4.5 batches


@pytest.fixture(scope="module")
def forks():
    with Forks() as started:
        yield started


@pytest.fixture
def train(forks, data_dir, work_dir):
    """train(name, ranks, flags): the run's folder, after it ended well."""

    def run(name, ranks, *flags, **more):
        args = [*ARGS, "--data", data_dir, "--run", name, "--gpus", ranks, *flags]
        code, err = forks.run(args, work_dir, **more)
        assert (code, err) == (0, "")
        return work_dir / "runs" / name

    return run


def bpbs(directory):
    return {record["step"]: record["bpb"] for record in records(directory, "val")}


def cores(directory):
    return [(record["step"], record["tasks"]) for record in records(directory, "core")]


@pytest.mark.parametrize("world", [2, 3])
def test_the_methods(forks, work_dir, world):
    assert forks.run(["--gpus", world], work_dir, job="tests.train.rank_jobs:methods") == (0, "")


@pytest.mark.cpu
@pytest.mark.skipif(not HAS_TRITON, reason="the kernels need Triton")
def test_a_step_of_the_fused_pass(forks, work_dir):
    assert forks.run(["--gpus", 3], work_dir, job="tests.train.rank_jobs:fused") == (0, "")


def test_a_rank_that_fails_ends_all_with_its_line(forks, work_dir):
    code, err = forks.run(["--gpus", 3], work_dir, job="tests.train.rank_jobs:one_fails")
    lines = err.splitlines()
    assert code == 1 and lines[0] == "error: ValueError: of rank 1"
    assert sorted(lines[1:]) == ["rank 0 ends with rank 1", "rank 2 ends with rank 1"]
    assert forks.seconds < 10


def test_a_rank_that_is_done_waits_for_none_for_ever(forks, work_dir):
    job = "tests.train.rank_jobs:one_stays"
    assert forks.run(["--gpus", 2], work_dir, job=job) == (0, "")


def test_ranks_in_different_calls_end(forks, work_dir):
    code, err = forks.run(["--gpus", 2], work_dir, job="tests.train.rank_jobs:out_of_step")
    assert code == 1 and forks.seconds < 10
    said = [f"rank {rank} ends, as the ranks are out of step" for rank in range(2)]
    assert sorted(err.splitlines()) == said


def test_losses_and_figures_are_those_of_one_rank(train, work_dir):
    """Evaluations of the same weights, to the bit."""
    flags = ["--num-iterations", 4, "--eval-every", 2, "--core-every", 4, "--core-bundle", "core"]
    write_bundle(work_dir / "core")
    alone = train("w1", 1, *flags)
    for world in (2, 3):
        shared = train(f"w{world}", world, *flags)
        assert losses(shared) == pytest.approx(losses(alone), abs=1e-6)
        assert bpbs(shared)[0] == bpbs(alone)[0]
        assert bpbs(shared) == pytest.approx(bpbs(alone), abs=1e-6)
        assert cores(shared) == cores(alone) and [step for step, _ in cores(alone)] == [4]
        for record in records(shared):
            assert record["ranks"] == world and record["skew"] >= 1
            assert 0 < record["exposed_ms"] < record["ms_per_step"]
            rate = record["tok_per_s_per_rank"]
            assert rate * world == pytest.approx(record["tok_per_s"])
        assert strangers(shared) == []


def test_any_number_of_ranks_goes_on(train, forks, work_dir):
    """1, 2, 3 and 1 again; each but the last is asked to end."""
    whole, flags = train("whole", 1, "--num-iterations", 8), ["--num-iterations", 8]
    for world, step in ((1, 2), (2, 4), (3, 6)):
        args = [*ARGS, *flags] if step == 2 else ["--resume", "--device-batch-size", "auto"]
        args = [*args, "--data", work_dir.parent / "data", "--run", "a", "--gpus", world]
        code, err = forks.run(args, work_dir, fault=("SIGTERM", world - 1, step))
        assert code == 143 and f"step {step} is saved" in err
    assert forks.run(["--run", "a", "--resume", "--gpus", 1], work_dir) == (0, "")
    directory = work_dir / "runs" / "a"
    assert list(checkpoints(directory)) == [2, 4, 6, 8]
    assert losses(directory) == pytest.approx(losses(whole), abs=1e-5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_once_and_the_run_goes_on(forks, train, data_dir, work_dir, number):
    directory = work_dir / "runs" / "a"
    args = [*ARGS, "--data", data_dir, "--run", "a", "--gpus", 2, "--num-iterations", 300]
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


def test_a_signal_before_the_first_step_leaves_nothing(forks, data_dir, work_dir):
    args = [*ARGS, "--data", data_dir, "--run", "a", "--gpus", 2, "--num-iterations", 300]
    for after in (0.1, 0.3):
        code, err = forks.run(args, work_dir, signal.SIGTERM, after)
        lines = [line for line in err.splitlines() if "Gloo connectFullMesh" not in line]
        assert code == 143 and len(lines) <= 2 and "error:" not in err
        if "before the first step" in err:
            assert not (work_dir / "runs").exists()
        shutil.rmtree(work_dir / "runs", ignore_errors=True)


def test_a_signal_to_one_rank_ends_all(forks, data_dir, work_dir):
    args = [*ARGS, "--data", data_dir, "--run", "a", "--gpus", 2, "--num-iterations", 9]
    code, err = forks.run(args, work_dir, fault=("SIGTERM", 1, 3))
    assert code == 143 and err.startswith("stopped by SIGTERM after step 3; step 3 is saved")
    assert err.count("\n") == 1


@pytest.mark.parametrize("world", [2, 5])
def test_rounds_bring_every_tensor_where_it_belongs(world):
    """As all_to_all moves them: what goes to a rank in its n-th round comes in the n-th there."""
    generator = torch.Generator().manual_seed(world)
    sizes = torch.randint(0, 4, (world, world, 3), generator=generator)  # empty ones among them
    dtypes = torch.float32, torch.bfloat16, torch.int32
    sends, receives = [[] for _ in range(world)], [[] for _ in range(world)]
    for sender in range(world):
        for receiver in range(world):
            for size, dtype in zip(sizes[sender, receiver].tolist(), dtypes, strict=True):
                if sender != receiver:
                    x = torch.randint(99, (size, 2), generator=generator).to(dtype)
                    sends[sender].append((receiver, x))
                    receives[receiver].append((sender, torch.zeros_like(x)))
    rounds = [in_rounds(*pair, world) for pair in zip(sends, receives, strict=True)]
    assert {len(own) for own in rounds} == {3}
    for receiver, own in enumerate(rounds):
        for number, (coming, going) in enumerate(own):
            assert len(coming) == len(going) == world and not going[receiver].numel()
            for sender, x in enumerate(coming):
                if x.numel():
                    x.copy_(rounds[sender][number][1][receiver])
    sent = [(s, r, x) for s, pairs in enumerate(sends) for r, x in pairs]
    came = [(s, r, x) for r, pairs in enumerate(receives) for s, x in pairs]
    for (*_, x), (*_, y) in zip(sent, sorted(came, key=lambda each: each[:2]), strict=True):
        assert torch.equal(x, y)
    assert in_rounds([], [], world) == []
    assert len(in_rounds([], [(1, torch.empty(0))], world)) == 1  # the others wait for this rank
