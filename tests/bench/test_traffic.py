"""The bytes of bench/traffic.py are those that are sent."""

import pytest
import torch

from nanofuse.bench import traffic
from nanofuse.kernels.bigram_rows import bigram_rows_ref
from nanofuse.kernels.common.jit import HAS_TRITON
from nanofuse.model.config import GPTConfig
from nanofuse.model.fp8.products import PlainGemm
from nanofuse.model.fused import FusedGPT
from nanofuse.model.gpt import GPT
from nanofuse.train.assemble import fused_optimizer, peers_of
from nanofuse.train.optim import parts
from nanofuse.train.optim.config import OptimConfig
from nanofuse.train.optim.muon_adamw import MuonAdamW
from tests.train.thread_ranks import run_ranks

SIZES = {"sequence_len": 32, "vocab_size": 100, "bigram_embed_factor": 3}


def moved(ranks, config, dtype, fused, tokens=None):
    """Bytes that a rank sends for the gradients, and for the values, by bucket; of operands; and of
    the numbers of rows.

    Args:
        tokens: that every rank looks up; None: all rows travel.
    """
    gpt = GPT(config, dtype)
    gpt.init_weights()
    weights = None
    if fused:
        model = FusedGPT(gpt, PlainGemm(), peers=peers_of(ranks))
        weights, optimizer = model.weights, fused_optimizer(model, OptimConfig(), 1, ranks)
    else:
        optimizer = MuonAdamW(gpt.param_roles(), OptimConfig(), config.n_embd, ranks=ranks)
        for p in gpt.parameters():
            p.grad = torch.zeros_like(p)
    if tokens is not None:
        optimizer.note(tokens)
    before = ranks.moved
    optimizer.sharing.start()
    numbers = ranks.moved - before
    found = []
    for bucket in optimizer.buckets:
        before = ranks.moved
        optimizer.sharing.add_gradients(bucket, optimizer.sharing.send_gradients(bucket))
        between = ranks.moved
        optimizer.sharing.return_values(bucket).wait()
        found.append((between - before, ranks.moved - between))
    before = ranks.moved
    if weights:
        weights.exchange()
    return found[1:], ranks.moved - before, numbers  # what is everybody's comes first


def rows_of_owners(config, tokens, world):
    """`seen` of bench.traffic."""
    found = []
    for lookup, rows in {"token": tokens, "bigram": bigram_rows_ref(tokens, 300)}.items():
        distinct = set(rows.flatten().tolist())
        counts = [sum(row % world == owner for row in distinct) for owner in range(world)]
        found.append((lookup, tuple(counts)))
    return tuple(found)


@pytest.mark.skipif(not HAS_TRITON, reason="the kernels need Triton")
@pytest.mark.parametrize("world", [2, 3, 7])
@pytest.mark.parametrize("kv, length", [(0, 0), (1, 30), (0, 500)])
def test_the_bytes_of_every_rank_are_those_that_sharing_sends(world, kv, length, monkeypatch):
    """Bucket by bucket, with owners that have nothing, and rows that are uneven, of which all or
    those of few or many tokens travel."""
    monkeypatch.setattr(parts, "BUCKET_BYTES", 20_000)
    monkeypatch.setattr(traffic, "BUCKET_BYTES", 20_000)
    config = GPTConfig.from_depth(2, 32, 32, n_kv_head=kv, **SIZES)
    tokens, seen = None, ()
    if length:
        tokens = torch.randint(100, (1, length), generator=torch.Generator().manual_seed(3))
        seen = rows_of_owners(config, tokens, world)
    found = run_ranks(world, lambda r: moved(r, config, torch.bfloat16, True, tokens))
    model = traffic.buckets(config, world, seen=seen)
    assert len(model) > 4
    made = traffic.operand_bytes(config, world, 2)
    indices = traffic.number_bytes(config, world, seen)
    assert any(indices) == bool(length)
    for rank, (each, operands, numbers) in enumerate(found):
        assert each == [bucket.sent(rank) for bucket in model]
        assert operands == made[rank] * (world - 1)
        assert numbers == sum(indices) - indices[rank]


def test_the_bytes_of_all_do_not_depend_on_the_backend():
    config = GPTConfig.from_depth(2, 32, 32, **SIZES)
    found = run_ranks(3, lambda r: moved(r, config, torch.float32, False))
    size = sum(kind.nbytes for kind in traffic.kinds(config, fused=False))
    for which in (0, 1):  # gradients, values: (W - 1) of each byte, over all
        assert sum(bucket[which] for rank, *_ in found for bucket in rank) == 2 * size


def test_bytes_are_those_of_the_parameters():
    config = GPTConfig.from_depth(16)
    counts = config.param_counts()
    counts["matrices"] -= 8 * 8 * 12  # gates are everybody's
    tables = counts["wte"] + counts["value_embeds"] + counts["bigram_embed"]
    wanted = 4 * (counts["matrices"] + counts["lm_head"]) + 2 * tables
    assert sum(kind.nbytes for kind in traffic.kinds(config)) == wanted
