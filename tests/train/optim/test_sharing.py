import math
import zlib
from functools import partial

import pytest
import torch

from nanofuse.kernels.common.fp8 import FP8Operand
from nanofuse.kernels.common.jit import HAS_TRITON
from nanofuse.model.backends.torch_backends import SDPAttention
from nanofuse.model.config import GPTConfig
from nanofuse.model.fp8.products import PlainGemm, TorchGemm
from nanofuse.model.fp8.scaling import CALIBRATED_STEPS
from nanofuse.model.fused import FusedGPT
from nanofuse.train.assemble import follow, fused_optimizer, gathered, peers_of
from nanofuse.train.errors import UserError
from nanofuse.train.optim import parts
from nanofuse.train.optim.config import OptimConfig
from nanofuse.train.optim.muon_adamw import MuonAdamW
from nanofuse.train.optim.sharing import _in_words, add_in_rank_order, room_for
from nanofuse.train.optim.updates import EagerUpdate
from nanofuse.train.ranks import Pending
from tests.helpers import not_looked_up, random_model, small_config
from tests.train.thread_ranks import run_ranks

WORLDS = [2, 3, 5]


MICRO_STEPS = 4


def tokens_of(model, step):
    """Of each micro-step, (2, 6) int64."""
    generator = torch.Generator().manual_seed(step)
    shape = MICRO_STEPS, 2, 6
    return list(torch.randint(model.config.vocab_size, shape, generator=generator))


def part_of_gradient(shape, rank, world, step, dtype, name, absent=None):
    """A rank's part of a gradient that depends on name and step; ranks' parts differ. In fp32 and
    bf16 all values are quarters, whose sums are exact in any order. Rows that are `absent`, a mask
    for each micro-step, have none."""
    seed = zlib.crc32(f"{name} {step}".encode())
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(MICRO_STEPS, *shape, generator=generator, dtype=torch.float64)
    if absent is not None:
        whole.masked_fill_(absent, 0)
    if dtype != torch.float64:
        whole = (4 * whole).round() / 4
    mine = whole[rank::world]
    return sum(mine, torch.zeros(shape, dtype=torch.float64)).to(dtype)


def eager(ranks, dtype, steps, note=True, **fields):
    """A model and its optimiser after some steps."""
    model = random_model(small_config(**fields), torch.float32).to(dtype)
    update = partial(EagerUpdate, newton_schulz_dtype=dtype)
    numbers = model.param_roles(), OptimConfig(), model.config.n_embd, 0.5, update
    optimizer = MuonAdamW(*numbers, ranks=ranks, lookups=model.lookups)
    take_steps(model, optimizer, ranks, steps, note=note)
    return model, optimizer


def take_steps(model, optimizer, ranks, steps, first=0, note=True):
    """Steps of gradients in the rows of tables that tokens look up, which are noted or not."""
    place = ranks.rank, ranks.world
    for step in range(first, first + steps):
        tokens = tokens_of(model, step)
        masks = [not_looked_up(model, x) for x in tokens]
        absent = {table: torch.stack([mask[table] for mask in masks]) for table in masks[0]}
        for x in tokens[ranks.rank :: ranks.world] if note else ():
            optimizer.note(x)
        for name, p in model.named_parameters():
            grad = part_of_gradient(p.shape, *place, step, p.dtype, name, absent.get(p))
            if p.grad is None:
                p.grad = grad
            else:
                p.grad.copy_(grad)
        optimizer.step(0.5, 0.9, 0.1)
        optimizer.zero_grad()


def assert_close(models, truth, tolerance):
    """Every rank has the same bits, and they are the truth's up to rounding."""
    named = dict(truth.named_parameters())
    for name, p in models[0].named_parameters():
        for other in models[1:]:
            assert torch.equal(p, dict(other.named_parameters())[name]), name
        want = named[name]
        assert (p - want).norm() <= tolerance * want.norm(), name


@pytest.mark.parametrize("world", WORLDS)
def test_many_ranks_update_as_one(world):
    (truth, alone), *_ = run_ranks(1, lambda r: eager(r, torch.float64, 3))
    found = run_ranks(world, lambda r: eager(r, torch.float64, 3))
    assert_close([model for model, _ in found], truth, 1e-12)
    norms = {optimizer.watch.read().norm for _, optimizer in found}
    assert len(norms) == 1
    assert norms.pop() == pytest.approx(alone.watch.read().norm, rel=1e-6)


