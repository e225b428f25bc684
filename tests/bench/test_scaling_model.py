"""The cost model's bytes are those that are sent, and docs/scaling.md is what it says."""

import re
from types import SimpleNamespace

import pytest

from nanofuse.bench import scaling_model as model
from nanofuse.bench.scaling_model import PAGE, page
from nanofuse.bench.schemes import Nanochat
from nanofuse.bench.traffic import Bucket
from nanofuse.model.config import VALUE_GATE_CHANNELS, GPTConfig
from nanofuse.model.gpt import GPT
from nanofuse.train.errors import UserError
from nanofuse.train.optim.config import OptimConfig

SIZES = {"sequence_len": 32, "vocab_size": 100, "bigram_embed_factor": 3}


@pytest.mark.parametrize("world", [2, 8])
def test_nanochats_stacks_are_padded_as_the_bench_does(world):
    config = GPTConfig.from_depth(3, 32, 32, **{**SIZES, "vocab_size": 64})
    roles = GPT(config).param_roles()
    numbers = roles, OptimConfig(), config.n_embd, 1, lambda *parts: None
    scheme = Nanochat(*numbers, SimpleNamespace(rank=0, world=world), None)
    found = {(chunk.shape[1:], chunk.shape[0]) for chunk in scheme.chunks}
    gates = {x for x in found if x[0][1] == VALUE_GATE_CHANNELS}
    assert found - gates == set(model.chunks(config, world))


def test_measured_steps_are_on_record():
    text = (PAGE.parents[1] / model.RECORD / "README.md").read_text(encoding="utf-8")
    for depth, ms in model.MEASURED.items():
        assert re.search(rf"\| d{depth}, FP8 \| {ms} ", text), depth
        assert model.alone_ms(depth) == pytest.approx(ms * model.batch_tokens(depth) / 2**19)


def test_a_transfer_between_hosts_goes_at_their_rate():
    assert model.transfer_ms(320e6, 8) == pytest.approx(1.03)
    flat = model.transfer_ms(63e6, 64)  # 56 of 63 parts leave the host
    assert flat == pytest.approx(0.03 + 1e3 * 56e6 / 45e9)
    # 7/8 inside, and an eighth of 7/8 of it to the seven other hosts
    levels = model.two_levels_ms(64e6, 128e6, 64)
    assert levels == pytest.approx(0.06 + 1e3 * (56e6 / 320e9 + 14e6 / 45e9))


def test_rows_are_those_that_were_counted():
    text = (PAGE.parents[1] / model.ROWS_RECORD / "counts.txt").read_text(encoding="utf-8")
    counted = [line.replace(",", "").split()[:3] for line in text.splitlines()]
    for lookup, rows in model.LOOKED_UP.items():
        found = [(int(tokens), int(n)) for name, tokens, n in counted if name == lookup]
        assert found == [(2 ** (model.FIRST_POWER + i), n) for i, n in enumerate(rows)]
        for tokens, n in found:
            assert model.rows_looked_up(lookup, tokens) == pytest.approx(n)
        between = model.rows_looked_up(lookup, 3 * 2**17)
        assert rows[9] < between < rows[10]  # of 2^18 and 2^19 tokens
        assert model.rows_looked_up(lookup, 2**30) == pytest.approx(rows[-1])


def test_owners_get_their_part_of_the_rows():
    for world in (2, 8):
        ((_, counts), _) = model.seen(16, world)
        assert len(counts) == world
        assert sum(counts) == pytest.approx(
            model.OWNERS_DIFFER * model.rows_looked_up("token", 2**19 / world), rel=1e-3
        )
        fewer = model.gradient_bytes(GPTConfig.from_depth(16), world, model.seen(16, world))
        assert sum(fewer) < 0.8 * sum(model.gradient_bytes(GPTConfig.from_depth(16), world))


def test_what_the_links_carry_delays_what_is_computed():
    """Two buckets by hand: stack, then a table of which half the rows travel, packed."""
    stack = Bucket([100, 100], [100, 100], [0, 0], [0.0, 0.0], {4: 50}, matrices=True)
    table = Bucket([200, 200], [100, 100], [200, 200], [0.0, 0.0], {2: 200}, packed=True)
    assert model.packing_ms(stack) == (0, 0, 0)
    per_byte = 1e3 / model.COPY_RATE
    assert model.packing_ms(table) == pytest.approx([2 * x * per_byte for x in (100, 200, 200)])
    assert model.sums_ms(stack) == pytest.approx(3 * 4 * 25 * per_byte)
    assert model.sums_ms(table) == pytest.approx(7 * 2 * 100 / 2 * per_byte)
    # small as they are, each of five transfers waits for the one before
    took = model.pipeline_ms([stack, table], [0, 0], [4, 4])
    assert took == pytest.approx(5 * model.LATENCY_MS, rel=1e-3)


def test_more_gpus_take_less_time_and_never_less_than_their_part():
    for depth in (4, 16, 40):
        alone = model.step_ms(depth, 1)
        for scheme in ("today", "nanochat", "DDP"):
            times = [model.step_ms(depth, world, scheme) for world in (1, 2, 4, 8)]
            assert times == sorted(times, reverse=True), (depth, scheme)
            assert times[3] > alone / 8
        assert model.step_ms(depth, 8) < alone / 6


def test_the_page_has_the_models_tables():
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "run python -m bench.scaling_model"


def test_a_page_without_a_tables_place_is_refused():
    with pytest.raises(UserError, match="scaling.md has no place for the table 'hosts'"):
        page(PAGE.read_text(encoding="utf-8").replace("<!-- table: hosts -->", ""))
