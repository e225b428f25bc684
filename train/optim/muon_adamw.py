"""The combined optimiser: Muon for the matrices inside the blocks, AdamW for everything else.

`MuonAdamW` owns what both need: the groups, their hyperparameters, the state and its names in a
checkpoint, the watch over the gradients, the count of steps. How the numbers are computed is an
update's business (updates.py), which sees `Table`s and `Stack`s and no model.
"""

import collections
from collections.abc import Sequence
from typing import NamedTuple

import torch

from nanofuse.kernels.adamw import AdamWHyper
from nanofuse.kernels.muon_update import second_moment_shape
from nanofuse.train.errors import UserError
from nanofuse.train.optim.config import ADAMW_EPS
from nanofuse.train.optim.parts import Share, make_buckets, stacks_of_a_shape
from nanofuse.train.optim.sharing import Sharing
from nanofuse.train.optim.updates import EagerUpdate, Numbers
from nanofuse.train.optim.watch import GradientWatch
from nanofuse.train.ranks import ALONE

DENSE = ("lm_head",)  # roles of tables that have a gradient in every row
AHEAD_BYTES = 2**31  # of buckets whose gradients are on their way together; two always are


class _Held(NamedTuple):
    """State of a name: the shape of the whole, whether every rank keeps it, and what this one
    keeps of it, [(first row, step to the next one, rows)]."""

    shape: Sequence[int]
    common: bool
    rows: list[tuple[int, int, torch.Tensor]]


