"""Two other ways for several ranks to share a step, for the bench: the same model, the same
formulas and kernels of the update, other traffic.

Both begin when the backward pass has ended, and sum by the library's collectives
(bench/collectives.py) in the gradients' dtypes: fp32, tables bf16. Values return as they are, in
fp32 and bf16. The optimisers here have the methods of train.optim.muon_adamw.MuonAdamW that a step
calls; `phase` is a clock's (bench/training.py), and what a step does for the other ranks' sake is
within its "gradients" and "values".
"""

import torch

from nanofuse.kernels.adamw import AdamWHyper
from nanofuse.kernels.muon_update import second_moment_shape
from nanofuse.train.optim.config import ADAMW_EPS
from nanofuse.train.optim.updates import Numbers
from nanofuse.train.placement import is_small


def whole_storages(tensors):
    """A flat tensor over each storage that the tensors lie in, in their order."""
    found = {x.untyped_storage().data_ptr(): x for x in tensors}
    return [x.new_empty(0).set_(x.untyped_storage()) for x in found.values()]


class AllReduced:
    """All gradients are summed on every rank, and every rank updates everything: what
    DistributedDataParallel and an optimiser that knows of no ranks do. DDP hides its sums under the
    backward pass by autograd's hooks, which a pass without autograd does not have.

    Args:
        optimizer: MuonAdamW of one process.
        collectives, phase: as above.
    """

    def __init__(self, optimizer, collectives, phase):
        self.optimizer, self.collectives, self.phase = optimizer, collectives, phase

    def note(
        self,
        tokens,  # (B, T) integer
    ):
        """All rows of tables travel, whatever the tokens."""

    def step(self, *rates):
        with self.phase("gradients"):
            grads = whole_storages([p.grad for p in self.optimizer.parameters])
            for pending in [self.collectives.all_reduce(grad) for grad in grads]:
                pending.wait()
        self.optimizer.step(*rates)

    def zero_grad(self):
        self.optimizer.zero_grad()


class _Rows:
    """A table of which each rank updates as many rows, or all if it is small; the fields that an
    update reads of a train.optim.muon_adamw.Table."""

    def __init__(self, name, table, hyper, collectives):
        self.table, self.hyper, self.collectives = table, hyper, collectives
        self.param, self.reduced = table.detach(), None
        if not is_small(table.shape):
            count, rest = divmod(table.size(0), collectives.world)
            if rest:
                raise ValueError(
                    f"{name} has {table.size(0)} rows, which {collectives.world} does not divide"
                )
            self.param = self.param[collectives.rank * count :][:count]
            self.reduced = torch.empty_like(self.param)
        self.exp_avg, self.exp_avg_sq = (torch.zeros_like(self.param) for _ in range(2))

    @property
    def grad(self):
        return self.table.grad if self.reduced is None else self.reduced

    def reduce(self):
        """Start the sum of the gradients."""
        if self.reduced is None:
            return self.collectives.all_reduce(self.table.grad)
        return self.collectives.reduce_scatter(self.reduced, self.table.grad)

    def give_back(self):
        """Start the return of the values, where there is one: a list."""
        if self.reduced is None:
            return []
        return [self.collectives.all_gather(self.table.detach(), self.param)]


