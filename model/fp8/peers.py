"""What several ranks that train one model know of each other: who owns what, and how it travels."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Peers:
    """The ranks that share a model's matrices, seen by one of them.

    Args:
        rank, world: of this one, and how many there are.
        deal: deal([(units of a kind, shapes of the matrices of each)]) gives the owner of each
            unit, by kind.
        rows: rows(N) gives the blocks of a table's N rows, one a rank, with owner, start and stop.
        swap, maximum: train.ranks.Ranks' `swap` and `maximum_`.
    """

    rank: int
    world: int
    deal: Callable
    rows: Callable
    swap: Callable
    maximum: Callable

    def spread(self, tensors):
        """Start sending every rank what this one owns of tensors, and receiving the others' rows.

        Args:
            tensors: [([(owner, slice of rows)], x (N, K) of any dtype, contiguous)], in one order
                on every rank.

        Returns:
            train.ranks.Pending.
        """
        others = [peer for peer in range(self.world) if peer != self.rank]
        sends, receives = [], []
        for parts, x in tensors:
            for owner, rows in parts:
                if owner == self.rank:
                    sends += [(peer, x[rows]) for peer in others]
                else:
                    receives.append((owner, x[rows]))
        return self.swap(sends, receives)
