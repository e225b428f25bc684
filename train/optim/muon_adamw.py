"""The combined optimiser: Muon for the matrices inside the blocks, AdamW for everything else.

Matrices of one shape are stacked and updated together; the state is kept per stack (Muon) and per
tensor (AdamW). The update formulas are kernels/muon_update.py and kernels/adamw.py.
"""

from dataclasses import dataclass

import torch

from kernels.adamw import adamw_ref
from kernels.muon_update import muon_update_ref, second_moment_shape
from model.errors import UserError

ADAMW_EPS = 1e-10
RECOMPILE_LIMIT = 64  # a compiled update has one graph per parameter shape; torch's limit is 8
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


class MuonAdamW:
    """Muon + AdamW over the parameters of a GPT.

    Args:
        roles: {role: [(name, parameter)]}, GPT.param_roles.
        config: OptimConfig.
        width: C of the model, for the width scaling of AdamW's learning rates.
        lr_scale: factor on every learning rate (batch scaling).
        compile: run the updates through torch.compile.
        newton_schulz_dtype: dtype of Muon's matrix products.
    """

    def __init__(
        self,
        roles,
        config,
        width,
        lr_scale=1.0,
        compile=False,
        newton_schulz_dtype=torch.float32,
    ):
        self.config, self.lr_scale = config, lr_scale
        self.newton_schulz_dtype = newton_schulz_dtype
        self.step_count = 0
        self.adamw = [
            (name, p, group, group.lr_at(width))
            for role, group in config.adamw_groups().items()
            for name, p in roles.get(role, [])
        ]
        self.stacks = {}  # "RxC" -> parameters of that shape, in model order
        for _, p in roles["matrices"]:
            self.stacks.setdefault(f"{p.size(0)}x{p.size(1)}", []).append(p)
        self.state = {}
        for name, p, *_ in self.adamw:
            self.state[f"{name}.exp_avg"] = torch.zeros_like(p, requires_grad=False)
            self.state[f"{name}.exp_avg_sq"] = torch.zeros_like(p, requires_grad=False)
        for key, params in self.stacks.items():
            shape = (len(params), *params[0].shape)
            moment = second_moment_shape(shape)
            self.state[f"muon.{key}.momentum"] = params[0].new_zeros(shape, requires_grad=False)
            self.state[f"muon.{key}.second"] = params[0].new_zeros(moment, requires_grad=False)
        self._adamw_update, self._muon_update = adamw_ref, muon_update_ref
        if compile:
            torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
            self._adamw_update = torch.compile(adamw_ref, dynamic=False, fullgraph=True)
            self._muon_update = torch.compile(muon_update_ref, dynamic=False, fullgraph=True)

    @torch.no_grad()
    def step(self, lr_mult=1.0, momentum=0.95, weight_decay=0.0):
        """Update every parameter from its .grad.

        Args:
            lr_mult: the schedule's multiplier on every learning rate.
            momentum: Muon's momentum.
            weight_decay: Muon's decoupled decay, already scaled and scheduled.
        """
        self.step_count += 1
        lr_mult = lr_mult * self.lr_scale
        # 0-d CPU tensors, so that a compiled update does not specialise on changing numbers
        count = torch.tensor(float(self.step_count))
        for name, p, group, lr in self.adamw:
            self._adamw_update(
                p,
                p.grad,
                self.state[f"{name}.exp_avg"],
                self.state[f"{name}.exp_avg_sq"],
                torch.tensor(lr * lr_mult),
                *group.betas,
                ADAMW_EPS,
                group.weight_decay,
                count,
            )
        scalars = [torch.tensor(x) for x in (self.config.matrix_lr * lr_mult, momentum)]
        for key, params in self.stacks.items():
            stacked = torch.stack(params)  # (N, R, C)
            self._muon_update(
                stacked,
                torch.stack([p.grad for p in params]),
                self.state[f"muon.{key}.momentum"],
                self.state[f"muon.{key}.second"],
                *scalars,
                torch.tensor(weight_decay),
                self.config.muon_beta2,
                self.config.muon_eq,
                self.config.muon_plus,
                self.newton_schulz_dtype,
            )
            torch._foreach_copy_(params, list(stacked.unbind()))

    def zero_grad(self):
        """Drop every gradient."""
        for p in [p for _, p, *_ in self.adamw] + [p for ps in self.stacks.values() for p in ps]:
            p.grad = None

    def state_dict(self):
        """All state as a flat {name: tensor}; step_count travels in the checkpoint's meta."""
        return dict(self.state)

    @torch.no_grad()
    def load_state_dict(self, tensors, step_count):
        """Restore what state_dict gave.

        Raises:
            UserError: names or shapes of another model.
        """
        for name, mine in self.state.items():
            if name not in tensors or tensors[name].shape != mine.shape:
                raise UserError(f"optimiser state {name!r} is missing or of another shape")
        for name, mine in self.state.items():
            mine.copy_(tensors[name])
        self.step_count = step_count
