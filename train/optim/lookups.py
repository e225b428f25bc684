"""Which rows of tables have a gradient in a step: those that its tokens have looked up.

Only these need to travel to their owners. The host notes each micro-step's tokens, of which it has
the batch that the device gets, in a mask of every table's rows: so it knows the rows without
waiting for the device, and goes on launching. All ranks tell each other how many there are, from
which each pair of ranks knows, by train.placement.go_as_rows, whether rows go with their numbers or
all go. Numbers travel once for all tables that are looked up alike.
"""

from dataclasses import dataclass, field

import numpy
import torch

from nanofuse.train.placement import go_as_rows, row_slices

# elements of a tensor, up to which torch's operations keep to their thread on a CPU: where the
# ranks of a host have more threads than it has cores, these wait for each other
ALONE_BELOW = 2**15 - 1


@dataclass(frozen=True)
class Route:
    """How gradients of a table travel in a step: the rows of an owner's, counted among its own,
    int32, that this rank sends, by owner, and that come to this rank, by sender. All rows go where
    there are none."""

    sent: dict = field(default_factory=dict)
    landed: dict = field(default_factory=dict)

    def rows_to(
        self,
        owner,
        grad,  # (n, ...), the rows of an owner
    ):
        """The shape of what goes to the owner, and its rows' numbers, None for all."""
        rows = self.sent.get(owner)
        return (grad.shape if rows is None else (len(rows), *grad.shape[1:])), rows

    def shape_from(
        self,
        sender,
        grad,  # (n, ...), the rows of this rank
    ):
        """The shape of what comes of a sender."""
        rows = self.landed.get(sender)
        return grad.shape if rows is None else (len(rows), *grad.shape[1:])


ALL = Route()


class Lookups:
    """The rows that the ranks look up in a step.

    Args:
        ranks: train.ranks.Ranks.
        lookups: GPT.lookups.
    """

    def __init__(self, ranks, lookups):
        self.ranks, self.lookups = ranks, lookups
        self.masks, self.tables = [], []  # of what is looked up alike: array (R,) bool, [table]
        self.noted = False  # whether there were tokens in this step

    @torch.no_grad()
    def note(
        self,
        tokens,  # (B, T) integer on the CPU; elsewhere this waits for them
    ):
        """Take note of a micro-step's tokens. Those that are outside of a table count as its first
        or last row."""
        tokens = tokens.cpu()
        for part in tokens.split(max(1, ALONE_BELOW // tokens.size(1))):
            found = self.lookups(part)
            if not self.masks:
                self.tables = [tables for _, tables in found]
                self.masks = [numpy.zeros(len(tables[0]), dtype=bool) for tables in self.tables]
            for mask, (rows, _) in zip(self.masks, found, strict=True):
                mask[rows.clamp(0, len(mask) - 1).numpy()] = True
        self.noted = True

    @torch.no_grad()
    def routes(self):
        """{table: Route} of the step, of those that do not travel whole; tokens are noted anew
        after it. Called by all ranks."""
        rows, counts = [], None
        if self.noted:
            slices = row_slices(self.ranks.world)
            # of each table, the rows of each owner, counted among its own
            rows = [[numpy.flatnonzero(mask[owned]) for owned in slices] for mask in self.masks]
            counts = [[len(x) for x in of_owners] for of_owners in rows]
        every = self.ranks.collect(counts)
        self.noted = False
        for mask in self.masks:
            mask.fill(False)
        return {} if None in every else self._swap_numbers(rows, every)

    def _swap_numbers(self, rows, counts):
        """As `routes`, of this rank's rows by table and owner, and of how many every rank has."""
        world, me = self.ranks.world, self.ranks.rank
        going, coming, numbers = [], [], [numpy.empty(0, dtype=numpy.int64)]
        for peer in (rank for rank in range(world) if rank != me):
            for index, (mask, tables) in enumerate(zip(self.masks, self.tables, strict=True)):
                row_bytes = sum(table[0].nbytes for table in tables)
                own = [len(range(len(mask))[owned]) for owned in row_slices(world)]
                out, come = counts[me][index][peer], counts[peer][index][me]
                if go_as_rows(out, own[peer], row_bytes):
                    going.append((peer, index, out))
                    numbers.append(rows[index][peer])
                if go_as_rows(come, own[me], row_bytes):
                    coming.append((peer, index, come))
        device = self.tables[0][0].device
        sent = _on_device(numpy.concatenate(numbers), device)
        landed = sent.new_empty(sum(count for *_, count in coming))
        peers = [rank for rank in range(world) if rank != me]
        pending = self.ranks.swap(_by_peer(sent, going, peers), _by_peer(landed, coming, peers))
        routes = [Route() for _ in self.tables]
        for (peer, index, _), x in zip(going, _apart(sent, going), strict=True):
            routes[index].sent[peer] = x
        for (peer, index, _), x in zip(coming, _apart(landed, coming), strict=True):
            routes[index].landed[peer] = x
        pending.wait()
        pairs = zip(routes, self.tables, strict=True)
        return {table: route for route, tables in pairs for table in tables}


def _apart(
    numbers,  # (n,), of all parts in a row
    parts,  # [(peer, index of a table, how many)]
):
    """The numbers of each part."""
    return numbers.split([count for *_, count in parts])


def _by_peer(numbers, parts, peers):
    """[(peer, its numbers)] of all peers; parts of one stand in a row."""
    counts = dict.fromkeys(peers, 0)
    for peer, _, count in parts:
        counts[peer] += count
    return list(zip(counts, numbers.split(list(counts.values())), strict=True))


def _on_device(
    numbers,  # array (n,) of integers
    device,
):
    """A tensor (n,) int32, for which the host does not wait."""
    numbers = torch.from_numpy(numbers).int()
    if device.type == "cuda":
        numbers = numbers.pin_memory()
    return numbers.to(device, non_blocking=True)
