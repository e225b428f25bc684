"""The gradients of every step, watched on the device: their norm, and steps that are not finite.

Nothing here waits for the device but `read`, which the training loop calls where it logs.
"""

from dataclasses import dataclass

import torch

NAMED = 3  # tensors that a report names


@dataclass(frozen=True)
class Gradients:
    """What `GradientWatch.read` found.

    Attributes:
        norm: of all gradients of the latest step; NaN or Inf where one was not finite.
        nonfinite_steps: steps so far, in this process, with a gradient that was not finite.
        first_step: the first of them since the last `forget`, 0 without one.
        names: the first tensors whose gradient was not finite in that step.
    """

    norm: float
    nonfinite_steps: int
    first_step: int
    names: tuple[str, ...]


class GradientWatch:
    """Norm and finiteness of a model's gradients.

    Args:
        names: of the T gradients.
        device: where they lie.

    Attributes:
        ok: (1,) fp32, 1 where the latest step's gradients were finite, else 0.
    """

    def __init__(self, names, device):
        self.names = list(names)
        self.ok = torch.ones(1, device=device)
        self.norm = torch.zeros((), device=device)
        self.count, self.first = (torch.zeros((), dtype=torch.int64, device=device) for _ in "ab")
        self.bad = torch.zeros(len(self.names), dtype=torch.bool, device=device)

    @torch.no_grad()
    def take(
        self,
        squares,  # (T,) fp32 sums of squares of the gradients
        step,
    ):
        """Take note of a step's gradients; steps count from 1."""
        total = squares.sum()
        finite = torch.isfinite(total)
        self.norm.copy_(total.sqrt())
        self.ok.copy_(finite)
        new = ~finite & (self.first == 0)
        self.bad |= new & ~torch.isfinite(squares)
        self.first += new * step
        self.count += ~finite

    def forget(self):
        """Start anew looking for the first step that is not finite."""
        self.first.zero_()
        self.bad.zero_()

    def read(self):
        """The Gradients so far; waits for the device."""
        at = torch.nonzero(self.bad)[:, 0].tolist()
        names = tuple(self.names[i] for i in at[:NAMED])
        return Gradients(self.norm.item(), self.count.item(), self.first.item(), names)
