"""--device-batch-size auto: what is chosen, tried, kept with the run and found again."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nanofuse.train import run, trial
from nanofuse.train.device import select_fp8, select_machine
from nanofuse.train.errors import UserError
from nanofuse.train.plan import make_plan
from nanofuse.train.ranks import Alone
from nanofuse.train.run_folder import load_meta, run_dir
from nanofuse.train.settings import resolve
from nanofuse.train.start import Start
from tests.train.tiny import TINY, losses

SMALL = {"depth": 1, "aspect_ratio": 32, "head_dim": 16, "max_seq_len": 64, "vocab_size": 300}


@pytest.fixture
def free(monkeypatch):
    """Sets the bytes that are free."""
    return lambda count: monkeypatch.setattr(trial, "free_memory", lambda device: count)


def a_start(rows, world=1):
    """A Start of a batch of 64 rows, whose rows were found out."""
    given = {**SMALL, "device_batch_size": rows, "total_batch_size": 64 * 64}
    settings, machine = resolve(given, "cpu"), select_machine("cpu", "eager")
    config = settings.model.config()
    fp8 = select_fp8("off", machine, config, rows)
    plan, ranks = make_plan(settings, config), Alone()
    ranks.world = world
    return Start(settings, machine, None, None, config, fp8, plan, None, ranks, [], True)


def test_the_rows_that_are_expected_to_fit(free):
    start = a_start(1)
    estimate, rest = start.estimate, (start.config, start.machine, "off")

    def chosen(world=1, total=None):
        found = trial.choose_rows(start.settings, *rest, world, total)
        assert found.replace({"device_batch_size": 1}) == start.settings
        return found.horizon.device_batch_size

    free(estimate(16))
    assert chosen() == 16
    free(estimate(16) - 1)
    assert chosen() == 8
    free(None)
    assert (chosen(), chosen(4), chosen(total=64 * 6)) == (64, 16, 2)
    free(estimate(1) - 1)
    with pytest.raises(UserError, match="auto: one row of 64 tokens is expected to take 0.0 GiB"):
        chosen()


def test_a_trial_runs_what_takes_memory(monkeypatch):
    """Passes, updates, an evaluation; nothing but a lack of memory means that it does not fit."""
    start, called = a_start(2), []
    real = trial.assemble

    def watched(*args, **kwargs):
        built = real(*args, **kwargs)
        step, forward = built.optimizer.step, built.model.forward

        def noted(tokens, targets, reduction="mean"):
            called.append((tuple(tokens.shape), built.model.training, torch.is_grad_enabled()))
            return forward(tokens, targets, reduction)

        def stepped(*args):
            assert built.model.lm_head.weight.grad.any()
            called.append("step")
            return step(*args)

        built.model.forward, built.optimizer.step = noted, stepped
        return built

    monkeypatch.setattr(trial, "assemble", watched)
    monkeypatch.setattr(trial, "TRIAL_STEPS", 1)
    known = start.settings, start.config, start.machine, start.fp8
    assert trial.fits(*known)
    assert called == [((2, 64), True, True), "step", ((2, 64), False, False)]
    for error, lacks in (
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (MemoryError(), True),
        (RuntimeError("another"), False),
    ):

        def failing(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(trial, "assemble", failing)
        if lacks:
            assert not trial.fits(*known)
        else:
            with pytest.raises(RuntimeError, match="another"):
                trial.fits(*known)


def test_a_trial_loads_no_compiler(monkeypatch):
    """torch loads its compiler when it is first asked for it, which takes seconds."""
    machine, called = SimpleNamespace(device=torch.device("cuda")), []
    monkeypatch.setattr(trial, "_train", lambda *args: None)
    monkeypatch.setattr(torch, "_dynamo", None, raising=False)  # what asks for it fails
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    assert trial.fits(None, None, machine, None)
    compiler = SimpleNamespace(reset=lambda: called.append("reset"))
    monkeypatch.setitem(sys.modules, "torch._dynamo", compiler)
    assert trial.fits(None, None, machine, None) and called == ["reset"]


@pytest.fixture
def gpu(monkeypatch):
    """settle(start, most): settle_rows where so many rows fit on a GPU, and the rows tried."""
    for name in ("max_memory_reserved", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    monkeypatch.setattr(trial, "memory_of", lambda device: 4 * 2**30)
    monkeypatch.setattr("nanofuse.train.memory.memory_of", lambda device: 4 * 2**30)

    def settle(start, most):
        tried = []

        def fits(settings, *rest):
            tried.append(settings.horizon.device_batch_size)
            return tried[-1] <= most

        monkeypatch.setattr(trial, "fits", fits)
        machine = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, backend="x")
        fp8 = SimpleNamespace(name="off")
        monkeypatch.setattr(trial, "select_products", lambda *args: fp8)
        return trial.settle_rows(replace(start, machine=machine, fp8=fp8)), tried

    return settle


def test_what_does_not_fit_is_halved(gpu, capsys):
    before = a_start(32)
    start, tried = gpu(before, 8)
    assert tried == [32, 16, 8]
    assert start.settings == before.settings.replace({"device_batch_size": 8})
    assert start.plan == make_plan(start.settings, start.config)
    assert start.plan.micro_steps == 8 and before.plan.micro_steps == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "batch: 32 rows do not fit in a trial; half of them is tried"
    assert lines[2] == "batch: 8 rows, auto: 0.0 of 4.0 GiB expected; 1.0 in a trial"
    assert gpu(before, 32)[1] == [32]
    with pytest.raises(UserError, match="--device-batch-size 1 does not fit .* lower --depth"):
        gpu(before, 0)
    given = replace(before, auto_rows=False)
    assert gpu(given, 1)[1] == []


def test_a_run_keeps_its_rows_and_goes_on_with_them(data_dir, work_dir, free, capsys):
    at = TINY.index("--device-batch-size")
    args = [*TINY[:at], *TINY[at + 2 :], "--data", str(data_dir)]
    auto = ["--device-batch-size", "auto"]
    free(None)  # the batch of 256 tokens is 4 rows
    run.main([*args, "--run", "a", "--num-iterations", "2", *auto])
    out = capsys.readouterr().out
    assert "batch: 4 rows, auto: 0.0 of " in out and "1 micro-steps of 4 rows" in out
    saved = load_meta(run_dir("a") / "step_000002")["settings"]
    assert saved["device_batch_size"] == 4
    run.main(["--run", "a", "--resume", "--num-iterations", "3"])
    out = capsys.readouterr().out
    assert "rows, auto" not in out and "1 micro-steps of 4 rows" in out
    few = a_start(1).estimate(2)
    free(few)
    run.main(["--run", "a", "--resume", "--num-iterations", "4", *auto])
    assert "2 rows, auto" in (out := capsys.readouterr().out) and "2 micro-steps of 2 rows" in out
    run.main([*args, "--run", "b", "--num-iterations", "2", "--device-batch-size", "4"])
    first = losses(run_dir("a"))
    assert {step: first[step] for step in (1, 2)} == losses(run_dir("b"))
    assert sorted(first) == [1, 2, 3, 4]
    free(0)
    with pytest.raises(UserError, match="--device-batch-size auto: one row"):
        run.main([*args, "--run", "c", *auto])
    assert not run_dir("c").exists()
