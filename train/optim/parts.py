"""What MuonAdamW updates: rows of tables and stacks of matrices, in buckets that move as one."""

from dataclasses import dataclass
from typing import Any

import torch

from nanofuse.kernels.adamw import AdamWHyper
from nanofuse.kernels.muon_update import second_moment_shape
from nanofuse.train.optim.sharing import Owned
from nanofuse.train.placement import is_small, matrix_owners, row_blocks, row_slices

BUCKET_BYTES = 2**27  # of tables that are updated together


@dataclass(frozen=True)
class Share:
    """Rows of a parameter, or all of it, that this rank updates, with their gradient. `master` has
    their values where the parameter has not."""

    param: torch.Tensor
    rows: slice | None = None  # None: all
    master: torch.Tensor | None = None

    @property
    def value(self):
        if self.master is not None:
            return self.master
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


@dataclass
class Bucket:
    """Tables and stacks that one call of an update takes.

    Attributes:
        tables, stacks: what this rank updates.
        owned: where several ranks train, all that has an owner, alike on every rank; empty where
            every rank updates all of it.
        matrices: whether there is a factor of the forward pass's products in it, of any rank.
        nbytes: of the values of all that has an owner.
        update: of updates.py; None where this rank has nothing to update.
    """

    tables: list[Table]
    stacks: list[Stack]
    owned: list[Owned]
    matrices: bool = False
    nbytes: int = 0
    update: Any = None

    @property
    def shares(self):
        matrices = [Share(p) for stack in self.stacks for p in stack.params]
        return [table.share for table in self.tables] + matrices


def _rows_of_table(name, p, hyper, dense, ranks, master):
    """The Table of the rows that this rank owns, and the Owned of all ranks: blocks where all rows
    have a gradient, else every W-th row. Values that lie with their owner alone, in `master`, are
    not returned."""
    owned = []
    parts = row_slices(ranks.world)
    if dense:
        parts = [slice(x.start, x.stop) for x in row_blocks(p.size(0), ranks.world)]
    for owner, rows in enumerate(parts):
        own = owner == ranks.rank
        share = Share(p, rows, master if own else None)
        value = share.value if master is None else None
        owned.append(Owned(owner, value, lambda share=share: share.grad, [p]))
        if own:
            mine = new_table(name, share, hyper)
    return mine, owned


def new_table(name, share, hyper):
    """A Table with moments of zero, contiguous."""
    value = share.value
    moments = [value.new_zeros(value.shape, requires_grad=False) for _ in range(2)]
    return Table(name, share, *moments, hyper)


def _matrices_of_stack(params, values, grads, owners, ranks):
    """[the Stack of what this rank owns], empty where it owns nothing, and the Owned of all ranks:
    a run of matrices where their gradients lie in a row, else each by itself.
    Matrices that lie in `values` are with their owner alone, and are not returned."""
    owned, stacks = [], []
    for rank in range(ranks.world):
        first, count = owners.index(rank) if rank in owners else 0, owners.count(rank)
        mine = slice(first, first + count)
        run = None if grads is None else grads[mine]
        if count and run is not None and run.is_contiguous():
            owned.append(Owned(rank, None, lambda run=run: run, params[mine]))
        else:
            for p in params[mine]:
                value = p.detach() if values is None else None
                owned.append(Owned(rank, value, lambda p=p: p.grad, [p]))
        if count and rank == ranks.rank:
            stacks = [Stack(params[mine], values, run)]
    return stacks, owned


def make_buckets(tables, stored, masters, ranks):
    """[Bucket] without updates: alone one of everything. Else what every rank updates comes first,
    a stack follows the other, then tables, so that matrices are updated while tables travel: those
    of which every row has a gradient, and then the largest, so that little is left to return last.

    Args:
        tables: [(name, parameter, AdamWHyper, whether all rows have a gradient)].
        stored: [(parameters, this rank's matrices (n, R, C) or None, gradients (N, R, C) or None,
            owners)].
        masters: {parameter: this rank's rows} of tables whose rows lie with their owners alone.
        ranks: train.ranks.Ranks.
    """
    common, stacked, of_tables, room = Bucket([], [], [], matrices=True), [], [], 0
    for params, values, grads, owners in stored:
        if ranks.world == 1 or owners[0] is None:
            common.stacks.append(Stack(params, values, grads))
        else:
            parts = _matrices_of_stack(params, values, grads, owners, ranks)
            nbytes = sum(p.nbytes for p in params)
            stacked.append(Bucket([], *parts, matrices=True, nbytes=nbytes))
    for name, p, hyper, dense in sorted(tables, key=lambda table: (not table[3], -table[1].nbytes)):
        if ranks.world == 1 or is_small(p.shape):
            common.tables.append(new_table(name, Share(p), hyper))
            continue
        if room < p.nbytes:
            of_tables.append(Bucket([], [], []))
            room = BUCKET_BYTES
        room -= p.nbytes
        of_tables[-1].nbytes += p.nbytes
        mine, owned = _rows_of_table(name, p, hyper, dense, ranks, masters.get(p))
        of_tables[-1].matrices |= dense
        of_tables[-1].tables.append(mine)
        of_tables[-1].owned += owned
    return [common, *stacked, *of_tables]
