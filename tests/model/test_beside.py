"""What travels beside a pass leaves when it is final, and is waited for where it is read."""

import contextlib

import pytest
import torch

from nanofuse.kernels.common.jit import HAS_TRITON
from nanofuse.model.backends.torch_backends import SDPAttention
from nanofuse.model.beside import Beside, InOrder
from nanofuse.model.fp8.products import PlainGemm, TorchGemm
from nanofuse.model.fp8.scaling import CALIBRATED_STEPS
from nanofuse.model.fused import FusedGPT
from nanofuse.train.assemble import follow, fused_optimizer, gathered, peers_of
from nanofuse.train.optim import sharing
from nanofuse.train.optim.config import OptimConfig
from nanofuse.train.optim.lookups import NOTED
from tests.helpers import not_looked_up, random_model
from tests.model.test_fused import DEVICE, batch, make
from tests.train.thread_ranks import run_ranks

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="the kernels need Triton")


class Late(InOrder):
    """Beside without streams: calls what a test gives, where a stream would record or wait."""

    hides = True

    def __init__(self):
        self.at_mark = self.at_wait = lambda key: None
        self.sent_behind = []

    def mark(self, number):
        self.at_mark(number)

    def behind(self, number=None):
        self.sent_behind.append(number)
        return contextlib.nullcontext()

    def wait(self, name):
        self.at_wait(name)


def test_gradients_are_final_at_their_marks_and_operands_are_waited_for():
    """An operand is NaN until it is waited for; a gradient behind its mark stays as it is."""
    model = random_model(make(depth=2, vocab_size=64), torch.float32, device=DEVICE)
    beside = Late()
    called = FusedGPT(model, PlainGemm(), beside=beside).train()
    named = {p: name for name, p in model.named_parameters()}
    marks, seen, latest = called.final_marks(), {}, []
    assert marks.keys() == named.keys()

    def at_mark(number):
        latest.append(number)
        for p in (p for p, mark in marks.items() if mark == number):
            seen[named[p]] = p.grad.clone()

    stash = {weight.name: weight.operand.clone() for weight in called.weights.all()}
    for weight in called.weights.all():
        weight.operand.fill_(float("nan"))
    operands = {weight.name: weight.operand for weight in called.weights.all()}
    beside.at_mark, beside.at_wait = at_mark, lambda name: operands[name].copy_(stash[name])
    loss = called(*batch(model.config, rows=1))
    assert torch.isfinite(loss)
    loss.backward()
    assert latest == sorted(set(latest)) and latest[-1] == max(marks.values())
    for p, name in named.items():
        assert torch.equal(seen[name], p.grad), name
        assert torch.isfinite(p.grad).all()
    # they leave in the order of the layers: lm_head, then the last layer's, tables at the end
    order = [marks[p] for p in (
        model.lm_head.weight, model.transformer.h[1].mlp.c_fc.weight,
        model.transformer.h[1].attn.c_q.weight, model.transformer.h[0].mlp.c_proj.weight,
        model.transformer.h[0].attn.c_proj.weight, model.transformer.wte.weight,
    )]  # fmt: skip
    assert order == sorted(set(order)) and order[0] == 0
    assert marks[model.value_embeds["1"].weight] == marks[model.transformer.h[1].attn.c_k.weight]


def step_of(ranks, beside, gemm=PlainGemm):
    """Parameters after a step of random gradients."""
    model = random_model(make(depth=2, aspect=8, vocab_size=64), torch.float32)
    called = FusedGPT(model, gemm(), peers=peers_of(ranks), beside=beside)
    optimizer = fused_optimizer(called, OptimConfig(), 0.5, ranks)
    generator = torch.Generator().manual_seed(ranks.rank)
    tokens = torch.randint(64, (1, 12), generator=generator)
    optimizer.note(tokens)
    for p in model.parameters():
        p.grad.copy_(torch.randn(p.shape, generator=generator))
    for table, absent in not_looked_up(model, tokens).items():
        table.grad.masked_fill_(absent, 0)
    optimizer.step(0.5, 0.9, 0.1)
    optimizer.zero_grad()
    assert all(not p.grad.any() for p in model.parameters())
    called.operands.recorded = True
    follow(called)
    with gathered(called):
        values = [p.detach().clone() for p in model.parameters()]
    operands = [weight.wire.clone() for weight in called.weights.all()]
    return values + operands, max(called.final_marks().values())


@pytest.mark.parametrize("gemm, world", [(PlainGemm, 2), (TorchGemm, 3)])
def test_a_step_of_hidden_transfers_is_that_of_plain_ones(gemm, world, short_muon, monkeypatch):
    monkeypatch.setattr(sharing, "STRETCH_BYTES", 1)
    plain = run_ranks(world, lambda ranks: step_of(ranks, InOrder(), gemm))
    orders = [Late() for _ in range(world)]
    hidden = run_ranks(world, lambda ranks: step_of(ranks, orders[ranks.rank], gemm))
    for (found, _), (wanted, _) in zip(hidden, plain, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    for order in orders:
        # the first operands, rows, gradients, and the operands after the step
        first, rows, *numbers, last = order.sent_behind
        assert numbers == sorted(numbers) and set(numbers) > {0, plain[0][1]}
        assert (first, rows, last) == (None, NOTED, None)


def training(ranks, hides, gemm, graphs):
    """Losses and values of some steps of two micro-steps each, on a GPU."""
    model = random_model(make(depth=4, aspect=64, vocab_size=128), torch.bfloat16, device="cuda")
    model.attention = SDPAttention(deterministic=True)
    beside = Beside(torch.device("cuda")) if hides else InOrder()
    called = FusedGPT(model, gemm(), graphs, peers_of(ranks), beside).train()
    optimizer = fused_optimizer(called, OptimConfig(), 0.5, ranks)
    found = []
    for step in range(CALIBRATED_STEPS + 4):
        for micro_step in range(2):
            seed = 100 * step + 10 * micro_step + ranks.rank
            inputs, targets = batch(model.config, rows=8, seed=seed)
            optimizer.note(inputs)
            found.append(called(inputs, targets))
            (0.25 * found[-1]).backward()
        optimizer.step(0.5, 0.9, 0.1)
        optimizer.zero_grad()
        follow(called)
    assert (called.graphed is not None) == graphs
    with gathered(called):
        return [x.detach().clone() for x in (*found, *model.parameters())]


@pytest.mark.cuda
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("gemm", [PlainGemm, TorchGemm])
def test_hidden_transfers_change_nothing(gemm, graphs):
    """Two ranks share this GPU, each with a stream for what travels: bit for bit."""
    plain = run_ranks(2, lambda ranks: training(ranks, False, gemm, graphs))
    hidden = run_ranks(2, lambda ranks: training(ranks, True, gemm, graphs))
    for found, wanted in zip(hidden, plain, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
