"""Where several ranks share one optimiser: gradients go to their owners, new values come back.

    g = sum over the ranks, in their order, of their gradients        fp32 or wider, rounded once

A bucket (train/optim/parts.py) moves as one. What is everybody's is summed on every rank. All else
is contiguous and travels from where it lies to where it belongs: nothing is packed. What arrives of
gradients lies beside the owner's until it is added.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from nanofuse.model.beside import IN_ORDER

STRETCH_BYTES = 2**25  # of gradients that leave together beside a backward pass


@dataclass(frozen=True, eq=False)
class Owned:
    """A contiguous part of the parameters, with its gradient and owner.

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
    parts,  # W tensors of one shape and dtype, from rank 0's on
    out,  # their shape and dtype; may be one of them
):
    """Write the sum of W tensors, added one after another in fp32 or wider and rounded once."""
    if len(parts) == 2:
        torch.add(*parts, out=out)  # one pass; adds in fp32 what is narrower
        return
    wide = torch.promote_types(out.dtype, torch.float32)
    total = parts[0].to(wide) + parts[1]
    for part in parts[2:]:
        total += part
    out.copy_(total)


class Sharing:
    """Moves gradients and values of a model between ranks. Every rank calls the same methods for
    the same buckets in the same order.

    Args:
        ranks: train.ranks.Ranks.
        beside: model.beside.InOrder, the order of transfers and of what computes.
        marks: FusedGPT.final_marks, where `beside` hides transfers.
    """

    def __init__(self, ranks, beside=IN_ORDER, marks=None):
        self.ranks, self.beside, self.marks = ranks, beside, marks
        self.others = [rank for rank in range(ranks.world) if rank != ranks.rank]
        self.early = {}  # {Owned: what _send gives for it and others}

    def start(self, buckets):
        """Where transfers are hidden, start sending all gradients of a backward pass that is still
        under way, each stretch behind its mark."""
        if not self.beside.hides:
            return
        parts = [(max(map(self.marks.get, x.params)), x) for b in buckets for x in b.owned]
        parts.sort(key=lambda pair: pair[0])
        stretch, size = [], 0
        for index, (mark, part) in enumerate(parts):
            stretch.append(part)
            size += part.grad().nbytes
            if size >= STRETCH_BYTES or index == len(parts) - 1:
                with self.beside.behind(mark):
                    sent = self._send(stretch)
                self.early |= dict.fromkeys(stretch, sent)
                stretch, size = [], 0

    def _send(self, parts):
        """Start sending gradients to their owners; a Pending, and {Owned of this rank's: {rank: its
        part}}."""
        sends, receives, landed = [], [], {}
        for part in parts:
            grad = part.grad()
            if part.owner == self.ranks.rank:
                landed[part] = {rank: torch.empty_like(grad) for rank in self.others}
                receives += landed[part].items()
            else:
                sends.append((part.owner, grad))
        return self.ranks.swap(sends, receives), landed

    def send_gradients(self, bucket):
        """Start sending every gradient of a bucket to its owner, unless `start` has.

        Returns:
            what `add_gradients` takes.
        """
        if bucket.owned and not self.early:
            return [self._send(bucket.owned)]
        found = {id(sent): sent for sent in map(self.early.pop, bucket.owned)}
        return list(found.values())

    def add_gradients(self, bucket, arriving):
        """Leave the sums over ranks in the gradients of a bucket that this rank owns, or that are
        everybody's; those of others stay as they are."""
        landed = {}
        for pending, parts in arriving:
            pending.wait()
            landed |= parts
        with self.ranks.exposed:
            for part in bucket.owned:
                if part.owner == self.ranks.rank:
                    grad, parts = part.grad(), landed[part]
                    parts[self.ranks.rank] = grad
                    add_in_rank_order([parts[rank] for rank in range(self.ranks.world)], grad)
        if not bucket.owned:
            self._sum([share.grad for share in bucket.shares])

    def _sum(self, grads):
        """Replace small gradients by their sums over ranks."""
        widest = max((g.dtype for g in grads), key=lambda dtype: torch.finfo(dtype).bits)
        wide = torch.promote_types(torch.float32, widest)
        total = self.ranks.total(torch.cat([g.reshape(-1).to(wide) for g in grads]))
        for g, part in zip(grads, total.split([g.numel() for g in grads]), strict=True):
            g.copy_(part.view_as(g))

    def return_values(self, bucket):
        """Start sending the values that this rank owns to all others, and receiving theirs.

        Returns:
            train.ranks.Pending.
        """
        sends, receives = [], []
        for part in bucket.owned:
            if part.value is None:
                continue
            if part.owner == self.ranks.rank:
                sends += [(rank, part.value) for rank in self.others]
            else:
                receives.append((part.owner, part.value))
        return self.ranks.swap(sends, receives)

    @torch.no_grad()
    def clear_sent(self, buckets):
        """Set the gradients of what others own to zero, where they lie."""
        owned = (part for bucket in buckets for part in bucket.owned)
        if sent := [part.grad() for part in owned if part.owner != self.ranks.rank]:
            torch._foreach_zero_(sent)
