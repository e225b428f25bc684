"""The bench's schemes give the weights of one process."""

import contextlib
from functools import partial

import pytest
import torch

from nanofuse.bench.schemes import AllReduced, Nanochat, whole_storages
from nanofuse.kernels.common.jit import HAS_TRITON
from nanofuse.model.config import GPTConfig
from nanofuse.model.fp8.products import PlainGemm
from nanofuse.model.fused import FusedGPT
from nanofuse.train.optim.config import OptimConfig
from nanofuse.train.optim.muon_adamw import MuonAdamW
from nanofuse.train.optim.updates import EagerUpdate, KernelUpdate
from nanofuse.train.ranks import Pending
from tests.helpers import random_model, small_config
from tests.train.optim.test_sharing import assert_close, take_steps
from tests.train.thread_ranks import run_ranks


class ThreadCollectives:
    """bench.collectives.Collectives over ranks that are threads; done at once."""

    def __init__(self, ranks):
        self.ranks, self.rank, self.world = ranks, ranks.rank, ranks.world

    def all_reduce(self, x):
        x.copy_(self.ranks.total(x))
        return Pending()

    def reduce_scatter(self, part, whole):
        assert whole.is_contiguous() and whole.size(0) == self.world * part.size(0)
        part.copy_(self.ranks.total(whole).view(self.world, *part.shape)[self.rank])
        return Pending()

    def all_gather(self, whole, part):
        whole.view(self.world, *part.shape).copy_(self.ranks.gather(part))
        return Pending()


def phase(name):
    return contextlib.nullcontext()


def eager(ranks, scheme, steps=2):
    """A model after some steps."""
    model = random_model(small_config(), torch.float32).double()
    update = partial(EagerUpdate, newton_schulz_dtype=torch.float64)
    numbers = model.param_roles(), OptimConfig(), model.config.n_embd, 0.5, update
    if ranks.world == 1:
        optimizer = MuonAdamW(*numbers)
    elif scheme == "nanochat":
        optimizer = Nanochat(*numbers, ThreadCollectives(ranks), phase)
    else:
        optimizer = AllReduced(MuonAdamW(*numbers), ThreadCollectives(ranks), phase)
    take_steps(model, optimizer, ranks, steps)
    return model


@pytest.mark.parametrize("scheme, world", [("nanochat", 2), ("nanochat", 5), ("all-reduce", 2)])
def test_a_scheme_updates_as_one_process(scheme, world):
    """Of 5 ranks the last have zeros for matrices."""
    truth, *_ = run_ranks(1, lambda ranks: eager(ranks, scheme))
    assert_close(run_ranks(world, lambda ranks: eager(ranks, scheme)), truth, 1e-12)


@pytest.mark.cpu
@pytest.mark.skipif(not HAS_TRITON, reason="the kernels need Triton")
def test_nanochats_scheme_by_the_kernels():
    config = GPTConfig.from_depth(1, 32, 16, sequence_len=32, vocab_size=64, bigram_embed_factor=1)

    def fused(ranks):
        model = random_model(config, torch.float32)
        numbers = model.param_roles(), OptimConfig(), config.n_embd, 0.5
        if ranks.world == 1:
            update = partial(EagerUpdate, newton_schulz_dtype=torch.float32)
            optimizer = MuonAdamW(*numbers, update)
        else:
            FusedGPT(model, PlainGemm())  # stores the matrices in stacks
            optimizer = Nanochat(*numbers, KernelUpdate, ThreadCollectives(ranks), phase)
        take_steps(model, optimizer, ranks, 1)
        assert ranks.world == 1 or all(not p.grad.any() for p in model.parameters())
        return model

    truth, *_ = run_ranks(1, fused)
    assert_close(run_ranks(2, fused), truth, 1e-5)


def test_rows_that_the_ranks_do_not_divide_are_refused():
    def build(ranks):
        with pytest.raises(ValueError, match="lm_head.weight has 320 rows, which 3 does not"):
            eager(ranks, "nanochat", steps=0)

    run_ranks(3, build)


def test_gradients_of_one_storage_are_one_tensor():
    stack, other = torch.zeros(3, 2, 4), torch.zeros(5, dtype=torch.bfloat16)
    found = whole_storages([stack[2], other, stack[0].t(), stack[1]])
    assert [(x.numel(), x.dtype) for x in found] == [(24, stack.dtype), (5, other.dtype)]
    assert found[0].data_ptr() == stack.data_ptr()
