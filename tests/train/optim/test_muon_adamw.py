import dataclasses
from functools import partial

import pytest
import torch

from nanofuse.train.errors import UserError
from nanofuse.train.optim.config import OptimConfig
from nanofuse.train.optim.muon_adamw import MuonAdamW
from nanofuse.train.optim.updates import EagerUpdate
from tests.helpers import random_model, small_config
from tests.train.optim.against_reference import (
    FIRST_STEPS,
    LR_SCALE,
    SIZES,
    assert_steps_of_the_reference,
)


def with_gradients(seed=0, **fields):
    """A model with random gradients."""
    model = random_model(small_config(**fields), torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    return model


def optimizer_of(model, **fields):
    return MuonAdamW(model.param_roles(), OptimConfig(**fields), model.config.n_embd)


def test_matrices_of_a_shape_share_a_stack():
    model = with_gradients()
    stacks = {stack.momentum.shape for stack in optimizer_of(model).stacks}
    assert stacks == {(16, 32, 32), (4, 128, 32), (4, 32, 128), (2, 2, 12)}


@pytest.mark.parametrize("fields", [{}, {"muon_plus": False, "muon_eq": "none"}])
def test_a_stack_updates_like_single_matrices(fields):
    """Stacking only batches: every matrix moves as it does alone."""
    model, lone = with_gradients(), with_gradients()
    optimizer_of(model, **fields).step(0.5, 0.9, 0.1)
    singles = dict(lone.named_parameters())
    for name, p in model.named_parameters():
        if not name.startswith("transformer.h."):
            continue
        alone = {"matrices": [(name, singles[name])]}
        MuonAdamW(alone, OptimConfig(**fields), 32).step(0.5, 0.9, 0.1)
        torch.testing.assert_close(p, singles[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift", range(len(SIZES)))
@pytest.mark.parametrize("muon_plus", [True, False])
@pytest.mark.parametrize("muon_eq", ["row", "col", "none"])
def test_steps_are_those_of_the_reference(muon_eq, muon_plus, shift):
    """Every group, with every tensor's gradients from zero to 1e4; warm-up and warm-down."""
    model = random_model(small_config(), torch.float32)
    config = OptimConfig(muon_eq=muon_eq, muon_plus=muon_plus)
    optimizer = MuonAdamW(model.param_roles(), config, model.config.n_embd, LR_SCALE)
    positions = (*FIRST_STEPS, 50, 90)
    assert_steps_of_the_reference(model, optimizer, shift, positions, 1e-5, "cpu")


def test_adamw_groups_are_the_recipes():
    """First step of AdamW is lr * sign(g) where nothing decays: reads off each group's lr."""
    model = with_gradients()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer_of(model, bigram_embedding_lr_mult=0.5).step()
    wide = (32 / 768) ** -0.5
    expected = {  # name: (lr, decay)
        "lm_head.weight": (0.008 * wide, 0.01),
        "transformer.wte.weight": (0.3 * wide, 0.001),
        "value_embeds.3.weight": (0.15 * wide, 0.01),
        "bigram_embed.weight": (0.15 * wide, 0.01),
        "resid_lambdas": (0.003, 0.05),
        "x0_lambdas": (0.3, 0.0),
        "smear_gate.weight": (0.2, 0.0),
        "backout_lambda": (0.2, 0.0),
        "bigram_lambdas": (0.004 * wide, 0.0),
    }
    after = dict(model.named_parameters())
    for name, (lr, decay) in expected.items():
        want = before[name] * (1 - lr * decay) - lr * grads[name].sign()
        torch.testing.assert_close(after[name].detach(), want, rtol=1e-4, atol=1e-4)


def test_a_role_without_rates_is_refused():
    """Its parameters would stay as they are, and nothing would show it."""
    roles = random_model(small_config()).param_roles()
    with pytest.raises(ValueError, match="no rates for other_embed"):
        MuonAdamW({**roles, "other_embed": roles["wte"]}, OptimConfig(), 32)


def test_lr_scale_multiplies_everything_but_smear_and_backout():
    a, b, c = with_gradients(), with_gradients(), with_gradients()
    optimizer_of(a).step(lr_mult=0.25)
    optimizer_of(c).step(lr_mult=1.0)
    scaled = MuonAdamW(b.param_roles(), OptimConfig(), 32, lr_scale=0.25)
    scaled.step(lr_mult=1.0)
    unscaled = {name for name, _ in a.param_roles()["smear_backout"]}
    assert unscaled == {"smear_gate.weight", "smear_lambda", "backout_lambda"}
    named = dict(b.named_parameters())
    for twin, names in ((c, unscaled), (a, named.keys() - unscaled)):
        theirs = dict(twin.named_parameters())
        assert all(torch.equal(theirs[name], named[name]) for name in names)


def test_state_restores_exactly():
    model, twin = with_gradients(), with_gradients()
    optimizer, restored = optimizer_of(model), optimizer_of(twin)
    for _ in range(2):
        optimizer.step(1.0, 0.9, 0.1)
    state = {name: t.clone() for name, t in optimizer.state_dict().items()}
    twin.load_state_dict(model.state_dict())
    restored.load_state_dict(state, optimizer.step_count)
    for o in (optimizer, restored):
        o.step(1.0, 0.95, 0.2)
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def test_state_of_another_model_is_refused_and_nothing_changes():
    optimizer = optimizer_of(with_gradients())
    other = optimizer_of(with_gradients(vocab_size=640))
    state = {name: x + 1 for name, x in other.state_dict().items()}
    with pytest.raises(UserError, match="another shape"):
        optimizer.load_state_dict(state, 5)
    assert optimizer.step_count == 0
    assert not any(x.any() for x in optimizer.state_dict().values())


def test_zero_grad_drops_gradients():
    model = with_gradients()
    optimizer_of(model).zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.cuda
def test_compiled_step_equals_eager_on_a_gpu():
    """Compiled updates against eager ones in fp64 arithmetic's stead: fp32 Newton-Schulz."""
    config = dataclasses.replace(small_config(), n_embd=256, n_head=2, n_kv_head=2)
    results = []
    for compiled in (False, True):
        model = random_model(config, torch.float32, device="cuda")
        generator = torch.Generator("cuda").manual_seed(0)
        update = partial(EagerUpdate, compile=compiled)
        optimizer = MuonAdamW(model.param_roles(), OptimConfig(), 256, update=update)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator, device="cuda")
            optimizer.step(1.0, 0.9, 0.1)
        results.append(list(model.parameters()))
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=2e-3, atol=2e-3)
