"""Gradients, losses and weights that are not finite: seen, named, never saved."""

import json
import math

import pytest
import torch

from nanofuse.model import fused
from nanofuse.train.checkpoint import load_tensors
from nanofuse.train.errors import UserError
from nanofuse.train.loop import Trainer
from nanofuse.train.run import main
from nanofuse.train.run_folder import find_checkpoint, load_meta, run_dir

SMALL = (
    "--depth 2 --aspect-ratio 16 --head-dim 16 --max-seq-len 64 --device-batch-size 2 "
    "--total-batch-size 256 --num-iterations 8 --eval-tokens 512 --eval-every -1 "
    "--sample-every -1 --skip-initial-eval --warmup-steps 0 --seed 3"
).split()


@pytest.fixture
def train(data_dir, work_dir):
    def run(name, *flags):
        main([*SMALL, "--data", str(data_dir), "--run", name, *flags])
        return records(name)

    return run


def records(name):
    lines = (run_dir(name) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


@pytest.fixture
def spoil(monkeypatch):
    """spoil(steps, names): gradients of those steps (from 1) become NaN in these parameters."""

    def spoiled(steps, names):
        taken = Trainer.train_step

        def train_step(self):
            update = self.optimizer.step

            def step(*args):
                if self.progress.step + 1 in steps:
                    for name, p in self.raw_model.named_parameters():
                        if name in names:
                            p.grad.view(-1)[0] = float("nan")
                return update(*args)

            self.optimizer.step = step
            try:
                return taken(self)
            finally:
                self.optimizer.step = update

        monkeypatch.setattr(Trainer, "train_step", train_step)

    return spoiled


def test_stop_names_step_and_tensors_and_keeps_the_checkpoint_before(train, spoil):
    spoil({4}, {"lm_head.weight", "x0_lambdas"})
    with pytest.raises(UserError, match=r"step 4 are not finite \(.*\); --resume") as stop:
        train("a", "--save-every", "3", "--train-log-every", "6")
    assert "lm_head.weight" in str(stop.value) and "x0_lambdas" in str(stop.value)
    assert load_meta(find_checkpoint(run_dir("a")))["step"] == 3


def test_stop_comes_before_a_checkpoint_and_within_a_window(train, spoil):
    spoil({4}, {"lm_head.weight"})
    with pytest.raises(UserError, match="step 4 are not finite"):
        train("a", "--save-every", "5", "--train-log-every", "100")
    with pytest.raises(UserError, match="no checkpoint"):
        find_checkpoint(run_dir("a"))


def test_the_last_step_is_looked_at(train, spoil):
    spoil({8}, {"lm_head.weight"})
    with pytest.raises(UserError, match="step 8 are not finite"):
        train("a", "--train-log-every", "100")


def test_skip_leaves_the_steps_out_counts_and_finishes(train, spoil, capsys):
    spoil({3, 4}, {"transformer.wte.weight"})
    found = train("a", "--on-nonfinite", "skip", "--train-log-every", "2")
    steps = {r["step"]: r for r in found if r["kind"] == "train"}
    assert [steps[i]["nonfinite_steps"] for i in (2, 4, 6, 8)] == [0, 2, 2, 2]
    assert steps[4]["grad_norm"] is None and steps[6]["grad_norm"] > 0
    said = capsys.readouterr().out
    assert "2 steps so far" in said and "transformer.wte.weight" in said
    weights = load_tensors(find_checkpoint(run_dir("a")) / "model.safetensors")
    assert all(x.isfinite().all() for x in weights.values())


def test_skip_and_no_bad_step_is_the_same_run(train):
    first, second = train("a"), train("b", "--on-nonfinite", "skip")
    losses = [[r["loss"] for r in found if r["kind"] == "train"] for found in (first, second)]
    assert losses[0] == losses[1]


def test_weights_that_are_not_finite_are_not_saved(train, monkeypatch):
    """Finite gradients may still end in weights that are not."""
    taken = Trainer.train_step

    def train_step(self):
        loss = taken(self)
        if self.progress.step == 8:
            with torch.no_grad():
                self.raw_model.lm_head.weight[0, 0] = math.inf
        return loss

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(UserError, match="weights are not finite after step 8 .lm_head.weight"):
        train("a", "--save-every", "4")
    assert load_meta(find_checkpoint(run_dir("a")))["step"] == 4


def test_gradient_norm_is_logged(train):
    found = [r for r in train("a", "--train-log-every", "1") if r["kind"] == "train"]
    assert len(found) == 8 and all(r["grad_norm"] > 0 for r in found)


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_under_cuda_graphs_in_fp8(train, spoil, monkeypatch, mode):
    """The graphs are recorded after five steps; the seventh is spoiled."""
    recorded = []
    record = fused.GraphedPass

    def counted(*args):
        recorded.append(args)
        return record(*args)

    monkeypatch.setattr(fused, "GraphedPass", counted)
    spoil({7}, {"lm_head.weight"})
    flags = "--head-dim 32 --aspect-ratio 64 --backend fused --fp8 auto --num-iterations 10".split()
    flags += ["--on-nonfinite", mode, "--train-log-every", "1"]
    if mode == "stop":
        with pytest.raises(UserError, match=r"step 7 are not finite \(lm_head.weight\)"):
            train("a", *flags)
        assert len(recorded) == 1
        return
    steps = [r for r in train("a", *flags) if r["kind"] == "train"]
    assert len(recorded) == 1
    assert [r["nonfinite_steps"] for r in steps] == [0] * 6 + [1] * 4
    assert [r["grad_norm"] is None for r in steps] == [i == 6 for i in range(10)]
    assert all(r["loss"] is not None for r in steps)
