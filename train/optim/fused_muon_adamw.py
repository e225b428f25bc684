"""The combined optimiser on the kernels, for a FusedGPT: what train/optim/muon_adamw.py computes.

Muon updates the stacks of model.weights in place, AdamW all other tensors in one launch per pair of
dtypes; both clear the gradients as they read them. State has the names and shapes of MuonAdamW's,
so checkpoints serve both.
"""

import torch

from nanofuse.kernels.adamw import AdamWHyper, AdamWTensors, adamw, adamw_schedule
from nanofuse.kernels.gradient_squares import GradientSquares
from nanofuse.kernels.muon_update import muon_hyper, muon_update, second_moment_shape
from nanofuse.train.errors import UserError
from nanofuse.train.optim.config import ADAMW_EPS
from nanofuse.train.optim.watch import GradientWatch


class FusedMuonAdamW:
    """Muon + AdamW over the parameters of a FusedGPT.

    Args:
        fused: model.fused.FusedGPT.
        config: train.optim.config.OptimConfig.
        lr_scale: the batch's factor on learning rates, of all groups that it scales.
    """

    def __init__(self, fused, config, lr_scale=1.0):
        self.fused, self.config, self.lr_scale = fused, config, lr_scale
        self.step_count = 0
        model = fused.model
        self.device = model.lm_head.weight.device
        roles = model.param_roles()
        self.adamw_state = {}  # name -> (exp_avg, exp_avg_sq)
        params, hypers = [], []
        for role, group in config.adamw_groups().items():
            for name, p in roles.get(role, []):
                self.adamw_state[name] = tuple(torch.zeros_like(p.detach()) for _ in range(2))
                lr = group.lr_at(model.config.n_embd, lr_scale)
                hypers.append(AdamWHyper(lr, *group.betas, ADAMW_EPS, group.weight_decay))
                params.append(p)
        self.adamw_tensors = AdamWTensors(
            params, [p.grad for p in params], *zip(*self.adamw_state.values(), strict=True), hypers
        )
        named = dict(model.named_parameters())
        self.parameters = list(named.values())
        self.watch = GradientWatch(named, self.device)
        self.squares = GradientSquares([p.grad for p in named.values()])
        self.muon_state = []  # of each stack: momentum (N, R, C) and second moment
        for _, values, _ in fused.weights.stacks:
            moment = second_moment_shape(values.shape)
            self.muon_state.append(
                [torch.zeros(shape, device=self.device) for shape in (values.shape, moment)]
            )

    @torch.no_grad()
    def step(self, lr_mult=1.0, momentum=0.95, weight_decay=0.0):
        """Update every parameter from its .grad, which is cleared. A step whose gradients are not
        all finite changes nothing else; `watch` has seen it.

        Args:
            lr_mult: the schedule's multiplier on every learning rate.
            momentum: Muon's momentum.
            weight_decay: Muon's decoupled decay, already scaled and scheduled.
        """
        self.step_count += 1
        self.watch.take(self.squares(), self.step_count)
        take = self.watch.ok
        adamw(
            self.adamw_tensors,
            adamw_schedule(lr_mult, self.step_count, self.device),
            clear_grad=True,
            take=take,
        )
        matrix_lr = self.config.matrix_lr * self.lr_scale * lr_mult
        hyper = muon_hyper(matrix_lr, momentum, weight_decay, self.device)
        options = self.config.muon_beta2, self.config.muon_eq, self.config.muon_plus
        for (_, values, grads), state in zip(
            self.fused.weights.stacks, self.muon_state, strict=True
        ):
            if values.is_contiguous():
                muon_update(values, grads, *state, hyper, *options, clear_grad=True, take=take)
            else:  # q, k and v of grouped heads lie between each other
                stacked = values.contiguous()
                muon_update(stacked, grads.contiguous(), *state, hyper, *options, take=take)
                values.copy_(stacked)
                grads.zero_()
        torch.autograd.graph.increment_version(self.parameters)  # kernels and views wrote them

    def zero_grad(self):
        """Nothing to do: `step` clears the gradients while it reads them."""

    def _tensors(self):
        """The state under MuonAdamW's names, in views of this one's: {name: [tensors of a row]}."""
        named = {}
        for name, moments in self.adamw_state.items():
            for kind, tensor in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
                named[f"{name}.{kind}"] = tensor
        position = {}
        for (params, _, _), state in zip(self.fused.weights.stacks, self.muon_state, strict=True):
            for i, p in enumerate(params):
                position[p] = [x[i] for x in state]
        matrices = [p for _, p in self.fused.model.param_roles()["matrices"]]
        for p in matrices:  # model order, as MuonAdamW stacks them
            for kind, view in zip(("momentum", "second"), position[p], strict=True):
                named.setdefault(f"muon.{p.size(0)}x{p.size(1)}.{kind}", []).append(view)
        return named

    def state_dict(self):
        """All state as a flat {name: tensor}; step_count travels in the checkpoint's meta."""
        return {
            name: torch.stack(x) if isinstance(x, list) else x
            for name, x in self._tensors().items()
        }

    @torch.no_grad()
    def load_state_dict(self, tensors, step_count):
        """Restore what state_dict gave, here or in MuonAdamW.

        Raises:
            UserError: names or shapes of another model.
        """
        mine = self._tensors()
        for name, x in mine.items():
            shape = (len(x), *x[0].shape) if isinstance(x, list) else x.shape
            if name not in tensors or tensors[name].shape != shape:
                raise UserError(f"optimiser state {name!r} is missing or of another shape")
        for name, x in mine.items():
            if isinstance(x, list):
                for view, value in zip(x, tensors[name], strict=True):
                    view.copy_(value)
            else:
                x.copy_(tensors[name])
        self.step_count = step_count
