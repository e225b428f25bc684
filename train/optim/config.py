"""Learning rates, betas and decays of every role, and Muon's options."""

from dataclasses import dataclass

ADAMW_EPS = 1e-10
REFERENCE_WIDTH = 768  # AdamW's matrix learning rates are tuned at this width


@dataclass(frozen=True)
class AdamWGroup:
    """Hyperparameters of one AdamW role; `width_scaled` multiplies lr by sqrt(768 / C)."""

    lr: float
    betas: tuple
    weight_decay: float
    width_scaled: bool = False

    def lr_at(self, width):
        """Learning rate of a model of this width, before schedule and batch scaling."""
        return self.lr * (width / REFERENCE_WIDTH) ** -0.5 if self.width_scaled else self.lr


@dataclass(frozen=True)
class OptimConfig:
    """Learning rates and Muon options; defaults are recipe.md's."""

    embedding_lr: float = 0.3
    unembedding_lr: float = 0.008
    matrix_lr: float = 0.02
    scalar_lr: float = 0.3
    weight_decay: float = 0.28
    bigram_embedding_lr_mult: float = 1.0
    bigram_lambda_lr: float = 0.01
    muon_plus: bool = True
    muon_eq: str = "row"
    muon_beta2: float = 0.9

    def adamw_groups(self):
        """AdamW hyperparameters by role (the roles of GPT.param_roles but "matrices")."""
        return {
            "lm_head": AdamWGroup(self.unembedding_lr, (0.8, 0.96), 0.01, True),
            "wte": AdamWGroup(self.embedding_lr, (0.8, 0.995), 0.001, True),
            "value_embeds": AdamWGroup(self.embedding_lr * 0.5, (0.8, 0.995), 0.01, True),
            "bigram_embed": AdamWGroup(
                self.embedding_lr * self.bigram_embedding_lr_mult, (0.8, 0.995), 0.0, True
            ),
            "resid_lambdas": AdamWGroup(self.scalar_lr * 0.01, (0.8, 0.95), 0.05),
            "x0_lambdas": AdamWGroup(self.scalar_lr, (0.96, 0.95), 0.0),
            "smear_backout": AdamWGroup(0.2, (0.8, 0.95), 0.0),
            "bigram_lambdas": AdamWGroup(self.bigram_lambda_lr, (0.8, 0.95), 0.0),
        }
