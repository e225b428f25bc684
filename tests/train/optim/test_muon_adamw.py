import dataclasses

import pytest
import torch

from nanofuse.model.gpt import GPT
from nanofuse.train.errors import UserError
from nanofuse.train.optim.config import OptimConfig
from nanofuse.train.optim.muon_adamw import MuonAdamW
from tests.helpers import random_model, small_config


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
    stacks = {key: len(params) for key, params in optimizer_of(model).stacks.items()}
    assert stacks == {"32x32": 16, "128x32": 4, "32x128": 4, "2x12": 2}


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
        "bigram_embed.weight": (0.15 * wide, 0.0),
        "resid_lambdas": (0.003, 0.05),
        "x0_lambdas": (0.3, 0.0),
        "smear_gate.weight": (0.2, 0.0),
        "backout_lambda": (0.2, 0.0),
        "bigram_lambdas": (0.01, 0.0),
    }
    after = dict(model.named_parameters())
    for name, (lr, decay) in expected.items():
        want = before[name] * (1 - lr * decay) - lr * grads[name].sign()
        torch.testing.assert_close(after[name].detach(), want, rtol=1e-4, atol=1e-4)


def test_betas_are_the_recipes():
    groups = OptimConfig().adamw_groups()
    betas = {role: group.betas for role, group in groups.items()}
    assert betas == {
        "lm_head": (0.8, 0.96),
        "wte": (0.8, 0.995),
        "value_embeds": (0.8, 0.995),
        "bigram_embed": (0.8, 0.995),
        "resid_lambdas": (0.8, 0.95),
        "x0_lambdas": (0.96, 0.95),
        "smear_backout": (0.8, 0.95),
        "bigram_lambdas": (0.8, 0.95),
    }
    assert OptimConfig().muon_beta2 == 0.9
    assert OptimConfig(scalar_lr=0.5).adamw_groups()["resid_lambdas"].lr == 0.005


def test_every_role_of_a_model_has_a_group():
    roles = set(GPT(small_config(), device="meta").param_roles())
    assert roles == {"matrices", *OptimConfig().adamw_groups()}


def test_lr_scale_multiplies_everything():
    a, b = with_gradients(), with_gradients()
    optimizer_of(a).step(lr_mult=0.25)
    scaled = MuonAdamW(b.param_roles(), OptimConfig(), 32, lr_scale=0.25)
    scaled.step(lr_mult=1.0)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


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
    for key in other.state:
        other.state[key] += 1
    with pytest.raises(UserError, match="another shape"):
        optimizer.load_state_dict(other.state_dict(), 5)
    assert optimizer.step_count == 0 and not any(t.any() for t in optimizer.state.values())


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
        optimizer = MuonAdamW(model.param_roles(), OptimConfig(), 256, compile=compiled)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator, device="cuda")
            optimizer.step(1.0, 0.9, 0.1)
        results.append(list(model.parameters()))
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=2e-3, atol=2e-3)
