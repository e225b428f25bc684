"""What the ranks of a test do; tests.train.forks starts them."""

import os
import time
import warnings

import torch

from nanofuse.kernels import newton_schulz
from nanofuse.model.fp8.products import TorchGemm
from nanofuse.train import ranks as module
from nanofuse.train.errors import PeerFailed
from tests.train.optim.test_sharing import UNEVEN
from tests.train.optim.test_sharing import fused as step_of_fused


def methods(ranks):
    """Every method of Ranks, on tensors of many kinds."""
    rank, world = ranks.rank, ranks.world
    others = [peer for peer in range(world) if peer != rank]

    def rows(sender, receiver):  # uneven, some of them empty
        return torch.arange((2 * sender + receiver) % 4 * 3).view(-1, 3) + 10 * sender + receiver

    for dtype in (torch.float32, torch.bfloat16, torch.uint8, torch.float64):
        sends = [(peer, rows(rank, peer).to(dtype)) for peer in others]
        wanted = [(peer, rows(peer, rank).to(dtype)) for peer in others]
        receives = [(peer, torch.full_like(x, 99)) for peer, x in wanted]
        ranks.swap(sends, receives).wait()
        for (_, x), (_, y) in zip(receives, wanted, strict=True):
            assert torch.equal(x, y)
    ranks.swap([], []).wait()

    parts = [torch.tensor([1e8, 1.0]), torch.tensor([1.0, 2.0]), torch.tensor([-1e8, 4.0])][:world]
    assert torch.equal(ranks.gather(parts[rank]), torch.stack(parts))
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    assert torch.equal(ranks.total(parts[rank]), total)  # in the order of the ranks
    largest = torch.tensor([float(rank), -float(rank)])
    ranks.maximum_(largest)
    assert largest.tolist() == [world - 1, 0]

    assert ranks.agree() == ()
    assert ranks.agree(rank, 7 - rank, rank == 1) == (world - 1, 7, 1)
    assert ranks.share(f"from {rank}") == "from 0"
    assert ranks.collect({"rank": rank}) == [{"rank": peer} for peer in range(world)]
    assert ranks.by_main(lambda x: (x, os.getenv("RANK")), 3) == (3, "0")
    try:
        ranks.by_main(lambda: {}[1])
        raise AssertionError("it has failed")
    except (KeyError, PeerFailed) as error:
        assert isinstance(error, KeyError if ranks.main else PeerFailed)


def fused(ranks):
    """A step of the fused pass: all ranks have the same operands, FP8, and values to gather."""
    warnings.simplefilter("ignore")  # of the interpreter's
    newton_schulz._segments = lambda shape, gram: (newton_schulz.POLAR_EXPRESS[:1],)
    found = step_of_fused(ranks, TorchGemm, **UNEVEN)
    sums = ranks.collect({name: x.double().sum().item() for name, x in found.items()})
    assert all(each == sums[0] for each in sums)


def out_of_step(ranks):
    """Ranks that wait for each other in different calls."""
    if ranks.main:
        ranks.agree(1)
    else:
        ranks.collect(1)


def one_stays(ranks):
    """Rank 1 does not leave with the others, when all is done."""
    module.LEAVING_SECONDS = 1
    if ranks.rank == 1:
        ranks.agree()
        ranks.guard.stop()
        time.sleep(5)
        os._exit(0)


def one_fails(ranks):
    """Rank 1 leaves with an error that the others hear of while they wait."""
    if ranks.rank == 1:
        raise ValueError("of rank 1")
    ranks.agree()
