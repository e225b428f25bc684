"""Where several ranks share one optimiser: gradients go to their owners, new values come back.

    g = sum over the ranks, in their order, of their gradients        fp32 or wider, rounded once

A bucket (train/optim/parts.py) moves as one: from one rank to another as one tensor, as the host
takes longer to start a transfer than to pack tensors into one. What is alone in it and contiguous
travels from where it lies to where it belongs. Rows of tables are packed, all that an owner has or
those that occurred (lookups.py). What arrives of gradients lies beside the owner's until it is
added. A row that did not occur has a gradient of zero on its sender, which adds
nothing: sums do not depend on how they travelled.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanofuse.train.optim.lookups import ALL, Lookups
from nanofuse.train.ranks import Pending

ALIGNMENT = 16  # bytes


@dataclass(frozen=True, eq=False)
class Owned:
    """A part of the parameters, contiguous or every W-th row of a table, with its gradient and
    owner.

    Args:
        owner: its rank.
        value: tensor, a view of parameters; None: its owner alone has it, and what the forward pass
            makes of it is returned by the model (model/fp8/weights.py).
        grad: called for the tensor that holds its gradient now.
        params: the parameters that it is of.
    """

    owner: int
    value: torch.Tensor | None
    grad: Callable[[], torch.Tensor]
    params: Sequence[torch.Tensor]


def add_in_rank_order(
    parts,  # W tensors of one dtype, from rank 0's on
    out,  # (n, ...) in their dtype; may be one of them
    rows=None,  # for each part None, or the rows (k,) of `out` that it has, which are distinct
):
    """Write the sum of W tensors, added one after another in fp32 or wider and rounded once. One of
    them at least has all rows, and is `out` where there are two."""
    rows = rows or [None] * len(parts)
    some = [pair for pair in zip(parts, rows, strict=True) if pair[1] is not None]
    if len(parts) == 2:  # one pass; adds in fp32 what is narrower
        if not some:
            torch.add(*parts, out=out)
        for part, places in some:
            out.index_copy_(0, places.long(), out.index_select(0, places) + part)
        return
    wide = torch.promote_types(out.dtype, torch.float32)
    if rows[0] is rows[1] is None:
        total, first = parts[0].to(wide) + parts[1], 2
    else:
        total, first = torch.zeros(out.shape, dtype=wide, device=out.device), 0
    for part, places in zip(parts[first:], rows[first:], strict=True):
        if places is None:
            total += part
        else:
            total.index_add_(0, places, part.to(wide))
    out.copy_(total)


def _in_words(
    x,  # (n, C), rows that are contiguous each
):
    """A view of x in elements of 8 bytes where its rows have whole ones: torch copies rows that lie
    apart element by element."""
    whole = x.size(-1) * x.element_size() % 8 == 0
    return x.view(torch.int64) if whole else x


def room_for(
    shapes,
    like,  # a tensor for each, of its dtype; all on one device
):
    """Room for tensors that travel as one: a contiguous tensor, and a view of it for each. Those
    whose rows are multiples of more bytes come first, so that all are aligned as they want it."""
    if len(shapes) == 1:
        room = like[0].new_empty(shapes[0])
        return room, [room]
    rows = [math.prod(s[1:]) * x.element_size() for s, x in zip(shapes, like, strict=True)]
    order = sorted(range(len(shapes)), key=lambda i: -math.gcd(rows[i], ALIGNMENT))
    sizes = [shapes[i][0] * rows[i] for i in order]
    room = torch.empty(sum(sizes), dtype=torch.uint8, device=like[0].device)
    views = dict(zip(order, room.split(sizes), strict=True))
    return room, [
        views[i].view(x.dtype).view(shape)
        for i, (shape, x) in enumerate(zip(shapes, like, strict=True))
    ]


def _packed(
    tensors,  # (n, ...) each
    shapes,
    rows,  # of each None, or int32 numbers (k,) of its rows that go
):
    """What goes of tensors, as one; a single one that is contiguous is not copied."""
    if len(tensors) == 1 and rows[0] is None and tensors[0].is_contiguous():
        return tensors[0]
    room, views = room_for(shapes, tensors)
    for x, some, view in zip(tensors, rows, views, strict=True):
        if some is None:
            _in_words(view).copy_(_in_words(x))
        else:
            torch.index_select(x, 0, some, out=view)
    return room


@dataclass(frozen=True)
class Sent:
    """Gradients on their way, and {Owned of this rank's: {rank: its part}}. `packed` is kept until
    they have arrived."""

    pending: Pending
    landed: dict
    packed: list


@dataclass(frozen=True)
class Returning:
    """Values on their way; `wait` puts those of tables' rows where they belong, [(rows of a
    parameter, what comes)]. `packed` is kept until they have arrived."""

    pending: Pending
    apart: list
    packed: list
    exposed: Any

    def wait(self):
        self.pending.wait()
        if self.apart:
            with self.exposed:
                for rows, values in self.apart:
                    _in_words(rows).copy_(_in_words(values))


class Sharing:
    """Moves gradients and values of a model between ranks. Every rank calls the same methods for
    the same buckets in the same order.

    Args:
        ranks: train.ranks.Ranks.
        lookups: GPT.lookups; None: all rows of tables travel.
    """

    def __init__(self, ranks, lookups=None):
        self.ranks = ranks
        self.others = [rank for rank in range(ranks.world) if rank != ranks.rank]
        self.lookups = lookups and Lookups(ranks, lookups)
        self.routes = {}  # {table: Route} of this step, of those that do not travel whole

    def note(
        self,
        tokens,  # (B, T) integer on the CPU
    ):
        """Take note of a micro-step's tokens."""
        if self.lookups:
            self.lookups.note(tokens)

    def start(self):
        """Find out which rows of tables travel."""
        if self.lookups:
            self.routes = self.lookups.routes()

    def _route(self, part):
        return self.routes.get(part.params[0], ALL)

    def send_gradients(self, bucket):
        """Start sending every gradient of a bucket to its owner; the Sent."""
        sends, receives, landed = [], [], {}
        by_owner = {rank: [] for rank in range(self.ranks.world)}
        for part in bucket.owned:
            by_owner[part.owner].append((part, part.grad(), self._route(part)))
        own = by_owner[self.ranks.rank]
        for rank in self.others:
            if own:
                shapes = [route.shape_from(rank, grad) for _, grad, route in own]
                room, views = room_for(shapes, [grad for _, grad, _ in own])
                receives.append((rank, room))
                for (part, *_), view in zip(own, views, strict=True):
                    landed.setdefault(part, {})[rank] = view
            if theirs := by_owner[rank]:
                ways = [route.rows_to(rank, grad) for _, grad, route in theirs]
                packed = _packed([grad for _, grad, _ in theirs], *zip(*ways, strict=True))
                sends.append((rank, packed))
        return Sent(self.ranks.swap(sends, receives), landed, sends)

    def add_gradients(self, bucket, sent):
        """Leave the sums over ranks in the gradients of a bucket that this rank owns; those that
        others own stay as they are."""
        sent.pending.wait()
        with self.ranks.exposed:
            for part in bucket.owned:
                if part.owner == self.ranks.rank:
                    grad, route = part.grad(), self._route(part)
                    parts = sent.landed[part] | {self.ranks.rank: grad}
                    order = range(self.ranks.world)
                    rows = [route.landed.get(rank) for rank in order]
                    add_in_rank_order([parts[rank] for rank in order], grad, rows)

    def sum_gradients(self, bucket):
        """Leave the sums over ranks in the small gradients of a bucket that is everybody's."""
        grads = [share.grad for share in bucket.shares]
        widest = max((g.dtype for g in grads), key=lambda dtype: torch.finfo(dtype).bits)
        wide = torch.promote_types(torch.float32, widest)
        total = self.ranks.total(torch.cat([g.reshape(-1).to(wide) for g in grads]))
        for g, part in zip(grads, total.split([g.numel() for g in grads]), strict=True):
            g.copy_(part.view_as(g))

    def return_values(self, bucket):
        """Start sending the values that this rank owns to all others, and receiving theirs.

        Returns:
            Returning.
        """
        sends, receives, apart = [], [], []
        for owner in range(self.ranks.world):
            parts = [part for part in bucket.owned if part.owner == owner]
            values = [part.value.detach() for part in parts if part.value is not None]
            shapes = [x.shape for x in values]
            if not values:
                continue
            if owner == self.ranks.rank:
                packed = _packed(values, shapes, [None] * len(values))
                sends = [(rank, packed) for rank in self.others]
            elif len(values) == 1 and values[0].is_contiguous():
                receives.append((owner, values[0]))
            else:
                room, views = room_for(shapes, values)
                receives.append((owner, room))
                apart += zip(values, views, strict=True)
        return Returning(self.ranks.swap(sends, receives), apart, sends, self.ranks.exposed)

    @torch.no_grad()
    def clear_sent(self, buckets):
        """Set the gradients of parameters that others own a part of to zero, where they lie. The
        update has cleared this rank's rows among them; a whole tensor is written faster than rows
        that lie apart."""
        owned = (part for bucket in buckets for part in bucket.owned)
        others = (part.params for part in owned if part.owner != self.ranks.rank)
        if sent := dict.fromkeys(p for params in others for p in params):
            torch._foreach_zero_([p.grad for p in sent])
