"""The hyperparameters of every role, as docs/recipe.md has them."""

import pytest

from nanofuse.model.gpt import GPT
from nanofuse.train.optim.config import ADAMW_EPS, OptimConfig
from tests.helpers import ranges, small_config

GROUPS = {  # role: lr at widths 768 and 3072 and a batch scale of 0.5, betas, decay
    "lm_head": (0.004, 0.002, (0.8, 0.96), 0.01),
    "wte": (0.15, 0.075, (0.8, 0.995), 0.001),
    "value_embeds": (0.075, 0.0375, (0.8, 0.995), 0.01),
    "bigram_embed": (0.15, 0.075, (0.75, 0.95), 0.01),
    "bigram_lambdas": (0.002, 0.001, (0.9, 0.95), 0.0),
    "resid_lambdas": (0.0015, 0.0015, (0.8, 0.95), 0.05),
    "x0_lambdas": (0.15, 0.15, (0.96, 0.95), 0.0),
    "smear_backout": (0.2, 0.2, (0.8, 0.95), 0.0),
}


@pytest.mark.parametrize("role", GROUPS)
def test_groups_are_the_recipes(role):
    group = OptimConfig().adamw_groups()[role]
    narrow, wide, betas, decay = GROUPS[role]
    assert group.lr_at(768, 0.5) == pytest.approx(narrow)
    assert group.lr_at(3072, 0.5) == pytest.approx(wide)
    assert (group.betas, group.weight_decay) == (betas, decay)


def test_every_role_of_a_model_has_a_group():
    roles = set(GPT(small_config(), device="meta").param_roles())
    assert roles == {"matrices", *OptimConfig().adamw_groups()} == {"matrices", *GROUPS}


def test_muon_is_the_recipes():
    config = OptimConfig()
    assert (config.matrix_lr, config.weight_decay, config.muon_beta2) == (0.02, 0.28, 0.9)
    assert (config.muon_eq, config.muon_plus) == ("row", True)
    assert ADAMW_EPS == 1e-10


def test_defaults_and_bounds_move_on_purpose_only():
    assert ranges(OptimConfig) == {
        "embedding_lr": (0.3, 0, 1e30),
        "unembedding_lr": (0.008, 0, 1e30),
        "matrix_lr": (0.02, 0, 1e30),
        "scalar_lr": (0.3, 0, 1e30),
        "weight_decay": (0.28, 0, 1e30),
        "bigram_embedding_lr_mult": (1.0, 0, 1e6),
        "bigram_lambda_lr": (0.004, 0, 1e30),
        "muon_plus": (True, None, None),
        "muon_eq": ("row", None, None),
        "on_nonfinite": ("stop", None, None),
    }


@pytest.mark.parametrize(
    ("flag", "rates"),
    [
        ("embedding_lr", {"wte": 4.0, "value_embeds": 2.0, "bigram_embed": 4.0}),
        ("bigram_embedding_lr_mult", {"bigram_embed": 1.2}),
        ("unembedding_lr", {"lm_head": 4.0}),
        ("scalar_lr", {"resid_lambdas": 0.04, "x0_lambdas": 4.0}),
        ("bigram_lambda_lr", {"bigram_lambdas": 4.0}),
    ],
)
def test_each_rate_has_its_roles(flag, rates):
    default, groups = OptimConfig().adamw_groups(), OptimConfig(**{flag: 4.0}).adamw_groups()
    for role, group in groups.items():
        assert group.lr == pytest.approx(rates.get(role, default[role].lr)), role
