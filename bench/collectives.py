"""The collectives of torch.distributed that training does without (train/ranks.py): what the bench
holds it against."""

import torch.distributed as dist

from nanofuse.train.ranks import Pending, all_gather_single

# under the name of torch 2.13, which warns of the older one
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Collectives:
    """Sums and copies over ranks by the library's own algorithms, NCCL's on a GPU. Each call
    returns at once, a train.ranks.Pending.

    Args:
        ranks: train.ranks.Ranks.
    """

    def __init__(self, ranks):
        self.rank, self.world, self.group = ranks.rank, ranks.world, ranks.fabric

    def all_reduce(
        self,
        x,  # any shape, contiguous
    ):
        """Replace x by its sum over all ranks."""
        return Pending([dist.all_reduce(x, group=self.group, async_op=True)])

    def reduce_scatter(
        self,
        part,  # (n, ...)
        whole,  # (world * n, ...)
    ):
        """Write the sum over all ranks of this rank's part of `whole`."""
        return Pending([_reduce_scatter(part, whole, group=self.group, async_op=True)])

    def all_gather(
        self,
        whole,  # (world * n, ...)
        part,  # (n, ...), may be its place in `whole`
    ):
        """Write every rank's part."""
        return Pending([all_gather_single(whole, part, group=self.group, async_op=True)])
