"""Where several ranks share one optimiser: gradients go to their owners, new values come back.

    g = sum over the ranks, in their order, of their gradients        fp32 or wider, rounded once

A bucket (train/optim/parts.py) moves as one. What is everybody's is summed on every rank. What is
contiguous travels from where it lies to where it belongs; rows of tables are packed, all that an
owner has or those that occurred (lookups.py). What arrives of gradients lies beside the owner's
until it is added. A row that did not occur has a gradient of zero on its sender, which adds
nothing: sums do not depend on how they travelled.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanofuse.train.optim.lookups import ALL, Lookups
from nanofuse.train.ranks import Pending


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
        for part in bucket.owned:
            grad, route = part.grad(), self._route(part)
            if part.owner == self.ranks.rank:
                landed[part] = {rank: route.room(grad, rank) for rank in self.others}
                receives += landed[part].items()
            else:
                sends.append((part.owner, route.pack(grad, part.owner)))
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
        for part in bucket.owned:
            if part.value is None:
                continue
            if part.owner == self.ranks.rank:
                packed = _in_words(part.value.detach()).contiguous()
                sends += [(rank, packed) for rank in self.others]
                continue
            room = part.value
            if not room.is_contiguous():
                room = room.new_empty(room.shape)
                apart.append((part.value.detach(), room))
            receives.append((part.owner, _in_words(room.detach())))
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
