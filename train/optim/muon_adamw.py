"""The combined optimiser: Muon for the matrices inside the blocks, AdamW for everything else.

`MuonAdamW` owns what both need: the groups, their hyperparameters, the state and its names in a
checkpoint, the watch over the gradients, the count of steps. How the numbers are computed is an
update's business (updates.py), which sees `Table`s and `Stack`s and no model.
"""

from dataclasses import dataclass

import torch

from nanofuse.kernels.adamw import AdamWHyper
from nanofuse.kernels.muon_update import second_moment_shape
from nanofuse.train.errors import UserError
from nanofuse.train.optim.config import ADAMW_EPS
from nanofuse.train.optim.updates import EagerUpdate, Numbers
from nanofuse.train.optim.watch import GradientWatch


@dataclass(frozen=True)
class Table:
    """A tensor that AdamW updates, with its moments and an AdamWHyper."""

    name: str
    param: torch.Tensor
    exp_avg: torch.Tensor  # param's shape
    exp_avg_sq: torch.Tensor  # param's shape
    hyper: AdamWHyper

    @property
    def grad(self):
        return self.param.grad


class Stack:
    """N matrices of one shape that Muon updates together, with their momentum and second moment.

    Args:
        params: parameters (R, C), in the order of the stack.
        values, grads: (N, R, C), where parameters and gradients are views of one tensor each.
    """

    def __init__(self, params, values=None, grads=None):
        self.params, self._values, self._grads = params, values, grads
        shape = (len(params), *params[0].shape)
        self.momentum = params[0].new_zeros(shape, requires_grad=False)
        self.second = params[0].new_zeros(second_moment_shape(shape), requires_grad=False)

    @property
    def in_place(self):
        """Whether `gather` gives the matrices and gradients themselves. They may lie apart, as
        autograd leaves them, or between each other, as q, k and v of grouped heads."""
        return self._values is not None and self._values.is_contiguous()

    def gather(self):
        """Matrices and gradients, (N, R, C) each, contiguous: themselves or copies."""
        if self._values is None:
            return torch.stack(self.params), torch.stack([p.grad for p in self.params])
        return self._values.contiguous(), self._grads.contiguous()

    def scatter(
        self,
        values,  # (N, R, C), of `gather`, updated
    ):
        """Write the updated matrices back where they were copied from."""
        if self._values is None:
            torch._foreach_copy_(self.params, list(values.unbind()))
        elif not self.in_place:
            self._values.copy_(values)

    def clear(self):
        """Set the gradients to zero where they lie."""
        if self._grads is None:
            torch._foreach_zero_([p.grad for p in self.params])
        else:
            self._grads.zero_()


class MuonAdamW:
    """Muon + AdamW over the parameters of a GPT.

    Args:
        roles: {role: [(name, parameter)]}, GPT.param_roles.
        config: OptimConfig.
        width: C of the model, for the width scaling of AdamW's learning rates.
        lr_scale: the batch's factor on learning rates, of all groups that it scales.
        update: update(tables, stacks, parameters, config) makes an update of updates.py.
        stored: [(parameters, matrices (N, R, C), gradients (N, R, C))] of matrices that lie
            together, Weights.stacks; None: those of one shape are stacked for each step.

    Attributes:
        step_count: steps so far; it travels in the checkpoint's meta.
        watch: GradientWatch of every step's gradients.
        tables, stacks: the Tables and Stacks.
    """

    def __init__(self, roles, config, width, lr_scale=1.0, update=EagerUpdate, stored=None):
        self.config, self.lr_scale = config, lr_scale
        self.step_count = 0
        self.tables = []
        for role, group in config.adamw_groups().items():
            lr = group.lr_at(width, lr_scale)
            hyper = AdamWHyper(lr, *group.betas, ADAMW_EPS, group.weight_decay)
            for name, p in roles.get(role, []):
                moments = [torch.zeros_like(p, requires_grad=False) for _ in range(2)]
                self.tables.append(Table(name, p, *moments, hyper))
        self.matrices = [p for _, p in roles["matrices"]]
        if stored is None:
            by_shape = {}
            for p in self.matrices:
                by_shape.setdefault(p.shape, []).append(p)
            stored = [(params,) for params in by_shape.values()]
        self.stacks = [Stack(*each) for each in stored]
        named = dict(member for members in roles.values() for member in members)
        self.parameters = list(named.values())
        self.watch = GradientWatch(named, self.parameters[0].device)
        self.update = update(self.tables, self.stacks, self.parameters, config)

    @torch.no_grad()
    def step(self, lr_mult=1.0, momentum=0.95, weight_decay=0.0):
        """Update every parameter from its .grad. `watch` has seen a step whose gradients are not
        all finite; the update says where such a step changes nothing else.

        Args:
            lr_mult: the schedule's multiplier on every learning rate.
            momentum: Muon's momentum.
            weight_decay: Muon's decoupled decay, already scaled and scheduled.
        """
        self.step_count += 1
        self.watch.take(self.update.squares(), self.step_count)
        matrix_lr = self.config.matrix_lr * self.lr_scale * lr_mult
        numbers = Numbers(self.step_count, lr_mult, matrix_lr, momentum, weight_decay)
        self.update(numbers, self.watch.ok)
        # kernels and views have written the parameters, which torch has not seen
        torch.autograd.graph.increment_version(self.parameters)

    def zero_grad(self):
        """Drop every gradient, unless the update has cleared it where it lies."""
        if not self.update.clears:
            for p in self.parameters:
                p.grad = None

    def _tensors(self):
        """The state by name, {name: tensor or [views of its matrices]}: "lm_head.weight.exp_avg",
        and "muon.RxC.momentum" of all matrices of a shape in the model's order."""
        named = {}
        for table in self.tables:
            named[f"{table.name}.exp_avg"] = table.exp_avg
            named[f"{table.name}.exp_avg_sq"] = table.exp_avg_sq
        place = {p: (stack, i) for stack in self.stacks for i, p in enumerate(stack.params)}
        for p in self.matrices:
            stack, i = place[p]
            key = f"muon.{p.size(0)}x{p.size(1)}"
            named.setdefault(f"{key}.momentum", []).append(stack.momentum[i])
            named.setdefault(f"{key}.second", []).append(stack.second[i])
        return named

    def state_dict(self):
        """All state as a flat {name: tensor}, whatever the update."""
        tensors = self._tensors().items()
        return {name: torch.stack(x) if isinstance(x, list) else x for name, x in tensors}

    @torch.no_grad()
    def load_state_dict(self, tensors, step_count):
        """Restore what `state_dict` gave, of any update.

        Raises:
            UserError: names or shapes of another model; nothing has changed.
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
