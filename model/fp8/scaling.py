"""FP8 scales of the fused path: delayed scaling, from the maxima that the kernels record.

    scale = fp8_max / (MARGIN * max amax of the last HISTORY optimiser steps)

All scales live in a few small tensors on the device and are updated together once per optimiser
step, without a look from the host. A tensor without a history (the first steps of a run) is
calibrated: its kernel runs once to find the maximum and a second time with the scale from it.
Source: delayed scaling as in Transformer Engine's FP8 recipe
(https://docs.nvidia.com/deeplearning/transformer-engine).
"""

import torch

from nanofuse.kernels.common.fp8 import Scaling

HISTORY = 16  # optimiser steps
MARGIN = 2.0  # room for growth between two updates; a power of two costs no precision
CALIBRATED_STEPS = 4  # output projections start at zero: some gradients appear steps later
LARGEST_SCALE = 2.0**64  # an infinite one would turn zeros into NaN, this leaves room in fp32
SLOT = 4  # floats a scale: cuBLAS refuses scales that do not lie at a multiple of 16 bytes


class DelayedScaling:
    """Scales of named tensors.

    Args:
        dtypes: {name: torch.float8_e4m3fn or torch.float8_e5m2}.
        device: where the scales live.

    Attributes:
        history: (HISTORY, S) fp32 maxima of the latest steps, the running one not included.
        scale, inverse_scale, amax: (S, SLOT) fp32, of which the first column counts.
        calibrating: whether `produce` runs twice.
        clipped: () int64, how many tensors went beyond their scale in an optimiser step, summed
            over the steps so far.
    """

    def __init__(self, dtypes, device):
        count = len(dtypes)
        self.fp8_max = torch.tensor([torch.finfo(d).max for d in dtypes.values()], device=device)
        self.history = torch.zeros(HISTORY, count, device=device)
        self.scale, self.inverse_scale = (torch.ones(count, SLOT, device=device) for _ in range(2))
        self.amax = torch.zeros(count, SLOT, device=device)
        self.clipped = torch.zeros((), dtype=torch.int64, device=device)
        self.calibrating = False
        self._index = {name: i for i, name in enumerate(dtypes)}
        self._scalings = {
            name: Scaling(dtype, *(x[i, :1] for x in (self.scale, self.inverse_scale, self.amax)))
            for i, (name, dtype) in enumerate(dtypes.items())
        }

    def calibrate(self, on):
        """Make every scale anew from its tensor, or stop doing so."""
        self.calibrating = on

    def produce(self, name, run):
        """run(scaling) for the named tensor; while calibrating, once more with a fresh scale."""
        scaling = self._scalings[name]
        if self.calibrating:
            run(scaling)
            at = slice(self._index[name], self._index[name] + 1)
            self._rescale(at, torch.maximum(self.amax[at, 0], self.history[:, at].amax(dim=0)))
        return run(scaling)

    def update(self):
        """Take the maxima since the last update into the history and set all scales from it."""
        self.clipped += (self.amax[:, 0] * self.scale[:, 0] > self.fp8_max).sum()
        self.history.copy_(torch.cat([self.amax[None, :, 0], self.history[:-1]]))
        self.amax.zero_()
        self._rescale(slice(None), self.history.amax(dim=0))

    def _rescale(
        self,
        at,
        peak,  # (n,) fp32; where it is 0 the scale stays, where it is NaN the scale becomes NaN
    ):
        known = (peak != 0)[:, None]
        scale = (self.fp8_max[at] / (MARGIN * peak)).clamp_max(LARGEST_SCALE)[:, None]
        self.scale[at] = torch.where(known, scale, self.scale[at])
        self.inverse_scale[at] = torch.where(known, 1 / scale, self.inverse_scale[at])

    def state_dict(self):
        """What a checkpoint needs, {name: tensor}."""
        return {"history": self.history, "scale": self.scale, "inverse_scale": self.inverse_scale}

    def load_state_dict(self, tensors):
        for name, mine in self.state_dict().items():
            mine.copy_(tensors[name])
        self.amax.zero_()


class Unscaled:
    """The same interface where no tensor is quantised: run(None)."""

    calibrating = False
    clipped = None

    def calibrate(self, on):
        """Nothing to calibrate."""

    def produce(self, name, run):
        return run(None)

    def update(self):
        """Nothing to update."""

    def state_dict(self):
        return {}
