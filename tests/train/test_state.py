"""What a checkpoint holds beside the weights goes between backends, in any order, or is refused."""

from types import SimpleNamespace

import pytest
import torch

from nanofuse.bench.checks import ON_GPU
from nanofuse.kernels.common.fp8 import FP8Operand
from nanofuse.model.config import GPTConfig
from nanofuse.model.fp8.products import PlainGemm, TorchGemm
from nanofuse.model.fused import FusedGPT
from nanofuse.train.assemble import fused_optimizer
from nanofuse.train.errors import UserError
from nanofuse.train.optim.config import OptimConfig
from nanofuse.train.optim.muon_adamw import MuonAdamW
from nanofuse.train.state import load_training_state, training_state
from tests.helpers import random_model

DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.usefixtures("short_muon")


def make(kind, seed=0):
    """(what is called, GPT, optimiser) of a backend: "eager", "fused" or "fp8"."""
    config = GPTConfig.from_depth(1, 32, 32, sequence_len=16, vocab_size=64)
    model = random_model(config, torch.float32, seed, DEVICE)
    if kind == "eager":
        return model, model, MuonAdamW(model.param_roles(), OptimConfig(), config.n_embd)
    fused = FusedGPT(model, TorchGemm() if kind == "fp8" else PlainGemm())
    return fused, model, fused_optimizer(fused, OptimConfig())


def step(called, model, optimizer, seed=0):
    """An optimiser's step from random gradients, after a pass whose maxima are made up."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        g = torch.randn(p.shape, generator=generator).to(DEVICE)
        p.grad = g if p.grad is None else p.grad.copy_(g)
    if isinstance(called, FusedGPT):
        called.operands.follow()
        called.operands.recorded = True
        if called.precision.gemm.fp8:
            called.precision.scaling.amax.clamp_min_(1.0 + seed)
    optimizer.step(1.0, 0.9, 0.1)


def everything(called, model, optimizer):
    """Weights, state and operands, as integers of their bits."""
    tensors = {**model.state_dict(), **training_state(called, optimizer)}
    if isinstance(called, FusedGPT):
        for weight in called.weights.all():
            x = weight.operand
            tensors[weight.name] = x.data if isinstance(x, FP8Operand) else x
    return {name: x.clone().reshape(-1).view(torch.uint8) for name, x in tensors.items()}


@pytest.mark.parametrize("weights_first", [True, False])
@pytest.mark.parametrize("kind", ["eager", "fused", "fp8"])
def test_a_state_restores_exactly_before_or_after_the_weights(kind, weights_first):
    one, other = make(kind), make(kind, seed=1)
    step(*one)
    step(*other, seed=1)
    state = {name: x.clone() for name, x in training_state(one[0], one[2]).items()}
    if weights_first:
        other[1].load_state_dict(one[1].state_dict())
    load_training_state(other[0], other[2], state, 1)
    if not weights_first:
        other[1].load_state_dict(one[1].state_dict())
    for seed in (2, None):
        a, b = everything(*one), everything(*other)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        if seed:
            step(*one, seed=seed)
            step(*other, seed=seed)


@pytest.mark.parametrize("reader", ["eager", "fused", "fp8"])
@pytest.mark.parametrize("writer", ["eager", "fused", "fp8"])
def test_every_backend_reads_every_other_ones(writer, reader):
    """Without scales fresh ones come up, as in a model just made; scales nobody wants are left."""
    written, read, fresh = make(writer), make(reader, seed=1), make(reader)
    step(*written)
    step(*read, seed=1)
    state = training_state(written[0], written[2])
    load_training_state(read[0], read[2], state, 1)
    for one in (read, fresh):
        one[1].load_state_dict(written[1].state_dict())
    got = training_state(read[0], read[2])
    for name, x in training_state(fresh[0], fresh[2]).items():
        assert torch.equal(got[name], state[name] if name in state else x), name
    assert read[2].step_count == 1


def test_damage_is_named_and_nothing_changes():
    one, other = make("fp8"), make("fp8", seed=1)
    step(*one)
    state = training_state(one[0], one[2])
    before = everything(*other)
    broken = {
        "lm_head.weight.exp_avg": (None, "optimiser state 'lm_head.weight.exp_avg'"),
        "muon.32x32.momentum": (state["muon.32x32.momentum"][1:], "'muon.32x32.momentum'"),
        "fp8.history": (state["fp8.history"][:, 1:], "FP8 scale 'history'"),
        "fp8.updates": (None, "FP8 scale 'updates'"),
    }
    for name, (value, message) in broken.items():
        damaged = {k: x for k, x in (state | {name: value}).items() if x is not None}
        with pytest.raises(UserError, match=f"{message} is missing or of another shape"):
            load_training_state(other[0], other[2], damaged, 1)
    after = everything(*other)
    assert other[2].step_count == 0 and all(torch.equal(before[k], after[k]) for k in before)


def test_maxima_of_a_step_left_out_do_not_reach_the_scales():
    """From the watch over the gradients to the scales, as assembled."""
    called, model, optimizer = make("fp8")
    step(called, model, optimizer)
    before = everything(called, model, optimizer)
    called.operands.recorded = True
    called.precision.scaling.amax.fill_(float("inf"))
    model.x0_lambdas.grad.fill_(float("nan"))
    optimizer.step(1.0, 0.9, 0.1)
    after = everything(called, model, optimizer)
    assert not torch.equal(before.pop("fp8.updates"), after["fp8.updates"])
    assert all(torch.equal(x, after[name]) for name, x in before.items())


@pytest.mark.parametrize("main", [True, False])
def test_every_rank_makes_the_scales_and_one_saves_them(main):
    """Operands that are older than the weights are made anew by all ranks at once, or by none."""
    asked = []

    def state_dict():
        asked.append(True)
        return {"scale": torch.ones(1)}

    model = FusedGPT.__new__(FusedGPT)
    torch.nn.Module.__init__(model)
    model.operands = SimpleNamespace(state_dict=state_dict)
    optimizer = SimpleNamespace(ranks=SimpleNamespace(main=main), state_dict=dict)
    assert training_state(model, optimizer).keys() == ({"fp8.scale"} if main else set())
    assert asked == [True]
