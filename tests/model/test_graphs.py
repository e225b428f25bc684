"""GraphedPass without a GPU: fake CUDA graphs run what they record at once, and replay nothing.

tests/model/test_fused.py compares real graphs on a GPU.
"""

from contextlib import nullcontext

import pytest
import torch

from nanofuse.model.fp8.products import PlainGemm
from nanofuse.model.fused import FusedGPT
from nanofuse.model.graphs import GraphedCall
from tests.helpers import random_model
from tests.model.test_fused import DEVICE, batch, make


class FakeGraph:
    """Counts its replays."""

    def __init__(self):
        self.replays = 0

    def pool(self):
        return None

    def replay(self):
        self.replays += 1


@pytest.fixture(scope="module")
def recorded():
    """A FusedGPT in training that has recorded its pass, and the batch."""
    config = make(depth=1, vocab_size=64)
    fused = FusedGPT(random_model(config, torch.float32, device=DEVICE), PlainGemm(), True).train()
    data = batch(config)
    first = fused(*data)
    first.backward()
    assert fused.graphed is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
        records = []

        def record(graph, pool=None, capture_error_mode="global"):
            assert capture_error_mode == "thread_local"  # NCCL has a thread that calls CUDA
            records.append(graph)
            return nullcontext()

        patch.setattr(torch.cuda, "graph", record)
        again = fused(*data)  # records
    assert records == list(fused.graphed.graphs)
    assert again.item() == first.item()
    again.backward()
    return fused, data


def test_each_pass_is_replayed_once(recorded):
    fused, data = recorded
    forward, backward = fused.graphed.graphs
    before = forward.replays, backward.replays
    assert min(before) >= 1  # already the pass that recorded them
    fused(*data).backward()
    assert (forward.replays, backward.replays) == (before[0] + 1, before[1] + 1)


def test_inputs_are_copied_to_where_the_graphs_read(recorded):
    fused, (tokens, targets) = recorded
    fused(tokens + 1, targets.clone().fill_(3))
    assert torch.equal(fused.graphed.tokens, tokens + 1)
    assert fused.graphed.targets.eq(3).all()


def test_a_loss_must_be_differentiated_before_the_next(recorded):
    fused, data = recorded
    first = fused(*data)
    fused(*data).backward()
    with pytest.raises(RuntimeError, match="before the next"):
        first.backward()


def test_another_shape_is_refused(recorded):
    fused, (tokens, targets) = recorded
    with pytest.raises(ValueError, match="run that batch without"):
        fused(tokens[:1], targets[:1])


def test_launches_are_recorded_once_they_are_settled(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **kwargs: nullcontext())
    launches, function = GraphedCall((0, 1)), lambda: calls.append("call")
    launches(function, settled=False)
    launches(function)  # compiles what it launches from now on
    assert launches.graph is None and len(calls) == 2
    launches(function)
    graph = launches.graph
    assert graph.replays == 1 and len(calls) == 3  # it was recorded
    launches(function)
    assert graph.replays == 2 and len(calls) == 3
    launches(function, settled=False)  # such as with scales that are calibrated anew
    launches(function)
    assert graph.replays == 2 and len(calls) == 5
    launches(function)
    assert launches.graph is graph and graph.replays == 3 and len(calls) == 5


def test_launches_without_a_pool_are_calls():
    calls = []
    launches = GraphedCall(None)
    for _ in range(3):
        launches(lambda: calls.append("call"))
    assert launches.graph is None and len(calls) == 3
