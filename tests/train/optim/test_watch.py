"""Gradients that are not finite: seen, named, counted, and left out by both optimisers."""

import pytest
import torch

from nanofuse.bench.checks import ON_GPU
from nanofuse.model.config import GPTConfig
from nanofuse.model.fp8.products import PlainGemm
from nanofuse.model.fused import FusedGPT
from nanofuse.model.gpt import GPT
from nanofuse.train.assemble import fused_optimizer
from nanofuse.train.optim.config import OptimConfig
from nanofuse.train.optim.muon_adamw import MuonAdamW
from nanofuse.train.optim.watch import GradientWatch
from tests.helpers import random_model

DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.usefixtures("short_muon")
SIZES = {"sequence_len": 16, "vocab_size": 96, "bigram_embed_factor": 3}
BAD = ["lm_head.weight", "transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight", "x0_lambdas"]


def make(kind, **fields):
    """A small model and its optimiser."""
    config = GPTConfig.from_depth(2, 16, 16, **{**SIZES, **fields})
    model = random_model(config, torch.float32, device=DEVICE)
    optim = OptimConfig(on_nonfinite="skip")
    if kind == "eager":
        return model, MuonAdamW(model.param_roles(), optim, config.n_embd)
    twin = GPT(config, torch.float32, device=DEVICE)
    twin.load_state_dict(model.state_dict())
    return twin, fused_optimizer(FusedGPT(twin, PlainGemm()), optim)


def give_gradients(model, seed, bad=None, value=float("nan")):
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        g = torch.randn(p.shape, generator=generator).to(DEVICE)
        if name == bad:
            g.view(-1)[-1] = value
        if p.grad is None:
            p.grad = g
        else:
            p.grad.copy_(g)


def everything(model, optimizer):
    tensors = {**model.state_dict(), **optimizer.state_dict()}
    return {name: x.clone() for name, x in tensors.items()}


@pytest.mark.parametrize(
    ("kind", "bad", "fields"),
    [
        *(("eager", bad, {}) for bad in BAD),
        ("fused", BAD[0], {"n_kv_head": 1}),
        *(("fused", bad, {}) for bad in BAD[1:]),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing(kind, bad, fields):
    model, optimizer = make(kind, **fields)
    give_gradients(model, 0)
    optimizer.step(1.0, 0.9, 0.1)
    optimizer.zero_grad()
    before = everything(model, optimizer)
    for value in (float("nan"), float("inf")):
        give_gradients(model, 1, bad, value)
        optimizer.step(1.0, 0.9, 0.1)
        optimizer.zero_grad()
    after = everything(model, optimizer)
    assert all(torch.equal(before[name], after[name]) for name in before)
    found = optimizer.watch.read()
    assert (found.nonfinite_steps, found.first_step, found.names) == (2, 2, (bad,))
    assert not found.norm < float("inf")
    for p in model.parameters():
        assert p.grad is None or not p.grad.any()
    give_gradients(model, 2)  # and training goes on
    optimizer.step(1.0, 0.9, 0.1)
    again = everything(model, optimizer)
    assert any(not torch.equal(before[name], again[name]) for name in before)
    assert all(x.isfinite().all() for x in again.values())


@pytest.mark.parametrize("kind", ["eager", "fused"])
def test_the_norm_is_that_of_all_gradients(kind):
    model, optimizer = make(kind)
    give_gradients(model, 0)
    expected = torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm().item()
    optimizer.step(1.0, 0.9, 0.1)
    found = optimizer.watch.read()
    assert found.norm == pytest.approx(expected, rel=1e-5)
    assert (found.nonfinite_steps, found.first_step, found.names) == (0, 0, ())


def test_the_first_step_is_kept_until_it_is_forgotten():
    watch = GradientWatch(["a", "b", "c", "d", "e"], DEVICE)

    def take(values, step):
        watch.take(torch.tensor(values, device=DEVICE), step)

    nan = float("nan")
    take([1.0, 1.0, 1.0, 1.0, 1.0], 1)
    assert watch.ok.item() == 1
    take([nan, 1.0, nan, nan, nan], 2)
    assert watch.ok.item() == 0
    take([1.0, nan, 1.0, 1.0, 1.0], 3)
    found = watch.read()
    assert (found.nonfinite_steps, found.first_step, found.names) == (2, 2, ("a", "c", "d"))
    watch.forget()
    take([1.0, nan, 1.0, 1.0, 1.0], 4)
    found = watch.read()
    assert (found.nonfinite_steps, found.first_step, found.names) == (3, 4, ("b",))
