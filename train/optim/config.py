"""Learning rates, betas and decays of every role, and Muon's options."""

from dataclasses import dataclass

from nanofuse.model.option import option

ADAMW_EPS = 1e-10
MAX_RATE = 1e30  # finite in fp32 after every factor
STATE = "the optimiser's state was made with it"  # why a resumed run keeps a value
EQUILIBRATIONS = ("row", "col", "none")  # kernels/newton_schulz.py's
REFERENCE_WIDTH = 768  # AdamW's matrix learning rates are tuned at this width


@dataclass(frozen=True)
class AdamWGroup:
    """Hyperparameters of one AdamW role; `width_scaled` multiplies lr by sqrt(768 / C),
    `batch_scaled` by the batch's factor."""

    lr: float
    betas: tuple[float, float]
    weight_decay: float
    width_scaled: bool = False
    batch_scaled: bool = True

    def lr_at(self, width: int, lr_scale: float) -> float:
        """Learning rate of a model of this width, before the schedule, where the batch's factor is
        `lr_scale`."""
        lr = self.lr * lr_scale if self.batch_scaled else self.lr
        return lr * (width / REFERENCE_WIDTH) ** -0.5 if self.width_scaled else lr


@dataclass(frozen=True)
class OptimConfig:
    """Learning rates and Muon's options; defaults are those of docs/recipe.md."""

    embedding_lr: float = option(
        0.3, "AdamW, token embedding (value embeddings: half)", least=0, most=MAX_RATE
    )
    unembedding_lr: float = option(0.008, "AdamW, lm_head", least=0, most=MAX_RATE)
    matrix_lr: float = option(0.02, "Muon, matrices inside the blocks", least=0, most=MAX_RATE)
    scalar_lr: float = option(
        0.3, "AdamW, x0 lambdas (residual lambdas: a hundredth)", least=0, most=MAX_RATE
    )
    weight_decay: float = option(
        0.28, "Muon's cautious decay, before scaling", least=0, most=MAX_RATE
    )
    bigram_embedding_lr_mult: float = option(
        1.0, "bigram table: times --embedding-lr", least=0, most=1e6
    )
    bigram_lambda_lr: float = option(0.004, "AdamW, bigram lambdas", least=0, most=MAX_RATE)
    muon_plus: bool = option(
        True, "rescale Muon's update to norm sqrt(min(rows, cols))", fixed=STATE
    )
    muon_eq: str = option(
        "row", "equilibration before Muon's iteration", EQUILIBRATIONS, fixed=STATE
    )
    on_nonfinite: str = option(
        "stop",
        "gradients that are NaN or infinite: end the run, or leave the step's update out",
        ("stop", "skip"),
        since="0.2",
    )
    muon_beta2: float = 0.9  # of the variance reduction

    def adamw_groups(self) -> dict[str, AdamWGroup]:
        """AdamW hyperparameters by role (the roles of GPT.param_roles but "matrices")."""
        return {
            "lm_head": AdamWGroup(self.unembedding_lr, (0.8, 0.96), 0.01, True),
            "wte": AdamWGroup(self.embedding_lr, (0.8, 0.995), 0.001, True),
            "value_embeds": AdamWGroup(self.embedding_lr * 0.5, (0.8, 0.995), 0.01, True),
            "bigram_embed": AdamWGroup(
                self.embedding_lr * self.bigram_embedding_lr_mult, (0.75, 0.95), 0.01, True
            ),
            "resid_lambdas": AdamWGroup(self.scalar_lr * 0.01, (0.8, 0.95), 0.05),
            "x0_lambdas": AdamWGroup(self.scalar_lr, (0.96, 0.95), 0.0),
            "smear_backout": AdamWGroup(0.2, (0.8, 0.95), 0.0, batch_scaled=False),
            "bigram_lambdas": AdamWGroup(self.bigram_lambda_lr, (0.9, 0.95), 0.0, True),
        }
