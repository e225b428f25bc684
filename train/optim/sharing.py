"""Where several ranks share one optimiser: gradients go to their owners, new values come back.

    g = sum over the ranks, in their order, of their gradients        fp32 or wider, rounded once

What is everybody's (train/placement.py) is summed on every rank, and updated there. All else moves
in rounds of which each takes a piece of what every rank owns, so that all send and receive at the
same time, and the buffer for what arrives stays small. Only contiguous pieces move, from where they
lie to where they belong: nothing is packed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

BUFFER_BYTES = 2**27  # of the other ranks' parts of gradients, at a time


@dataclass(frozen=True)
class Owned:
    """A contiguous part of the parameters, with its gradient and owner.

    Args:
        owner: its rank.
        value: tensor, a view of parameters.
        grad: called for the tensor that holds its gradient now.
    """

    owner: int
    value: torch.Tensor
    grad: Callable[[], torch.Tensor]


def in_rank_order(parts):
    """The sum of tensors of one shape and dtype, from the first one on, in fp32 or wider."""
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    total = parts[0].to(wide, copy=True)
    for part in parts[1:]:
        total += part
    return total


class Sharing:
    """Moves gradients and values of a model between ranks.

    Args:
        ranks: train.ranks.Ranks.
        owned: Owned parts, the same and in one order on every rank.
        common: called for the gradients that every rank sums for itself.
    """

    def __init__(self, ranks, owned, common):
        self.ranks, self.owned, self.common = ranks, owned, common

    def _rounds(self):
        """[[(owner, gradient piece (n,))]]: a piece of each owner's at most, every round."""
        limit = BUFFER_BYTES // (self.ranks.world - 1)
        by_owner = [[] for _ in range(self.ranks.world)]
        for part in self.owned:
            flat = part.grad().view(-1)
            pieces = flat.split(max(limit // flat.element_size(), 1))
            by_owner[part.owner] += [(part.owner, piece) for piece in pieces]
        most = max(map(len, by_owner))
        return [[pieces[i] for pieces in by_owner if i < len(pieces)] for i in range(most)]

    def _swap(self, pieces):
        """Start a round: (what is on its way, own gradient or None, other ranks' parts)."""
        me, world = self.ranks.rank, self.ranks.world
        mine, parts, sends, receives = None, {}, [], []
        for owner, piece in pieces:
            if owner != me:
                sends.append((owner, piece))
                continue
            mine = piece
            parts = {rank: torch.empty_like(piece) for rank in range(world) if rank != me}
            receives = list(parts.items())
        return self.ranks.swap(sends, receives), mine, parts

    @torch.no_grad()
    def sum_gradients(self):
        """Leave in the gradients that this rank owns, and in those of all, the sums over ranks. The
        others are as they were."""
        self._sum_common()
        rounds = self._rounds()
        ahead = self._swap(rounds[0]) if rounds else None
        for i in range(len(rounds)):
            (pending, mine, parts), ahead = ahead, None
            if i + 1 < len(rounds):
                ahead = self._swap(rounds[i + 1])
            pending.wait()
            if mine is not None:
                parts[self.ranks.rank] = mine
                mine.copy_(in_rank_order([parts[rank] for rank in range(self.ranks.world)]))

    def _sum_common(self):
        grads = self.common()
        wide = torch.promote_types(torch.float32, max((g.dtype for g in grads), key=_width))
        flat = torch.cat([g.reshape(-1).to(wide) for g in grads])
        total = self.ranks.total(flat)
        for g, part in zip(grads, total.split([g.numel() for g in grads]), strict=True):
            g.copy_(part.view_as(g))

    @torch.no_grad()
    def return_values(self):
        """Send what this rank owns to all others, and write theirs where it belongs."""
        sends, receives, me = [], [], self.ranks.rank
        for part in self.owned:
            if part.owner == me:
                others = (rank for rank in range(self.ranks.world) if rank != me)
                sends += [(rank, part.value) for rank in others]
            else:
                receives.append((part.owner, part.value))
        self.ranks.swap(sends, receives).wait()

    @torch.no_grad()
    def clear_sent(self):
        """Set the gradients of what others own to zero, where they lie."""
        sent = [part.grad() for part in self.owned if part.owner != self.ranks.rank]
        if sent:
            torch._foreach_zero_(sent)


def _width(dtype):
    return torch.finfo(dtype).bits
