"""What one of several ranks sends and receives of a model's matrices, and what it has of them."""

import pytest
import torch

from nanofuse.kernels.common.jit import HAS_TRITON
from nanofuse.model.fp8.peers import Peers
from nanofuse.model.fp8.products import PlainGemm, TorchGemm
from nanofuse.model.fused import FusedGPT
from nanofuse.train.assemble import peers_of
from tests.helpers import random_model
from tests.model.test_fused import DEVICE, make
from tests.train.thread_ranks import run_ranks


def test_a_rank_sends_its_rows_to_all_and_receives_those_of_their_owners():
    x, y = torch.arange(12.0).view(6, 2), torch.arange(8.0).view(4, 2)
    parts = [(0, slice(0, 2)), (1, slice(2, 2)), (2, slice(2, 6))]
    moved = []
    peers = Peers(0, 3, None, None, lambda *both: moved.extend(both), None)
    peers.spread([([(1, slice(0, 4))], y), (parts, x)])
    sends, receives = ([(peer, z.tolist()) for peer, z in each] for each in moved)
    assert sends == [(1, x[:2].tolist()), (2, x[:2].tolist())]
    assert receives == [(1, y.tolist()), (1, []), (2, x[2:].tolist())]
    moved[1][2][1].zero_()
    assert not x[2:].any()  # where they belong


@pytest.mark.skipif(not HAS_TRITON, reason="the kernels need Triton")
@pytest.mark.parametrize("gemm", [PlainGemm, TorchGemm])
def test_masters_lie_with_their_owners_alone(gemm):
    def build(ranks):
        model = random_model(make(depth=2, aspect=8, vocab_size=64), torch.float32, device=DEVICE)
        weights = FusedGPT(model, gemm(), peers=peers_of(ranks)).weights
        held = {weight.name: weight.master.numel() for weight in weights.all()}
        there = sum(weight.whole is not None for weight in weights.all())
        parameters = [linear.weight for w in weights.all() for linear in w.linears]
        sizes = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}
        for weight in weights.all():
            if gemm is TorchGemm and weight.whole is None:
                with pytest.raises(RuntimeError, match=f"{weight.name} is another rank's"):
                    weight.plain()
        with weights.gathered():
            assert all(weight.whole is not None for weight in weights.all())
        assert sum(weight.whole is not None for weight in weights.all()) == there
        return held, sum(sizes.values()), {w.name: w.grad.numel() for w in weights.all()}

    found = run_ranks(2, build)
    for name, size in found[0][2].items():
        assert sum(held[name] for held, *_ in found) == size
    lm_head, whole = found[0][2]["lm_head"], sum(found[0][2].values())
    # what parameters take: the matrices' masters once, over all ranks, and a NaN for each other one
    taken = sum(nbytes for _, nbytes, _ in found)
    assert 0 <= taken - 4 * (whole - lm_head) < 200
    assert all(held["lm_head"] == lm_head / 2 for held, *_ in found)


@pytest.mark.skipif(not HAS_TRITON, reason="the kernels need Triton")
@pytest.mark.parametrize("gemm", [PlainGemm, TorchGemm])
def test_operands_are_those_of_one_rank_from_the_start(gemm):
    """Before any update, and where they lay when they were first read."""

    def build(ranks):
        model = random_model(make(depth=2, aspect=8, vocab_size=64), torch.float32, device=DEVICE)
        fused = FusedGPT(model, gemm(), peers=peers_of(ranks) if ranks.world > 1 else None)
        weights = fused.weights.all()
        before = [weight.wire.data_ptr() for weight in weights]
        wires = {weight.name: weight.wire.clone() for weight in weights}
        turned = {
            weight.name: weight.operand.transposed.view(torch.uint8).clone()
            for weight in weights
            if gemm is TorchGemm
        }
        with fused.weights.gathered():  # as after a step, in which all are made anew
            fused.operands.load_state_dict({})
        fused.operands.follow()
        assert [weight.wire.data_ptr() for weight in weights] == before
        return wires, turned

    (truth,) = run_ranks(1, build)
    for found in run_ranks(2, build):
        for mine, wanted in zip(found, truth, strict=True):
            assert mine.keys() == wanted.keys()
            assert all(torch.equal(x, wanted[name]) for name, x in mine.items())
