"""Which rows travel, and who knows of it."""

import pytest
import torch

from nanofuse.train.optim import lookups as module
from nanofuse.train.optim.lookups import ALL, Lookups
from tests.train.thread_ranks import run_ranks

ROWS = 10
BY_TOKEN = [torch.zeros(ROWS, 4), torch.zeros(ROWS, 2)]
OTHER = torch.zeros(7, 4)
TOKENS = [  # of each rank's micro-steps
    [[[0, 2, 2], [4, 2, 0]], [[7, 7, 7], [0, 0, 0]]],
    [[[9, 9, 9], [9, 9, 9]], [[1, 1, 1], [1, 1, 1]]],
    [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 0, 1]]],
]


def lookups(tokens):
    return [(tokens, BY_TOKEN), (tokens % 7, [OTHER])]


def routes(ranks, tokens, before=()):
    """(sent, landed) of the latest step, by table, with rows as lists.

    Args:
        before: tokens of a step before it, of every rank.
    """
    made = Lookups(ranks, lookups)
    if before:
        made.note(torch.tensor(before))
        made.routes()
    for x in tokens[ranks.rank]:
        made.note(torch.tensor(x))
    found = made.routes()
    return [
        [{peer: rows.tolist() for peer, rows in way.items()} for way in (route.sent, route.landed)]
        for route in (found.get(table, ALL) for table in (*BY_TOKEN, OTHER))
    ]


def expected(looked_up, rank, world, rows):
    """The numbers among an owner's rows, of those that each rank looked up; all where that is as
    much."""

    def going(sender, owner):
        return sorted(row // world for row in looked_up[sender] if row % world == owner)

    def few(sender, owner):
        return len(going(sender, owner)) < len(range(owner, rows, world))

    peers = [peer for peer in range(world) if peer != rank]
    return [
        {peer: going(rank, peer) for peer in peers if few(rank, peer)},
        {peer: going(peer, rank) for peer in peers if few(peer, rank)},
    ]


@pytest.mark.parametrize("world", [2, 3])
def test_all_ranks_agree_on_the_rows_that_occurred(world):
    """In a second step as in the first: what was noted before is forgotten. Rows are 24 and 16
    bytes, so that one more of them is more than their numbers."""
    sets = [{token for x in each for row in x for token in row} for each in TOKENS]
    for before in ((), [[8, 3, 6]]):
        found = run_ranks(world, lambda r, x=before: routes(r, TOKENS, x))
        for rank, (first, second, other) in enumerate(found):
            assert first == second == expected(sets, rank, world, ROWS)
            assert other == expected([{x % 7 for x in s} for s in sets], rank, world, 7)


def test_where_a_rank_has_noted_nothing_all_rows_travel():
    for silent in (0, 1):
        tokens = [[] if rank == silent else TOKENS[rank] for rank in range(2)]
        assert run_ranks(2, lambda r, t=tokens: routes(r, t)) == [[[{}, {}]] * 3] * 2


def test_tokens_outside_of_a_table_count_as_its_ends():
    ends = [[[[-5, 12, 3]]], [[[0, 9, 3]]]]
    (first, *_), (second, *_) = run_ranks(2, lambda r: routes(r, ends))
    assert first == [{1: [1, 4]}, {1: [0]}] and second == [{0: [0]}, {0: [1, 4]}]


def test_what_goes_has_the_shape_of_what_comes():
    def check(ranks):
        made, grad = Lookups(ranks, lookups), torch.arange(40.0).view(ROWS, 4)
        for x in TOKENS[ranks.rank]:
            made.note(torch.tensor(x))
        route, other = made.routes()[BY_TOKEN[0]], 1 - ranks.rank
        mine, theirs = grad[ranks.rank :: 2], grad[other::2]
        sent, rows = route.rows_to(other, theirs)
        assert torch.equal(rows, route.sent[other]) and sent == theirs[rows.long()].shape
        assert ALL.rows_to(other, theirs) == (theirs.shape, None)
        assert ALL.shape_from(other, mine) == mine.shape
        return sent, route.shape_from(other, mine)

    (sent, room), (back, landed) = run_ranks(2, check)
    assert (sent, back) == (landed, room) and sent[0] < ROWS // 2


def test_tokens_are_noted_in_parts_that_take_one_thread(monkeypatch):
    monkeypatch.setattr(module, "ALONE_BELOW", 7)
    sizes = []

    def noted(tokens):
        sizes.append(tokens.numel())
        return lookups(tokens)

    def check(ranks):
        made = Lookups(ranks, noted)
        made.note(torch.tensor(TOKENS[2][0] * 4))  # (8, 3)
        return {row for mask in made.masks[:1] for row in mask.nonzero()[0].tolist()}

    assert run_ranks(1, check) == [{0, 1, 2, 3, 4, 5}]
    assert sizes == [6, 6, 6, 6]
