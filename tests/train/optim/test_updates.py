"""The kernels' update against the eager one: the same numbers, the same state, interchangeable."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from nanofuse.bench.checks import ON_GPU
from nanofuse.model import graphs
from nanofuse.model.config import GPTConfig
from nanofuse.model.fp8.products import PlainGemm
from nanofuse.model.fused import FusedGPT
from nanofuse.model.gpt import GPT
from nanofuse.train.assemble import fused_optimizer
from nanofuse.train.optim.config import OptimConfig
from nanofuse.train.optim.muon_adamw import MuonAdamW
from nanofuse.train.optim.updates import EagerUpdate, KernelUpdate
from tests.helpers import random_model
from tests.train.optim.against_reference import LR_SCALE, assert_steps_of_the_reference

DEVICE = "cuda" if ON_GPU else "cpu"  # on a GPU Newton-Schulz runs in fp16
WEIGHTS_ERROR, STATE_ERROR = (1e-3, 2e-2) if ON_GPU else (1e-4, 1e-4)
# of Muon in fp16, with rows on both sides of its floor: 5.3e-2 at most on an H200
CHANGE_ERROR = 8e-2 if ON_GPU else 1e-4
NUMBERS = [(1.0, 0.9, 0.2), (0.5, 0.95, 0.1)]  # lr_mult, momentum, weight decay of each step


def twins(**fields):
    """The same random weights twice: (GPT, eager MuonAdamW) and (FusedGPT, its MuonAdamW)."""
    sizes = {"sequence_len": 32, "vocab_size": 128, "bigram_embed_factor": 3}
    config = GPTConfig.from_depth(2, 16, 16, **{**sizes, **fields})
    truth = random_model(config, torch.float32, device=DEVICE)
    model = GPT(config, torch.float32, device=DEVICE)
    model.load_state_dict(truth.state_dict())
    fused = FusedGPT(model, PlainGemm())
    plain = MuonAdamW(truth.param_roles(), OptimConfig(), config.n_embd, lr_scale=0.5)
    return (truth, plain), (fused, fused_optimizer(fused, OptimConfig(), lr_scale=0.5))


def give_gradients(truth, model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p, q in zip(truth.parameters(), model.parameters(), strict=True):
        p.grad = torch.randn(p.shape, generator=generator).to(DEVICE)
        q.grad.copy_(p.grad)


def steps(truth, plain, fused, ours, count=2, first=0):
    for i, numbers in list(enumerate(NUMBERS))[first : first + count]:
        give_gradients(truth, fused.model, i)
        plain.step(*numbers)
        plain.zero_grad()
        ours.step(*numbers)
        ours.zero_grad()


def relative(x, truth):
    return (x - truth).norm() / truth.norm().clamp_min(1e-30)


def assert_same_weights(truth, model):
    for (name, p), q in zip(truth.named_parameters(), model.parameters(), strict=True):
        assert relative(q, p) < WEIGHTS_ERROR, name


@pytest.mark.parametrize("fields", [{}, {"n_kv_head": 1}, {"bigram_embed_factor": 0}], ids=str)
def test_two_steps_equal_the_reference(fields):
    (truth, plain), (fused, ours) = twins(**fields)
    before = [p.detach().clone() for p in truth.parameters()]
    steps(truth, plain, fused, ours)
    assert all((p != b).any() for p, b in zip(truth.parameters(), before, strict=True))
    assert_same_weights(truth, fused.model)
    assert all(p.grad.abs().max() == 0 for p in fused.model.parameters())
    fused.operands.follow()
    for weight in fused.weights.all():
        assert torch.equal(weight.operand, weight.master)
    state, expected = ours.state_dict(), plain.state_dict()
    assert state.keys() == expected.keys()
    for name, x in expected.items():
        assert relative(state[name], x) < STATE_ERROR, name


@pytest.mark.parametrize(
    ("muon_eq", "muon_plus", "shift", "positions"),
    [
        ("row", True, 0, (0, 1, 2, 50)),
        ("row", False, 3, (0, 50)),
        ("col", True, 1, (0, 50)),
        ("col", False, 2, (0, 50)),
        ("none", True, 4, (0, 50)),
        ("none", False, 5, (0, 50)),
    ],
)
def test_steps_are_those_of_the_reference(muon_eq, muon_plus, shift, positions):
    """Every group, with every tensor's gradients from zero to 1e4."""
    _, (fused, _) = twins()
    config = OptimConfig(muon_eq=muon_eq, muon_plus=muon_plus)
    optimizer = fused_optimizer(fused, config, LR_SCALE)
    arguments = shift, positions, CHANGE_ERROR, DEVICE
    assert_steps_of_the_reference(fused.model, optimizer, *arguments)


