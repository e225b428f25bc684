from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanofuse.model.config import GPTConfig
from nanofuse.train.placement import (
    go_as_rows,
    is_small,
    matrix_owners,
    muon_cost,
    row_blocks,
    row_slices,
)

WORLDS = st.integers(1, 70)
SHAPES = st.tuples(st.integers(1, 4096), st.integers(1, 4096))
GROUPS = st.lists(
    st.tuples(st.integers(0, 40), st.lists(SHAPES, min_size=1, max_size=4)), max_size=6
)


def loads(groups, owners, world):
    """What every rank's matrices cost."""
    load = [0.0] * world
    for (_, shapes), each in zip(groups, owners, strict=True):
        for owner in each:
            load[owner] += sum(muon_cost(*shape) for shape in shapes)
    return load


@given(st.integers(0, 10**6), WORLDS)
def test_blocks_of_rows_are_all_rows_once_and_even(rows, world):
    parts = row_blocks(rows, world)
    assert [part.owner for part in parts] == list(range(world))
    assert parts[0].start == 0 and parts[-1].stop == rows
    assert all(a.stop == b.start for a, b in zip(parts, parts[1:], strict=False))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(0, 10**4), WORLDS)
def test_every_row_of_an_embedding_has_one_owner_and_all_have_as_many(rows, world):
    parts = [range(rows)[part] for part in row_slices(world)]
    assert sorted(row for part in parts for row in part) == list(range(rows))
    assert all(row % world == rank for rank, part in enumerate(parts) for row in part)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_rows_go_by_number_where_that_is_less():
    assert go_as_rows(0, 1, 2) and not go_as_rows(0, 0, 2)
    assert not go_as_rows(9, 10, 36)  # 9 x 40 bytes are 10 x 36
    assert go_as_rows(9, 10, 37) and not go_as_rows(10, 10, 1000)


@settings(max_examples=200)
@given(GROUPS, WORLDS)
def test_every_unit_has_an_owner_and_a_round_has_different_ones(groups, world):
    owners = matrix_owners(groups, world)
    assert owners == matrix_owners(groups, world)  # every rank finds the same
    for (units, _), each in zip(groups, owners, strict=True):
        assert len(each) == units and all(0 <= owner < world for owner in each)
        for first in range(0, units, world):
            assert max(Counter(each[first : first + world]).values()) == 1


@settings(max_examples=200)
@given(GROUPS, WORLDS)
def test_no_rank_has_more_than_a_unit_of_each_group_above_another(groups, world):
    """A round gives every rank at most one; what is left of a group goes to those with least."""
    load = loads(groups, matrix_owners(groups, world), world)
    most = sum(sum(muon_cost(*shape) for shape in shapes) for units, shapes in groups if units)
    assert max(load) - min(load) <= most


@pytest.mark.parametrize("depth", [4, 8, 12, 16, 20, 24])
@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_the_recipes_models_are_dealt_evenly(depth, world):
    c = GPTConfig.from_depth(depth).n_embd
    groups = [  # qkv, attn_proj, fc, mlp_proj
        (depth, [(c, c)] * 3), (depth, [(c, c)]), (depth, [(4 * c, c)]), (depth, [(c, 4 * c)]),
    ]  # fmt: skip
    load = loads(groups, matrix_owners(groups, world), world)
    unit = muon_cost(4 * c, c)
    assert max(load) - min(load) <= unit
    if depth % world == 0:
        assert max(load) == pytest.approx(min(load))


def test_cost_counts_the_products_of_an_iteration():
    """X X^T is s x l times l x s, its square s x s times s x s, the product s x s times s x l."""
    s, large = 3, 7
    flops = 2 * s * large * s + 2 * s * s * s + 2 * s * s * large
    assert muon_cost(s, large) == muon_cost(large, s) == flops


def test_small_is_below_a_thousand_elements():
    assert is_small((2, 12)) and is_small(()) and is_small((31, 33))
    assert not is_small((32, 32)) and not is_small((1024,))