@pytest.mark.parametrize("world", WORLDS)
def test_moments_are_kept_once(world):
    (_, alone), *_ = run_ranks(1, lambda r: eager(r, torch.float64, 2))
    found = [optimizer for _, optimizer in run_ranks(world, lambda r: eager(r, torch.float64, 2))]
    whole, states = alone.state_dict(), [optimizer.state_dict() for optimizer in found]
    seen = {name: torch.zeros(len(x) if x.dim() else 1) for name, x in whole.items()}
    for optimizer, tensors in zip(found, states, strict=True):
        assert optimizer.rows().keys() == tensors.keys()
        for name, (shape, rows) in optimizer.rows().items():
            assert shape == whole[name].shape
            start = 0
            for at, count, step in rows:
                there = tensors[name][start : start + count] if shape else tensors[name]
                want = whole[name][at::step][:count] if shape else whole[name]
                torch.testing.assert_close(there, want, rtol=1e-10, atol=1e-14)
                seen[name][at::step][:count] += 1
                start += count
    assert all((count == 1).all() for count in seen.values())
    for rank, optimizer in enumerate(found):
        rows = optimizer.rows()
        ((first, _, step),) = rows["transformer.wte.weight.exp_avg"][1]
        ((start, count, by_one),) = rows["lm_head.weight.exp_avg"][1]
        assert (first, step, by_one) == (rank, world, 1)
        assert start == rank * 320 // world and start + count == (rank + 1) * 320 // world
    sizes = [sum(x.numel() for x in tensors.values()) for tensors in states]
    assert max(sizes) < 1.3 * sum(sizes) / world


@pytest.mark.parametrize("worlds", [(2, 3), (3, 1), (1, 2)])
def test_state_moves_between_numbers_of_ranks(worlds):
    """A run that changes its number of ranks in mid-way goes on as if it had not."""
    (truth, alone), *_ = run_ranks(1, lambda r: eager(r, torch.float64, 4))
    before = run_ranks(worlds[0], lambda r: eager(r, torch.float64, 2))
    whole = {name: torch.empty_like(x) for name, x in alone.state_dict().items()}
    for _, optimizer in before:
        tensors = optimizer.state_dict()
        for name, (shape, rows) in optimizer.rows().items():
            pieces = tensors[name].split([n for _, n, _ in rows]) if shape else [tensors[name]]
            for (at, count, step), part in zip(rows, pieces, strict=True):
                (whole[name][at::step][:count] if shape else whole[name]).copy_(part)

    def go_on(ranks):
        model, optimizer = eager(ranks, torch.float64, 0)
        model.load_state_dict(before[0][0].state_dict())
        optimizer.load_state_dict(whole, 2)
        take_steps(model, optimizer, ranks, 2, first=2)
        return model

    assert_close(run_ranks(worlds[1], go_on), truth, 1e-12)


def test_a_state_that_lacks_what_another_rank_owns_is_refused():
    def check(ranks):
        _, optimizer = eager(ranks, torch.float32, 1)
        pieces = ranks.collect((optimizer.state_dict(), optimizer.rows()))
        shapes = {name: rows[0] for _, found in pieces for name, rows in found.items()}
        whole = {name: torch.zeros(shape) for name, shape in shapes.items()}
        with pytest.raises(UserError, match="exp_avg"):
            optimizer.load_state_dict(
                {n: x for n, x in whole.items() if n != "value_embeds.3.weight.exp_avg"}, 1
            )
        optimizer.load_state_dict(whole, 7)
        return optimizer.step_count

    assert run_ranks(2, check) == [7, 7]


@pytest.mark.parametrize("bad_rank", [0, 1, 2])
def test_one_rank_that_is_not_finite_stops_the_update_of_all(bad_rank):
    def check(ranks):
        model, optimizer = eager(ranks, torch.float32, 1)
        before = [p.detach().clone() for p in model.parameters()]
        for name, p in model.named_parameters():
            p.grad = torch.ones_like(p)
            if ranks.rank == bad_rank and name == "transformer.h.1.mlp.c_fc.weight":
                p.grad[3, 5] = float("nan")
        optimizer.step(1.0, 0.9, 0.1)
        found = optimizer.watch.read()
        assert found.first_step == 2
        assert found.names == ("transformer.h.1.mlp.c_fc.weight",)
        return all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    assert run_ranks(3, check) == [True] * 3