class MuonAdamW:
    """Muon + AdamW over the parameters of a GPT.

    Where several ranks train it, each updates what it owns and keeps the moments of that alone.

    Args:
        roles: {role: [(name, parameter)]}, GPT.param_roles.
        config: OptimConfig.
        width: C of the model, for the width scaling of AdamW's learning rates.
        lr_scale: the batch's factor on learning rates, of all groups that it scales.
        update: update(tables, stacks, shares, config, take, total) makes an update of updates.py.
        stored: [(parameters, matrices (n, R, C), gradients (N, R, C), owners)] of matrices that lie
            together, Weights.stacks; None: those of one shape are stacked for each step.
        ranks: train.ranks.Ranks. Every method that takes a step is called by all of them.
        masters: {parameter: this rank's rows}, Weights.masters; None: none.
        lookups: GPT.lookups, where gradients of tables are to travel as the rows that occurred.

    Raises:
        ValueError: a role without a group in OptimConfig.adamw_groups.

    Attributes:
        step_count: steps so far; it travels in the checkpoint's meta.
        watch: GradientWatch of every step's gradients.
        buckets: what is updated together, train.optim.parts.Bucket; alone there is one.
        tables, stacks: the Tables and Stacks that this rank updates, of all buckets.
        operands: model.fp8.operands.Operands of a model that several ranks train, which follow the
            matrices within a step; None: they follow after it, or there are none.
    """

    def __init__(
        self,
        roles,
        config,
        width,
        lr_scale=1.0,
        update=EagerUpdate,
        stored=None,
        ranks=ALONE,
        masters=None,
        lookups=None,
    ):
        self.config, self.lr_scale, self.ranks = config, lr_scale, ranks
        self.operands = None
        self.step_count = 0
        named = dict(member for members in roles.values() for member in members)
        self.parameters = list(named.values())
        tables, groups = [], config.adamw_groups()
        if nowhere := roles.keys() - groups.keys() - {"matrices"}:
            raise ValueError(f"no rates for {', '.join(sorted(nowhere))} in OptimConfig")
        for role, group in groups.items():
            lr = group.lr_at(width, lr_scale)
            hyper = AdamWHyper(lr, *group.betas, ADAMW_EPS, group.weight_decay)
            tables += [(name, p, hyper, role in DENSE) for name, p in roles.get(role, [])]
        self.matrices = [p for _, p in roles["matrices"]]
        stored = stored or stacks_of_a_shape(self.matrices, ranks.world)
        self.buckets = make_buckets(tables, stored, masters or {}, ranks)
        self.sharing = Sharing(ranks, lookups) if ranks.world > 1 else None
        self.watch = GradientWatch(named, self.parameters[0].device)
        self.total = torch.zeros_like(self.watch.norm)  # squares of gradients that this rank owns
        for bucket in self.buckets:
            if shares := bucket.shares:
                # what is everybody's counts once
                total = self.total if self.sharing and (bucket.owned or ranks.main) else None
                parts = bucket.tables, bucket.stacks, shares
                bucket.update = update(*parts, config, self.watch.ok, total)
        self.last_of_matrices = [b for b in self.buckets if b.matrices][-1]
        self.update = self.buckets[0].update
        self.squares = self.update.squares_of([Share(p) for p in self.parameters])

    @property
    def tables(self):
        return [table for bucket in self.buckets for table in bucket.tables]

    @property
    def stacks(self):
        return [stack for bucket in self.buckets for stack in bucket.stacks]

    def note(
        self,
        tokens,  # (B, T) integer on the CPU
    ):
        """Take note of a micro-step's tokens: rows of tables that no noted token has looked up have
        no gradient in the step. Where a rank notes none, all rows travel."""
        if self.sharing:
            self.sharing.note(tokens)

    @torch.no_grad()
    def step(self, lr_mult=1.0, momentum=0.95, weight_decay=0.0):
        """Update every parameter from its .grad. `watch` has seen a step whose gradients are not
        all finite; the update says where such a step changes nothing else.

        Args:
            lr_mult: the schedule's multiplier on every learning rate.
            momentum: Muon's momentum.
            weight_decay: Muon's decoupled decay, already scaled and scheduled.
        """
        if self.sharing:
            self.sharing.start()
        self.step_count += 1
        # before anything is summed over ranks: where a sum of finite parts overflows, their squares
        # have done so already
        self.watch.take(self.ranks.total(self.squares()), self.step_count)
        matrix_lr = self.config.matrix_lr * self.lr_scale * lr_mult
        numbers = Numbers(self.step_count, lr_mult, matrix_lr, momentum, weight_decay)
        if self.sharing:
            self._step_together(numbers)
        else:
            self.update(numbers)
            self._changed()

    def _changed(self):
        """Kernels and views have written the parameters, which torch has not seen."""
        torch.autograd.graph.increment_version(self.parameters)

    def _step_together(self, numbers):
        """While a bucket is updated, gradients of those to come and values of those before travel;
        behind the matrices what the next forward pass takes of them, under the tables' update."""
        # small words of all ranks first: what follows in the queue takes long
        if self.operands:
            self.operands.settle_scales()
        common, *others = self.buckets
        self.sharing.sum_gradients(common)
        self.total.zero_()
        returns, arriving, waiting = [], collections.deque(), collections.deque(others)
        for bucket in self.buckets:
            ahead = sum(each.nbytes for each, _ in arriving)
            while waiting and (len(arriving) < 2 or ahead + waiting[0].nbytes <= AHEAD_BYTES):
                ahead += waiting[0].nbytes
                arriving.append((waiting[0], self.sharing.send_gradients(waiting.popleft())))
            if bucket is not common:
                self.sharing.add_gradients(*arriving.popleft())
            if bucket.update:
                bucket.update(numbers)
            returns.append(self.sharing.return_values(bucket))
            if bucket is self.last_of_matrices:
                self._changed()
                if self.operands:
                    self.operands.lead()
        if self.operands:
            self.operands.arrive()
        for pending in returns:
            pending.wait()
        self.watch.norm.copy_(self.ranks.total(self.total).sqrt())

    def zero_grad(self):
        """Drop every gradient, unless the update has cleared it where it lies."""
        if not self.update.clears:
            for p in self.parameters:
                p.grad = None
        elif self.sharing:
            self.sharing.clear_sent(self.buckets)

    def _held(self):
        """What this rank keeps of the state, {name: _Held}: "lm_head.weight.exp_avg", and
        "muon.RxC.momentum" of all matrices of a shape in the model's order. A name of which it
        keeps nothing is there, too."""
        held = {}
        for table in self.tables:
            rows, shape = table.share.rows, table.share.param.shape
            for name in ("exp_avg", "exp_avg_sq"):
                at, step = (rows.start, rows.step or 1) if rows else (0, 1)
                mine = [(at, step, getattr(table, name))]
                held[f"{table.name}.{name}"] = _Held(shape, rows is None, mine)
        place = {p: (stack, i) for stack in self.stacks for i, p in enumerate(stack.params)}
        common = {p for b in self.buckets if not b.owned for s in b.stacks for p in s.params}
        counts = collections.Counter(p.shape for p in self.matrices)
        next_of = collections.Counter()
        for p in self.matrices:
            at, next_of[p.shape] = next_of[p.shape], next_of[p.shape] + 1
            whole = counts[p.shape], *p.shape
            for name, shape in (("momentum", whole), ("second", second_moment_shape(whole))):
                key = f"muon.{p.size(0)}x{p.size(1)}.{name}"
                rows = held.setdefault(key, _Held(shape, p in common, [])).rows
                if p in place:
                    stack, i = place[p]
                    rows.append((at, 1, getattr(stack, name)[i : i + 1]))
        return held

    def _to_save(self):
        """`_held` without what is another rank's to save."""
        held = self._held().items()
        return {n: x for n, x in held if x.rows and (self.ranks.main or not x.common)}

    def state_dict(self):
        """What this rank saves of the state, a flat {name: rows (n, ...)}, whatever the update:
        alone all rows, else those of `rows`."""
        tensors = {name: [x for *_, x in held.rows] for name, held in self._to_save().items()}
        return {name: x[0] if len(x) == 1 else torch.cat(x) for name, x in tensors.items()}

    def rows(self):
        """{name: (shape of the whole, [(first row, rows, step from one to the next)])} of
        `state_dict`'s tensors, as they follow each other."""
        return {
            name: (
                tuple(held.shape),
                [(at, len(x) if x.dim() else 1, step) for at, step, x in held.rows],
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
            for at, step, x in rows:
                x.copy_(whole[at::step][: len(x)] if x.dim() else whole)
        self.step_count = step_count