@pytest.mark.parametrize("fields", [{}, {"n_kv_head": 1}], ids=str)
def test_state_moves_between_both(fields):
    (truth, plain), (fused, ours) = twins(**fields)
    steps(truth, plain, fused, ours, 1)
    (other, reference), (again, mine) = twins(**fields)
    other.load_state_dict(truth.state_dict())
    again.model.load_state_dict(truth.state_dict())
    reference.load_state_dict(ours.state_dict(), 1)  # from the kernels' to the reference
    mine.load_state_dict(plain.state_dict(), 1)  # and back
    steps(other, reference, again, mine, 1, first=1)
    give_gradients(truth, fused.model, 1)
    plain.step(*NUMBERS[1])
    assert_same_weights(truth, other)
    assert_same_weights(truth, again.model)


@pytest.mark.parametrize("fields", [{}, {"n_kv_head": 1}], ids=str)
def test_each_update_takes_matrices_as_they_lie(fields):
    """Apart, together, and between each other; where it clears gradients they are zero."""
    (truth, plain), (fused, _) = twins(**fields)
    (_, _), (again, _) = twins(**fields)
    width = truth.config.n_embd
    roles, config = fused.model.param_roles(), OptimConfig()
    in_place = MuonAdamW(roles, config, width, 0.5, EagerUpdate, fused.weights.stacks)
    apart = MuonAdamW(again.model.param_roles(), config, width, 0.5, KernelUpdate)
    steps(truth, plain, fused, in_place, 1)
    give_gradients(truth, again.model, 0)
    apart.step(*NUMBERS[0])
    apart.zero_grad()
    assert_same_weights(truth, fused.model)
    assert_same_weights(truth, again.model)
    assert all(p.grad is None for p in fused.model.parameters())
    assert not any(p.grad.any() for p in again.model.parameters())


def test_torch_hears_of_every_change():
    """By kernels and through views; operands that follow the weights rely on it."""
    (truth, plain), (fused, ours) = twins(n_kv_head=1)
    for model, optimizer in ((truth, plain), (fused.model, ours)):
        before = [p._version for p in model.parameters()]
        give_gradients(truth, fused.model, 0)
        optimizer.step(*NUMBERS[0])
        after = [p._version for p in model.parameters()]
        assert all(a > b for a, b in zip(after, before, strict=True))


@pytest.fixture
def pool(monkeypatch):
    """Memory for the graphs of an update; on a CPU a replay calls what was recorded once more."""
    if ON_GPU:
        return torch.cuda.graph_pool_handle()
    again = lambda function, pool: (SimpleNamespace(replay=function), None)  # noqa: E731
    monkeypatch.setattr(graphs, "captured", again)
    return (0, 1)


@pytest.mark.parametrize("fields", [{}, {"n_kv_head": 1}], ids=str)
def test_a_recorded_update_takes_every_steps_numbers(fields, pool):
    """Bit for bit as each kernel by itself, and so is a step that is left out."""
    found = []
    for update in (KernelUpdate, partial(KernelUpdate, pool=pool)):
        (truth, _), (fused, _) = twins(**fields)
        model, width = fused.model, fused.model.config.n_embd
        stored = fused.weights.stacks
        ours = MuonAdamW(model.param_roles(), OptimConfig(), width, 0.5, update, stored)
        taken = []
        for step in range(5):
            give_gradients(truth, model, step)
            if step == 3:
                next(model.parameters()).grad.fill_(float("nan"))
            ours.step(*NUMBERS[step % 2])
            ours.zero_grad()
            taken.append(ours.watch.ok.item())
        assert taken == [1, 1, 1, 0, 1]
        assert (ours.update.graphed.graph is not None) == (update is not KernelUpdate)
        found.append([*model.parameters(), *ours.state_dict().values()])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_a_recorded_update_refuses_gradients_that_moved(pool):
    (truth, _), (fused, _) = twins()
    update, stored = partial(KernelUpdate, pool=pool), fused.weights.stacks
    roles, width = fused.model.param_roles(), fused.model.config.n_embd
    ours = MuonAdamW(roles, OptimConfig(), width, 0.5, update, stored)
    for _ in range(3):
        give_gradients(truth, fused.model, 0)
        ours.step(*NUMBERS[0])
        ours.zero_grad()
    moved = fused.model.transformer.wte.weight
    moved.grad = moved.grad.clone()
    with pytest.raises(ValueError, match="not the registered gradient"):
        ours.step(*NUMBERS[0])