def fused(ranks, gemm, **fields):
    """After a step of a FusedGPT: both layouts of its operands, and its parameters' values."""
    sizes = {"sequence_len": 32, "vocab_size": 64, "bigram_embed_factor": 1, **fields}
    model = random_model(GPTConfig.from_depth(head_dim=16, **sizes), torch.float32)
    called = FusedGPT(model, gemm(), peers=peers_of(ranks))
    optimizer = fused_optimizer(called, OptimConfig(), 0.5, ranks)
    called.operands.recorded = True
    take_steps(model, optimizer, ranks, 1)
    assert ranks.world == 1 or len(optimizer.sharing.routes) == len(model.tables())
    assert all(not p.grad.any() for p in model.parameters())
    follow(called)
    found = {f"{weight.name} at once": weight.wire.clone() for weight in called.weights.all()}
    state = {name: x.clone() for name, x in called.operands.state_dict().items()}
    with gathered(called):  # as a run that goes on with an evaluation
        called.operands.load_state_dict(state)
        follow(called)
    for weight in called.weights.all():
        x = weight.operand
        pair = (x.data.float(), x.transposed.t().float()) if isinstance(x, FP8Operand) else (x, x)
        found[weight.name] = torch.stack(pair)
    with gathered(called):
        found |= {name: p.detach().clone() for name, p in model.named_parameters()}
        for weight in called.weights.all():
            rows = [linear.weight for linear in weight.linears]
            assert torch.equal(weight.plain(), torch.cat(rows)), weight.name
    return found


GROUPED = {"depth": 2, "aspect_ratio": 16, "n_kv_head": 1}  # q, k and v lie between each other
UNEVEN = {"depth": 1, "aspect_ratio": 32}  # 3 ranks share 64 rows of lm_head


@pytest.mark.cpu
@pytest.mark.skipif(not HAS_TRITON, reason="the kernels need Triton")
@pytest.mark.parametrize("gemm, world, fields", [(PlainGemm, 2, GROUPED), (TorchGemm, 3, UNEVEN)])
def test_kernels_update_as_one(gemm, world, fields, short_muon):
    """Weights, and the operands that their owners make of them, to the bit."""
    truth, *_ = run_ranks(1, lambda r: fused(r, gemm, **fields))
    for found in run_ranks(world, lambda r: fused(r, gemm, **fields)):
        assert found.keys() == truth.keys()
        differ = [name for name, x in found.items() if not torch.equal(x, truth[name])]
        assert not differ


def trained_on_a_gpu(ranks, gemm, graphs):
    """Losses and values after some steps of two micro-steps each."""
    sizes = {"sequence_len": 64, "vocab_size": 128, "bigram_embed_factor": 2}
    model = random_model(GPTConfig.from_depth(4, 64, 64, **sizes), torch.bfloat16, device="cuda")
    model.attention = SDPAttention(deterministic=True)
    called = FusedGPT(model, gemm(), graphs, peers_of(ranks)).train()
    optimizer = fused_optimizer(called, OptimConfig(), 0.5, ranks)
    generator, found = torch.Generator().manual_seed(ranks.rank), []
    for step in range(CALIBRATED_STEPS + 4):
        for _ in range(2):
            tokens, targets = torch.randint(128, (2, 8, 64), generator=generator)
            found.append(called(tokens.cuda(), targets.cuda()))
            optimizer.note(tokens)
            # each rank in its own thread: autograd has one for all of a GPU, and in FP8 ranks meet
            with torch.autograd.set_multithreading_enabled(False):
                (0.25 * found[-1]).backward()
        optimizer.step(0.5, 0.9 + 0.01 * (step % 3), 0.1)
        optimizer.zero_grad()
        follow(called)
    assert (called.graphed is not None) == graphs
    updates = [bucket.update for bucket in optimizer.buckets if bucket.update]
    assert all((update.graphed.graph is not None) == graphs for update in updates)
    assert (called.operands.refreshing.graph is not None) == graphs
    completed = called.operands.completing.graph is not None
    assert completed == (graphs and called.precision.gemm.fp8)
    with gathered(called):
        return [x.detach().clone() for x in (*found, *model.parameters())]


