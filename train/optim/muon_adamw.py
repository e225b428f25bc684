"""The combined optimiser: Muon for the matrices inside the blocks, AdamW for everything else.

`MuonAdamW` owns what both need: the groups, their hyperparameters, the state and its names in a
checkpoint, the watch over the gradients, the count of steps. How the numbers are computed is an
update's business (updates.py), which sees `Table`s and `Stack`s and no model.
"""

import collections
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from nanofuse.kernels.adamw import AdamWHyper
from nanofuse.kernels.muon_update import second_moment_shape
from nanofuse.train.errors import UserError
from nanofuse.train.optim.config import ADAMW_EPS
from nanofuse.train.optim.sharing import Owned, Sharing
from nanofuse.train.optim.updates import EagerUpdate, Numbers
from nanofuse.train.optim.watch import GradientWatch
from nanofuse.train.placement import is_small, matrix_owners, table_rows
from nanofuse.train.ranks import ALONE


@dataclass(frozen=True)
class Share:
    """Rows of a parameter, or all of it, that this rank updates, with their gradient."""

    param: torch.Tensor
    rows: slice | None = None  # None: all
    common: bool = True  # every rank updates it alike

    @property
    def value(self):
        return self.param if self.rows is None else self.param.detach()[self.rows]

    @property
    def grad(self):
        grad = self.param.grad
        return grad if self.rows is None else grad[self.rows]


@dataclass(frozen=True)
class Table:
    """What AdamW updates of a parameter, with its moments and an AdamWHyper."""

    name: str
    share: Share
    exp_avg: torch.Tensor  # share's shape
    exp_avg_sq: torch.Tensor  # share's shape
    hyper: AdamWHyper

    @property
    def param(self):
        return self.share.value

    @property
    def grad(self):
        return self.share.grad


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


def stacks_of_a_shape(params, world):
    """[(parameters, None, None, owners)] of matrices that lie apart, those of one shape together
    and those of one owner in a row; nobody's are those that every rank updates."""
    by_shape = {}
    for p in params:
        by_shape.setdefault(tuple(p.shape), []).append(p)
    large = [shape for shape in by_shape if not is_small(shape)]
    dealt = matrix_owners([(len(by_shape[shape]), [shape]) for shape in large], world)
    owners = dict(zip(large, dealt, strict=True))
    stored = []
    for shape, group in by_shape.items():
        mine = owners.get(shape, [None] * len(group))
        order = sorted(range(len(group)), key=lambda i, mine=mine: mine[i] or 0)
        stored.append(([group[i] for i in order], None, None, [mine[i] for i in order]))
    return stored


class _Held(NamedTuple):
    """State of a name: the shape of the whole, whether every rank keeps it, and what this one
    keeps of it, {first row: rows}."""

    shape: Sequence[int]
    common: bool
    rows: dict[int, torch.Tensor]


