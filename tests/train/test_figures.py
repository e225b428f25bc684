"""The figures of a window of steps and of a run, from trainers that are made up."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanofuse.model.fused import FusedGPT
from nanofuse.train.figures import Crew, summary, window_figures
from nanofuse.train.progress import Progress


class Clipping(FusedGPT):
    """A fused model, as far as the figures ask it."""

    def __init__(self, clipped):
        torch.nn.Module.__init__(self)
        self.clipped = clipped

    def fp8_clipped(self):
        return self.clipped

    def lse_range(self):
        return 1.5, math.inf


def times(**fields):
    """The loop's times, as far as the figures ask them."""
    known = {"steady_seconds": 6.0, "steady_steps": 3, "first_step_seconds": 9.0}
    return SimpleNamespace(**{**known, "steady_joules": None, **fields})


def make(**fields):
    progress = Progress(5, 7.0004, 6.5, 1.25, 4, 1.2, 3.0, 0.271, 1)
    return SimpleNamespace(**{
        "progress": progress,
        "plan": SimpleNamespace(total_batch_size=1000),
        "schedule": SimpleNamespace(lr=lambda step: step / 8),
        "state": SimpleNamespace(epoch=2),
        "model": None,
        "peak_flops": None,
        "raw_model": SimpleNamespace(config=SimpleNamespace(flops_per_token=3e9)),
        "times": times(),
        "phases": {"imports": 2.0, "evaluation": 1.5},
        "device": torch.device("cpu"),
        "directory": Path("runs/d4"),
        "ranks": SimpleNamespace(world=1, collect=lambda thing: [thing]),
        **fields,
    })  # fmt: skip


ALONE = Crew(1, 1.0, 0.0, None)
FOUND = SimpleNamespace(norm=0.12345, nonfinite_steps=4)


def test_a_window():
    values, status = window_figures(make(), 2.5, FOUND, 0.25, ALONE)
    assert values == pytest.approx({
        "loss": 2.5, "loss_ema": 2.71, "grad_norm": 0.12345, "nonfinite_steps": 4, "lr_mult": 0.5,
        "ms_per_step": 250.0, "tok_per_s": 4000.0, "epoch": 2, "train_seconds": 7.0004,
    })  # fmt: skip
    assert status == (
        "loss 2.7100 (step 2.5000)  |g| 0.123  lr x0.500  epoch 2  250.0 ms/step  4,000 tok/s"
    )


def test_what_is_not_finite_is_not_logged():
    found = SimpleNamespace(norm=math.inf, nonfinite_steps=1)
    values, status = window_figures(make(), math.nan, found, 1.0, ALONE)
    assert values["loss"] is None and values["grad_norm"] is None and "step nan" in status


def test_share_of_the_peak_and_clipped_tensors():
    values, status = window_figures(
        make(peak_flops=24e12, model=Clipping(7)), 2.5, FOUND, 0.25, ALONE
    )
    assert values["mfu"] == 0.5 and status.endswith("  MFU 50.0 % of 24 TFLOP/s")
    assert values["fp8_clipped"] == 7
    assert (values["lse_min"], values["lse_max"]) == (1.5, None)
    assert (
        "fp8_clipped" not in window_figures(make(model=Clipping(None)), 2.5, FOUND, 0.25, ALONE)[0]
    )


def test_several_ranks():
    crew = Crew.of([(1.0, 0.5, 2**30), (3.0, 0.125, 3 * 2**30), (2.0, 0.25, None)], 5)
    assert crew == Crew(3, 1.5, 25.0, 3.0)
    assert Crew.of([(0.0, 0.0, None)], 1) == ALONE
    values, status = window_figures(make(peak_flops=8e12), 2.5, FOUND, 0.25, crew)
    figures = "ranks", "skew", "exposed_ms", "peak_gib"
    assert [values[name] for name in figures] == [3, 1.5, 25.0, 3.0]
    assert values["tok_per_s_per_rank"] == pytest.approx(4000 / 3) and values["mfu"] == 0.5
    assert "4,000 tok/s on 3 ranks, skew 1.500, exposed 25.0 ms  MFU 50.0 %" in status


def test_a_summary():
    found = summary(make())
    assert found.pop("loss_ema") == pytest.approx(2.71)
    assert found == {
        "run": "d4", "ranks": 1, "steps": 5, "tokens": 5000, "loss": 3.0,
        "val_bpb": 1.25, "best_bpb": 1.2,
        "train_seconds": 7.0, "train_seconds_nanochat": 6.5, "ms_per_step": 2000.0,
        "time_to_first_step_s": 9.0, "first_evaluation_s": 1.5,
        "start_seconds": {"imports": 2.0, "evaluation": 1.5}, "peak_gib": None,
        "reserved_gib": None,
    }  # fmt: skip
    assert summary(make(times=times(steady_joules=6.0)))["joules_per_million_tokens"] == 2000.0
    ranks = SimpleNamespace(world=2, collect=lambda thing: [thing, 9.0])
    assert (
        summary(make(times=times(steady_joules=6.0), ranks=ranks))["joules_per_million_tokens"]
        == 5000.0
    )
    assert "joules_per_million_tokens" not in summary(make(ranks=ranks))
    assert summary(make(times=times(steady_steps=0)))["ms_per_step"] is None
