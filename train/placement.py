"""Who owns what of the parameters, where several ranks share one optimiser: pure arithmetic.

The owner of a matrix, or of some of a table's rows, alone keeps its moments and updates it; the
gradients of all ranks go to it and the new values come from it. Matrices go whole, as Muon's
iterations need them whole. Of an embedding table row i belongs to rank i mod W: tokens of low ids
are frequent, and so every owner gets as many of the rows that a step looks up. lm_head, of which
all rows have a gradient, is cut into blocks. What is small belongs to nobody: every rank updates it
alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass

INDEX_BYTES = 4  # of the number of a row
SMALL = 1024  # elements; the gates, lambdas and scalars of any model, and no matrix of a layer


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` of lm_head, and their owner."""

    owner: int
    start: int
    stop: int


def is_small(shape: Sequence[int]) -> bool:
    """Whether every rank updates a tensor of this shape by itself."""
    size = 1
    for side in shape:
        size *= side
    return size < SMALL


def row_slices(world: int) -> list[slice]:
    """The rows of an embedding table that each rank owns."""
    return [slice(rank, None, world) for rank in range(world)]


def go_as_rows(looked_up: int, rows: int, row_bytes: int) -> bool:
    """Whether a gradient travels as the rows that occurred, with their numbers, as that is less
    than all.

    Args:
        looked_up: rows of the receiver's that the sender's tokens have looked up in a step.
        rows: that the receiver has.
        row_bytes: of a row, of all tables that are looked up alike.
    """
    return looked_up * (row_bytes + INDEX_BYTES) < rows * row_bytes


def row_blocks(rows: int, world: int) -> list[Rows]:
    """The blocks of lm_head's rows, one a rank in rank order, as even as whole rows allow."""
    bounds = [rows * rank // world for rank in range(world + 1)]
    return [Rows(rank, *bounds[rank : rank + 2]) for rank in range(world)]


def muon_cost(rows: int, columns: int) -> float:
    """What a matrix costs its owner, in FLOPs of one Newton-Schulz iteration: X X^T, its square and
    the product with X, of the smaller side s and the larger one l: 4 s^2 l + 2 s^3."""
    s, large = sorted((rows, columns))
    return 4.0 * s * s * large + 2.0 * s**3


def matrix_owners(
    groups: Sequence[tuple[int, Sequence[tuple[int, int]]]], world: int
) -> list[list[int]]:
    """Owners of groups of alike units; a unit is matrices that stay together, as those of one
    product.

    Consecutive units of a group, those of consecutive layers, go to different ranks, so that what a
    stretch of layers sends and receives is as even as the whole. Groups are dealt in descending
    cost of a unit, in rounds, of which each goes to the ranks that have least first.

    Args:
        groups: (units, (R, C) of each matrix of a unit).
        world: ranks.

    Returns:
        the owner of each unit, by group.
    """
    load = [0.0] * world
    owners: list[list[int]] = [[] for _ in groups]
    costs = [sum(muon_cost(*shape) for shape in shapes) for _, shapes in groups]
    for index in sorted(range(len(groups)), key=lambda i: -costs[i]):
        units = groups[index][0]
        for first in range(0, units, world):
            order = sorted(range(world), key=lambda rank: (load[rank], rank))
            for owner in order[: units - first]:
                owners[index].append(owner)
                load[owner] += costs[index]
    return owners