@pytest.mark.cuda
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("gemm", [PlainGemm, TorchGemm])
def test_what_is_under_way_changes_nothing_on_a_gpu(gemm, graphs):
    """Two ranks share this GPU, where what comes is NaN until it was waited for: bit for bit as
    where each transfer is waited for at once."""

    def at_once(ranks):
        swap = ranks.swap

        def waited(sends, receives):
            swap(sends, receives).wait()
            return Pending()

        ranks.swap = waited
        return trained_on_a_gpu(ranks, gemm, graphs)

    def poisoned(ranks):
        swap = ranks.swap

        def late(sends, receives):
            for _, x in receives:
                x.view(torch.uint8).fill_(255)
            return swap(sends, receives)

        ranks.swap = late
        return trained_on_a_gpu(ranks, gemm, graphs)

    for found, wanted in zip(run_ranks(2, poisoned), run_ranks(2, at_once), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("gemm", [PlainGemm, TorchGemm])
def test_graphs_change_nothing_on_a_gpu(gemm):
    """Bit for bit, of the pass and of each bucket's update."""
    with_graphs, without = (
        run_ranks(2, lambda ranks, graphs=graphs: trained_on_a_gpu(ranks, gemm, graphs))
        for graphs in (True, False)
    )
    for found, wanted in zip(with_graphs, without, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_gradients_of_others_are_cleared_in_whole_tensors(monkeypatch):
    """Rows that lie apart are slow to write; the matrices of this rank stay as they are."""
    cleared, clear = [], torch._foreach_zero_
    monkeypatch.setattr(torch, "_foreach_zero_", lambda xs: (cleared.extend(xs), clear(xs)))

    def check(ranks):
        model, optimizer = eager(ranks, torch.float32, 0)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.sharing.clear_sent(optimizer.buckets)
        owned = [part for bucket in optimizer.buckets for part in bucket.owned]
        tables = {e.weight for e in model.tables()} | {model.lm_head.weight}
        for part in owned:
            mine = part.owner == ranks.rank and part.params[0] not in tables
            assert part.grad().any() == mine
        return len(owned)

    assert min(run_ranks(3, check)) > 10
    assert cleared and all(x.is_contiguous() for x in cleared)


def test_buckets_of_tables_change_nothing(monkeypatch):
    """However few tables travel together, the weights are the same, to the bit."""
    together = run_ranks(3, lambda r: eager(r, torch.float32, 2))
    monkeypatch.setattr(parts, "BUCKET_BYTES", 1)
    apart = run_ranks(3, lambda r: eager(r, torch.float32, 2))
    assert len(apart[0][1].buckets) > len(together[0][1].buckets)
    pairs = zip(together[0][0].parameters(), apart[0][0].parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def test_every_rank_sends_its_part_of_each_gradient_and_value_once():
    def count(ranks):
        model, optimizer = eager(ranks, torch.float32, 0)
        size = sum(p.numel() * 4 for p in model.parameters())
        take_steps(model, optimizer, ranks, 1, note=False)
        return ranks.moved / size

    # (W - 1) / W of the gradients and of the values each, whatever small tensors add
    shares = run_ranks(4, count)
    assert sum(shares) / 4 == pytest.approx(2 * 3 / 4, rel=0.05)
    assert max(shares) < 1.2 * min(shares)


def test_small_words_do_not_queue_behind_what_takes_long():
    """Transfers of all ranks go one after the other. In turn: numbers of rows; the sums of squares,
    and of what is everybody's; gradients and values; the norm."""

    def order(ranks):
        calls = []
        for name in ("swap", "gather", "maximum_"):
            run = getattr(ranks, name)

            def noted(*args, name=name, run=run):
                calls.append(name)
                return run(*args)

            setattr(ranks, name, noted)
        eager(ranks, torch.float32, 1)
        return calls

    for calls in run_ranks(3, order):
        assert calls[:3] == ["swap", "gather", "gather"] and calls[-1] == "gather"
        assert len(calls) > 10 and set(calls[3:-1]) == {"swap"}


@pytest.mark.parametrize("world", [2, 3, 4])  # each has tokens
def test_rows_that_occurred_give_the_bits_of_all_rows(world):
    """In fp64, where gradients are no round numbers and sums depend on their order."""

    def train(ranks, note):
        model, _ = eager(ranks, torch.float64, 2, note=note)
        return model, ranks.moved

    rows, whole = (run_ranks(world, lambda r, n=note: train(r, n)) for note in (True, False))
    for (model, fewer), (dense, bytes_sent) in zip(rows, whole, strict=True):
        assert fewer < 0.85 * bytes_sent  # values return whole either way
        pairs = zip(model.parameters(), dense.parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize(
    "columns, words", [(4, torch.int64), (12, torch.int64), (6, torch.bfloat16)]
)
def test_rows_that_lie_apart_are_copied_in_words_where_they_have_whole_ones(columns, words):
    table = torch.randn(9, columns).bfloat16()
    rows, values = table[1::2], torch.randn(4, columns).bfloat16()
    before = table[::2].clone()
    assert _in_words(rows).dtype == words
    _in_words(rows).copy_(_in_words(values))
    assert torch.equal(table[1::2], values) and torch.equal(table[::2], before)


def total(*values, dtype=torch.float32, out=None):
    """The sum of one-element tensors, written where the part of the given index is."""
    parts = [torch.tensor([x], dtype=dtype) for x in values]
    place = torch.empty(1, dtype=dtype) if out is None else parts[out]
    add_in_rank_order(parts, place)
    return place.item()


def test_what_travels_as_one_is_aligned_as_each_wants_it():
    like = [
        torch.empty(0, dtype=dtype)
        for dtype in (torch.bfloat16, torch.float32, torch.bfloat16, torch.float64, torch.float32)
    ]
    shapes = [(5, 3), (3, 4), (7, 8), (2, 1), (3, 1)]  # rows of 6, 16, 16, 8 and 4 bytes
    room, views = room_for(shapes, like)
    assert room.nbytes == sum(view.nbytes for view in views) and room.is_contiguous()
    for number, (view, shape, x) in enumerate(zip(views, shapes, like, strict=True)):
        assert view.shape == shape and view.dtype == x.dtype
        row = shape[1] * x.element_size()
        assert (view.data_ptr() - room.data_ptr()) % math.gcd(row, 16) == 0
        view.fill_(number)
    assert all((view == number).all() for number, view in enumerate(views))
    (alone,) = room_for(shapes[:1], like[:1])[1]
    assert alone.dtype == torch.bfloat16 and alone.shape == (5, 3)


@pytest.mark.parametrize("out", [None, 0, 1, 2])
def test_sums_are_in_rank_order_and_rounded_once(out):
    tiny = 2.0**-9
    assert total(1, tiny, tiny, dtype=torch.bfloat16, out=out) == 1  # 1 + 2^-8 is halfway
    assert total(1, 2 * tiny, tiny, dtype=torch.bfloat16, out=out) == 1 + 2.0**-7
    assert total(2.0**24, 1, 1, out=out) == 2.0**24  # from the first on, one after another
    assert total(1, 1, 2.0**24, out=out) == 2.0**24 + 2
    assert total(1, 2.0**-40, 2.0**-40, dtype=torch.float64, out=out) == 1 + 2.0**-39


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_two_parts_are_added_as_any_number_is(dtype):
    a, b = (torch.randn(1000, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    a, b = a.to(dtype), (b * torch.logspace(-4, 4, 1000)).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    expected = (a.to(wide) + b.to(wide)).to(dtype)
    add_in_rank_order([a, b], a)
    assert torch.equal(a, expected)


@pytest.mark.parametrize("own", [0, 1, 2])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parts_of_some_rows_are_added_as_zeros_elsewhere_would_be(world, own, dtype):
    """Into every second row of a table; a part may have no row."""
    own = min(own, world - 1)
    generator = torch.Generator().manual_seed(own)
    table, parts, rows = torch.zeros(14, 3, dtype=dtype), [], []
    for rank in range(world):
        part = torch.randn(7, 3, generator=generator).to(dtype)
        there = None if rank == own else torch.randperm(7, generator=generator)[: 5 * (rank < 2)]
        if there is not None:
            keep = torch.zeros(7, 1, dtype=torch.bool)
            keep[there] = True
            part.masked_fill_(~keep, 0)
        parts.append(part)
        rows.append(there if there is None else there.int())
    expected = torch.empty(7, 3, dtype=dtype)
    add_in_rank_order(parts, expected)
    out = table[1::2]
    out.copy_(parts[own])
    some = [x if r is None else x[r.long()] for x, r in zip(parts, rows, strict=True)]
    some[own] = out
    add_in_rank_order(some, out, rows)
    assert torch.equal(out, expected) and not table[::2].any()