class MuonAdamW:
    """Muon + AdamW over the parameters of a GPT.

    Where several ranks train it, each updates what it owns and keeps the moments of that alone.

    Args:
        roles: {role: [(name, parameter)]}, GPT.param_roles.
        config: OptimConfig.
        width: C of the model, for the width scaling of AdamW's learning rates.
        lr_scale: the batch's factor on learning rates, of all groups that it scales.
        update: update(tables, stacks, shares, config) makes an update of updates.py.
        stored: [(parameters, matrices (N, R, C), gradients (N, R, C), owners)] of matrices that lie
            together, Weights.stacks; None: those of one shape are stacked for each step.
        ranks: train.ranks.Ranks. Every method that takes a step is called by all of them.

    Attributes:
        step_count: steps so far; it travels in the checkpoint's meta.
        watch: GradientWatch of every step's gradients.
        tables, stacks: the Tables and Stacks that this rank updates.
    """

    def __init__(
        self, roles, config, width, lr_scale=1.0, update=EagerUpdate, stored=None, ranks=ALONE
    ):
        self.config, self.lr_scale, self.ranks = config, lr_scale, ranks
        self.step_count = 0
        named = dict(member for members in roles.values() for member in members)
        self.parameters = list(named.values())
        self.tables, self.stacks = [], []
        self.shares, self.owned = [], []  # what this rank updates; what has one owner
        for role, group in config.adamw_groups().items():
            lr = group.lr_at(width, lr_scale)
            hyper = AdamWHyper(lr, *group.betas, ADAMW_EPS, group.weight_decay)
            for name, p in roles.get(role, []):
                self._add_table(name, p, hyper)
        self.matrices = [p for _, p in roles["matrices"]]
        for each in stored or stacks_of_a_shape(self.matrices, ranks.world):
            self._add_stack(*each)
        self.sharing = None
        if ranks.world > 1:
            common = [share for share in self.shares if share.common]
            self.sharing = Sharing(ranks, self.owned, lambda: [share.grad for share in common])
        self.watch = GradientWatch(named, self.parameters[0].device)
        self.update = update(self.tables, self.stacks, self.shares, config)
        index = {p: i for i, p in enumerate(self.parameters)}
        places = [index[share.param] for share in self.shares]
        self._place = torch.tensor(places, device=self.parameters[0].device)

    def _add_table(self, name, p, hyper):
        share = Share(p)
        if self.ranks.world > 1 and not is_small(p.shape):
            for part in table_rows(p.size(0), self.ranks.world):
                rows = slice(part.start, part.stop)
                grad = functools.partial(lambda p, rows: p.grad[rows], p, rows)
                self.owned.append(Owned(part.owner, p.detach()[rows], grad))
                if part.owner == self.ranks.rank:
                    share = Share(p, rows, common=False)
        moments = [torch.zeros_like(share.value, requires_grad=False) for _ in range(2)]
        self.shares.append(share)
        self.tables.append(Table(name, share, *moments, hyper))

    def _add_stack(self, params, values, grads, owners):
        """Keep what is this rank's of a stack."""
        mine, common = slice(0, len(params)), self.ranks.world == 1 or owners[0] is None
        if not common:
            for p, owner in zip(params, owners, strict=True):
                grad = functools.partial(lambda p: p.grad, p)
                self.owned.append(Owned(owner, p.detach(), grad))
            first = owners.index(self.ranks.rank) if self.ranks.rank in owners else 0
            mine = slice(first, first + owners.count(self.ranks.rank))
        if params[mine]:
            tensors = [x if x is None else x[mine] for x in (values, grads)]
            self.stacks.append(Stack(params[mine], *tensors))
            self.shares += [Share(p, common=common) for p in params[mine]]

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
        if self.sharing:
            self.sharing.sum_gradients()
        self.watch.take(self._squares(), self.step_count)
        matrix_lr = self.config.matrix_lr * self.lr_scale * lr_mult
        numbers = Numbers(self.step_count, lr_mult, matrix_lr, momentum, weight_decay)
        self.update(numbers, self.watch.ok)
        if self.sharing:
            self.sharing.return_values()
        # kernels and views have written the parameters, which torch has not seen
        torch.autograd.graph.increment_version(self.parameters)

    def _squares(self):
        """Sum of squares of each parameter's gradient, (T,), of all ranks."""
        mine = self.update.squares()  # (shares,)
        squares = mine.new_zeros(len(self.parameters))
        if self.ranks.main:
            squares[self._place] = mine
        else:  # what every rank has is rank 0's
            own = [not share.common for share in self.shares]
            squares[self._place] = mine * torch.tensor(own, device=mine.device)
        return self.ranks.total(squares)

    def zero_grad(self):
        """Drop every gradient, unless the update has cleared it where it lies."""
        if not self.update.clears:
            for p in self.parameters:
                p.grad = None
        elif self.sharing:
            self.sharing.clear_sent()

    def _held(self):
        """What this rank keeps of the state, {name: _Held}: "lm_head.weight.exp_avg", and
        "muon.RxC.momentum" of all matrices of a shape in the model's order. A name of which it
        keeps nothing is there, too."""
        held = {}
        for table in self.tables:
            share, shape = table.share, table.share.param.shape
            at = share.rows.start if share.rows else 0
            for name in ("exp_avg", "exp_avg_sq"):
                rows = {at: getattr(table, name)}
                held[f"{table.name}.{name}"] = _Held(shape, share.common, rows)
        place = {p: (stack, i) for stack in self.stacks for i, p in enumerate(stack.params)}
        common = {share.param for share in self.shares if share.common}
        counts = collections.Counter(p.shape for p in self.matrices)
        next_of = collections.Counter()
        for p in self.matrices:
            at, next_of[p.shape] = next_of[p.shape], next_of[p.shape] + 1
            whole = counts[p.shape], *p.shape
            for name, shape in (("momentum", whole), ("second", second_moment_shape(whole))):
                key = f"muon.{p.size(0)}x{p.size(1)}.{name}"
                rows = held.setdefault(key, _Held(shape, p in common, {})).rows
                if p in place:
                    stack, i = place[p]
                    rows[at] = getattr(stack, name)[i : i + 1]
        return held

    def _to_save(self):
        """`_held` without what is another rank's to save."""
        held = self._held().items()
        return {n: x for n, x in held if x.rows and (self.ranks.main or not x.common)}

    def state_dict(self):
        """What this rank saves of the state, a flat {name: rows (n, ...)}, whatever the update:
        alone all rows, else those of `rows`."""
        tensors = {name: list(held.rows.values()) for name, held in self._to_save().items()}
        return {name: x[0] if len(x) == 1 else torch.cat(x) for name, x in tensors.items()}

    def rows(self):
        """{name: (shape of the whole, [(first row, rows)])} of `state_dict`'s tensors, as they
        follow each other."""
        return {
            name: (
                tuple(held.shape),
                [(at, len(x) if x.dim() else 1) for at, x in held.rows.items()],
            )
            for name, held in self._to_save().items()
        }

    @torch.no_grad()
    def load_state_dict(self, tensors, step_count):
        """Restore what the `state_dict`s of all ranks gave together, of any update and any number
        of ranks.

        Args:
            tensors: {name: the whole tensor}.

        Raises:
            UserError: names or shapes of another model; nothing has changed.
        """
        held = self._held()
        for name, (shape, *_) in held.items():
            if name not in tensors or tuple(tensors[name].shape) != tuple(shape):
                raise UserError(f"optimiser state {name!r} is missing or of another shape")
        for name, (_, _, rows) in held.items():
            whole = tensors[name]
            for at, x in rows.items():
                x.copy_(whole[at : at + len(x)] if x.dim() else whole)
        self.step_count = step_count
