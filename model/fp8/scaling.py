"""FP8 scales of the fused pass: delayed scaling, from the amax that the kernels record.

    scale = fp8_max / (MARGIN * largest amax of the last HISTORY optimiser steps)

The scales of all tensors are stored in a few small tensors on the device and updated together once
per optimiser step, without synchronising with the host. In the first steps of a run, when there is
no history, scales are calibrated: the kernel that writes a tensor runs twice, first to record the
amax, then with the scale derived from it. Source: delayed scaling as in Transformer Engine's FP8
recipe (https://docs.nvidia.com/deeplearning/transformer-engine).
"""

import torch

from nanofuse.kernels.common.fp8 import Scaling

HISTORY = 16  # optimiser steps
MARGIN = 2.0  # headroom for growth between two updates; a power of two costs no precision
CALIBRATED_STEPS = 4  # output projections start at zero: some gradients are 0 for a few steps
LARGEST_SCALE = 2.0**64  # finite, since Inf * 0 is NaN, and far from fp32's overflow
SLOT = 4  # floats per scale: cuBLAS requires scales at multiples of 16 bytes


class DelayedScaling:
    """Delayed scales of S named tensors.

    Args:
        dtypes: {name: torch.float8_e4m3fn or torch.float8_e5m2}.
        device: where the scales are stored.
        maximum: maximum(x) replaces a tensor by its largest over all ranks, element by element, so
            that all have the same scales; None: there is one rank.

    Attributes:
        count: S.
        history: (HISTORY, S) fp32, the amax of every tensor in the latest finished steps.
        scale, inverse_scale, amax: (S, SLOT) fp32, of which only the first column is used.
        calibrating: whether a tensor is still to be calibrated, for which `produce` runs its kernel
            twice.
        clipped: () int64, the number of tensors whose amax exceeded their FP8 range in a step,
            summed over all steps so far.
    """

    def __init__(self, dtypes, device, maximum=None):
        self.maximum = maximum or (lambda x: None)
        self.count = count = len(dtypes)
        self.fp8_max = torch.tensor([torch.finfo(d).max for d in dtypes.values()], device=device)
        self.history = torch.empty(HISTORY, count, device=device)
        self.scale, self.inverse_scale, self.amax = (
            torch.empty(count, SLOT, device=device) for _ in range(3)
        )
        self.reset()
        self.clipped = torch.zeros((), dtype=torch.int64, device=device)
        self._uncalibrated = set()  # names
        self._index = {name: i for i, name in enumerate(dtypes)}
        self._scalings = {
            name: Scaling(dtype, *(x[i, :1] for x in (self.scale, self.inverse_scale, self.amax)))
            for i, (name, dtype) in enumerate(dtypes.items())
        }

    def reset(self):
        """Scales of 1, without history: as in the beginning."""
        for x in (self.history, self.amax):
            x.zero_()
        for x in (self.scale, self.inverse_scale):
            x.fill_(1.0)

    def forget(self):
        """Drop the maxima recorded since the last update."""
        self.amax.zero_()

    @property
    def calibrating(self):
        return bool(self._uncalibrated)

    def calibrate(self, on):
        """Whether `produce` derives the scale of each tensor from the tensor itself, once."""
        self._uncalibrated = set(self._scalings) if on else set()

    def produce(self, name, run):
        """The result of run(scaling), which writes the tensor `name` under the Scaling it is given.

        Where the scale is calibrated, run is called twice, the second time with a scale from the
        first's amax.
        """
        scaling = self._scalings[name]
        if name in self._uncalibrated:
            self._uncalibrated.remove(name)
            run(scaling)
            at = slice(self._index[name], self._index[name] + 1)
            self.maximum(self.amax[at])
            self._rescale(at, torch.maximum(self.amax[at, 0], self.history[:, at].amax(dim=0)))
        return run(scaling)

    def update(
        self,
        take=None,  # (1,) fp32
    ):
        """At the end of an optimiser step: shift the recorded amax of all tensors into the history,
        reset it, and recompute all scales. Where `take` is 0 the step was left out, and so are its
        maxima, which may not be numbers."""
        self.maximum(self.amax)
        self.clipped += (self.amax[:, 0] * self.scale[:, 0] > self.fp8_max).sum()
        history = torch.cat([self.amax[None, :, 0], self.history[:-1]])
        if take is not None:
            history = torch.where(take != 0, history, self.history)
        self.history.copy_(history)
        self.forget()
        self._rescale(slice(None), self.history.amax(dim=0))

    def _rescale(
        self,
        at,
        peak,  # (n,) fp32 largest amax; where it is 0 the scale is kept, NaN gives a NaN scale
    ):
        """Recompute the scales of the tensors in the slice `at`."""
        known = (peak != 0)[:, None]
        scale = (self.fp8_max[at] / (MARGIN * peak)).clamp_max(LARGEST_SCALE)[:, None]
        self.scale[at] = torch.where(known, scale, self.scale[at])
        self.inverse_scale[at] = torch.where(known, 1 / scale, self.inverse_scale[at])

    @staticmethod
    def shapes(count):
        """Shapes of `state_dict` for `count` tensors, {name: shape}."""
        return {"history": (HISTORY, count)} | dict.fromkeys(
            ("scale", "inverse_scale"), (count, SLOT)
        )

    def state_dict(self):
        """The tensors that a checkpoint stores, {name: tensor}."""
        return {"history": self.history, "scale": self.scale, "inverse_scale": self.inverse_scale}

    def load_state_dict(
        self,
        tensors,  # {name: tensor} of `state_dict`
    ):
        """Restore the scales, in place; maxima recorded so far are forgotten."""
        for name, mine in self.state_dict().items():
            mine.copy_(tensors[name])
        self.forget()


class Unscaled:
    """DelayedScaling's interface without FP8: `produce` calls run(None)."""

    calibrating = False
    clipped = None

    def calibrate(self, on):
        """Nothing to calibrate."""

    def reset(self):
        """Nothing to reset."""

    def forget(self):
        """Nothing to forget."""

    def produce(self, name, run):
        return run(None)

    def update(self, take=None):
        """Nothing to update."""

    def state_dict(self):
        return {}
