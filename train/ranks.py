"""The processes of one run, one a GPU, and every word that passes between them.

Everything of torch.distributed is here. What trains gets an object with the methods of `Alone`,
which is a run of one process; `Ranks` is one of several, made by torchrun or by --gpus. Tensors on
a GPU travel by NCCL, all else by Gloo. Sums are made here in the order of the ranks, so that their
bits depend on no library's algorithm; a maximum has no order.

NVLink multicast stays off, unless the environment says otherwise.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

START_SECONDS = 3600  # for the slowest rank to build caches, train a tokenizer and compile
NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}


@dataclass(frozen=True)
class Place:
    """Where a process stands: its rank of `world`, and its GPU of the host."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def of_environment(cls):
        """As torchrun and --gpus say it; the only process without them."""
        names = ("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")
        return cls(*(int(os.environ.get(*name)) for name in names))


class Pending:
    """Transfers on their way; `wait` orders what follows behind them."""

    def __init__(self, works=()):
        self.works = works

    def wait(self):
        """Have the current stream (on a CPU: this thread) wait for them."""
        for work in self.works:
            work.wait()


class Alone:
    """A run of one process: nothing to exchange, nobody to wait for."""

    rank, world, main = 0, 1, True

    def swap(self, sends, receives):
        """Move tensors between ranks.

        Args:
            sends, receives: [(rank, tensor)], contiguous; what two ranks move between each other
                stands in one order on both sides.

        Returns:
            Pending; until it was waited for the tensors must stay as they are.
        """
        if sends or receives:
            raise ValueError("a run of one process has nobody to swap with")
        return Pending()

    def gather(
        self,
        x,  # any shape, the same on every rank
    ):
        """x of every rank, (world, *x.shape)."""
        return x[None]

    def total(
        self,
        x,  # any shape, the same on every rank
    ):
        """The sum over all ranks, in their order."""
        parts = self.gather(x)
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total

    def maximum_(
        self,
        x,  # any shape, the same on every rank
    ):
        """Replace x by the largest over all ranks, element by element; a NaN may be lost."""

    def agree(self, *numbers):
        """The largest of each number over all ranks; every rank waits for every other one."""
        return numbers

    def share(self, thing):
        """Rank 0's thing (anything that pickles) on every rank."""
        return thing

    def collect(self, thing):
        """[thing of rank 0, of rank 1, …] on every rank."""
        return [thing]

    def close(self):
        """Leave the others."""


ALONE = Alone()


class Ranks(Alone):
    """A run of several processes, each of which calls the same methods in the same order.

    Args:
        place: Place.
        device: of the tensors that travel: a GPU, for NCCL, or the CPU, for Gloo.
    """

    def __init__(self, place, device):
        self.rank, self.world, self.main = place.rank, place.world, place.rank == 0
        self.device = torch.device(device)
        for name, value in NO_MULTICAST.items():
            os.environ.setdefault(name, value)
        patience = timedelta(seconds=START_SECONDS)
        dist.init_process_group("gloo", rank=self.rank, world_size=self.world, timeout=patience)
        self.host = dist.group.WORLD
        self.fabric = self.host
        if self.device.type == "cuda":
            self.fabric = dist.new_group(backend="nccl")

    def swap(self, sends, receives):
        ops = [dist.P2POp(dist.isend, x, peer, self.fabric) for peer, x in sends]
        ops += [dist.P2POp(dist.irecv, x, peer, self.fabric) for peer, x in receives]
        return Pending(dist.batch_isend_irecv(ops) if ops else ())

    def gather(self, x):
        parts = x.new_empty(self.world, *x.shape)
        dist.all_gather(list(parts.unbind()), x.contiguous(), group=self.fabric)
        return parts

    def maximum_(self, x):
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.fabric)

    def agree(self, *numbers):
        votes = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.host)
        return tuple(votes.tolist())

    def share(self, thing):
        box = [thing]
        dist.broadcast_object_list(box, src=0, group=self.host)
        return box[0]

    def collect(self, thing):
        things = [None] * self.world
        dist.all_gather_object(things, thing, group=self.host)
        return things

    def close(self):
        dist.destroy_process_group()
