"""Which rows of tables have a gradient in a step: those that its tokens have looked up.

Only these need to travel to their owners. Tokens are noted on the device before each micro-step's
passes, in a mask of the rows of every owner:

    mask[i mod W, i div W] = 1        row i, W ranks

Counts of the masks come to the host behind the last note: it waits for what was launched before the
last micro-step, while that one runs. All ranks then tell each other their counts, from which each
pair of ranks knows, by train.placement.go_as_rows, whether rows go with their numbers or all go.
Numbers travel once for all tables that are looked up alike.
"""

from dataclasses import dataclass, field

import torch

from nanofuse.model.beside import IN_ORDER
from nanofuse.train.placement import go_as_rows, row_slices

NOTED = "rows"  # the mark behind the latest note


@dataclass(frozen=True)
class Route:
    """How gradients of a table travel in a step: the rows of an owner's, counted among its own,
    int32, that this rank sends, by owner, and that come to this rank, by sender. All rows go where
    there are none."""

    sent: dict = field(default_factory=dict)
    landed: dict = field(default_factory=dict)

    def pack(
        self,
        grad,  # (n, ...), the rows of an owner
        owner,
    ):
        """What goes to the owner, contiguous."""
        rows = self.sent.get(owner)
        return grad.contiguous() if rows is None else grad.index_select(0, rows)

    def room(
        self,
        grad,  # (n, ...), the rows of this rank
        sender,
    ):
        """A tensor for what comes of a sender."""
        rows = self.landed.get(sender)
        return grad.new_empty(grad.shape if rows is None else (len(rows), *grad.shape[1:]))


ALL = Route()


class Lookups:
    """The rows that the ranks look up in a step.

    Args:
        ranks: train.ranks.Ranks.
        lookups: GPT.lookups.
        beside: model.beside.InOrder.
    """

    def __init__(self, ranks, lookups, beside=IN_ORDER):
        self.ranks, self.lookups, self.beside = ranks, lookups, beside
        self.masks, self.tables = [], []  # of what is looked up alike: (W, n) uint8, [table]
        self.noted = False  # whether there were tokens in this step
        self.counts = self.copied = None  # (masks, W) on the host, and when they are there

    @torch.no_grad()
    def note(
        self,
        tokens,  # (B, T) integer
    ):
        """Take note of a micro-step's tokens. Those that are outside of a table count as its first
        or last row."""
        found, world = self.lookups(tokens), self.ranks.world
        if not self.masks:
            self.tables = [tables for _, tables in found]
            self.masks = [
                torch.zeros(world, -(-len(tables[0]) // world), dtype=torch.uint8, device=x.device)
                for x, tables in found
            ]
            pinned = tokens.is_cuda
            self.counts = torch.empty(len(found), world, dtype=torch.int64, pin_memory=pinned)
            self.copied = torch.cuda.Event() if pinned else None
        for mask, (rows, tables) in zip(self.masks, found, strict=True):
            rows = rows.reshape(-1).long().clamp(0, len(tables[0]) - 1)
            mask.view(-1).index_fill_(0, rows % world * mask.size(1) + rows // world, 1)
        counts = torch.stack([mask.sum(1) for mask in self.masks])
        self.counts.copy_(counts, non_blocking=True)
        if self.copied is not None:
            self.copied.record()
        self.beside.mark(NOTED)
        self.noted = True

    def _counted(self):
        """Rows that this rank has looked up, by table and owner; None if no tokens were noted."""
        if not self.noted:
            return None
        if self.copied is not None:
            self.copied.synchronize()
        return self.counts.tolist()

    @torch.no_grad()
    def routes(self):
        """{table: Route} of the step, of those that do not travel whole; tokens are noted anew
        after it. Called by all ranks."""
        counts = self.ranks.collect(self._counted())
        if not self.noted:
            return {}
        self.noted = False
        with self.beside.behind(NOTED):
            routes = {} if None in counts else self._swap_numbers(counts)
            for mask in self.masks:
                mask.zero_()
        return routes

    def _swap_numbers(self, counts):
        """As `routes`, of rows looked up by rank, table and owner."""
        world, me = self.ranks.world, self.ranks.rank
        sends, receives, routes = [], [], {}
        for index, (mask, tables) in enumerate(zip(self.masks, self.tables, strict=True)):
            row_bytes = sum(table[0].nbytes for table in tables)
            own = [len(range(len(tables[0]))[rows]) for rows in row_slices(world)]
            # the numbers of the rows with a 1 come first, in ascending order
            numbers = mask.argsort(dim=1, descending=True, stable=True).int()
            route = Route()
            for peer in (rank for rank in range(world) if rank != me):
                out, come = counts[me][index][peer], counts[peer][index][me]
                if go_as_rows(out, own[peer], row_bytes):
                    route.sent[peer] = numbers[peer, :out]
                    sends.append((peer, route.sent[peer]))
                if go_as_rows(come, own[me], row_bytes):
                    route.landed[peer] = numbers.new_empty(come)
                    receives.append((peer, route.landed[peer]))
            routes |= dict.fromkeys(tables, route)
        self.ranks.swap(sends, receives).wait()
        return routes