class _Chunk:
    """The matrices of one shape, zero-padded to a multiple of the ranks, of which each updates as
    many; the methods and fields that an update asks of a train.optim.muon_adamw.Stack."""

    in_place = True  # the update writes into `values` themselves

    def __init__(self, params, collectives):
        self.params, self.collectives = params, collectives
        size = -(-len(params) // collectives.world)
        self.mine = params[collectives.rank * size :][:size]
        self.shape = (size, *params[0].shape)
        self.momentum = params[0].new_zeros(self.shape, requires_grad=False)[: len(self.mine)]
        second = params[0].new_zeros(second_moment_shape(self.shape), requires_grad=False)
        self.second = second[: len(self.mine)]
        self.whole = self.grads = self.values = None  # within a step

    def reduce(self):
        """Start the sum of the gradients."""
        size, world = self.shape[0], self.collectives.world
        self.whole = self.params[0].new_zeros((world * size, *self.shape[1:]), requires_grad=False)
        torch._foreach_copy_(list(self.whole[: len(self.params)]), [p.grad for p in self.params])
        self.grads = torch.empty_like(self.whole[:size])
        return self.collectives.reduce_scatter(self.grads, self.whole)

    def take(self):
        """Collect the values that this rank updates."""
        self.values = torch.zeros_like(self.grads)
        if self.mine:
            torch._foreach_copy_(list(self.values[: len(self.mine)]), self.mine)

    def gather(self):
        """Values and gradients of this rank's matrices, (N, R, C) each."""
        return self.values[: len(self.mine)], self.grads[: len(self.mine)]

    def scatter(self, values):
        """They are where they belong already."""

    def give_back(self):
        """Start the return of the values."""
        return [self.collectives.all_gather(self.whole, self.values)]

    def finish(self):
        """Copy all values to the parameters, once they are there."""
        torch._foreach_copy_(self.params, list(self.whole[: len(self.params)]))
        self.whole = self.grads = self.values = None


class Nanochat:
    """nanochat's: every reduction is started behind the backward pass, and waited for where its
    group is updated, tables first; every return is started behind its group's update, and waited
    for at the end. https://github.com/karpathy/nanochat/blob/master/nanochat/optim.py

    Args:
        roles, config, width, lr_scale, update: as of MuonAdamW.
        collectives, phase: as above.

    Raises:
        ValueError: a table whose rows the ranks do not divide.
    """

    def __init__(self, roles, config, width, lr_scale, update, collectives, phase):
        self.config, self.lr_scale, self.phase = config, lr_scale, phase
        self.parameters = [p for members in roles.values() for _, p in members]
        self.tables, self.step_count = [], 0
        for role, group in config.adamw_groups().items():
            lr = group.lr_at(width, lr_scale)
            hyper = AdamWHyper(lr, *group.betas, ADAMW_EPS, group.weight_decay)
            members = roles.get(role, [])
            self.tables += [_Rows(name, p, hyper, collectives) for name, p in members]
        shapes = {}
        for _, p in roles["matrices"]:
            shapes.setdefault(p.shape, []).append(p)
        self.chunks = [_Chunk(params, collectives) for params in shapes.values()]
        shared = self.tables, config, torch.ones(1, device=self.parameters[0].device)
        self.update_tables = update(self.tables, [], *shared)
        self.updates = [update([], [chunk], *shared) for chunk in self.chunks]

    def note(
        self,
        tokens,  # (B, T) integer
    ):
        """All rows of tables travel, whatever the tokens."""

    @torch.no_grad()
    def step(self, lr_mult=1.0, momentum=0.95, weight_decay=0.0):
        self.step_count += 1
        matrix_lr = self.config.matrix_lr * self.lr_scale * lr_mult
        numbers = Numbers(self.step_count, lr_mult, matrix_lr, momentum, weight_decay)
        with self.phase("gradients"):
            tables = [table.reduce() for table in self.tables]
            chunks = [chunk.reduce() for chunk in self.chunks]
            for pending in tables:
                pending.wait()
        self.update_tables(numbers)
        with self.phase("values"):
            returns = [pending for table in self.tables for pending in table.give_back()]
        for chunk, pending, update in zip(self.chunks, chunks, self.updates, strict=True):
            with self.phase("gradients"):
                pending.wait()
            chunk.take()
            if chunk.mine:
                update(numbers)
            with self.phase("values"):
                returns += chunk.give_back()
        with self.phase("values"):
            for pending in returns:
                pending.wait()
            for chunk in self.chunks:
                chunk.finish()
        # kernels and views have written the parameters, which torch has not seen
        torch.autograd.graph.increment_version(self.parameters)

    @torch.no_grad()
    def zero_grad(self):
        if self.update_tables.clears:
            torch._foreach_zero_([p.grad for p in self.parameters])
        else:
            for p in self.parameters:
                p.grad = None
