"""The weights' operands and the FP8 scales, kept in step with weights that others change.

Whoever changes the weights, an optimiser or a checkpoint, says nothing here. torch counts the
in-place changes of every tensor, kernels report theirs (torch.autograd.graph.increment_version),
and `follow`, called before each pass, makes the operands anew where a count has moved. A change
after a training pass is an optimiser's step, in which the scales are updated first. Where several
ranks train, the optimiser has this happen within its step, so that operands travel under the rest
of the update: `settle_scales`, `lead` and `arrive`.
"""

from functools import partial

import torch

from nanofuse.model.fp8.scaling import CALIBRATED_STEPS
from nanofuse.model.graphs import GraphedCall


class Operands:
    """Makes the operands of `weights` under `scaling`, and makes them anew when the weights change.

    Args:
        weights: model.fp8.weights.Weights.
        scaling: DelayedScaling or Unscaled.
        pool: of CUDA graphs' memory: where scales are not calibrated, the host launches a graph in
            place of the kernels that make operands. None: it launches every kernel.

    Attributes:
        steps: optimiser steps that the scales have followed.
        recorded: whether a training pass has run since, and recorded maxima.
        taken: (1,) fp32 on the device, where the optimiser writes 0 when it leaves a step out, so
            that the step's maxima, which may not be numbers, stay out of the scales; None: it
            takes every step.
    """

    def __init__(self, weights, scaling, pool=None):
        self.weights, self.scaling = weights, scaling
        self.refreshing, self.completing = GraphedCall(pool), GraphedCall(pool)
        self.steps, self.recorded, self.taken = 0, False, None
        self._version = None  # of the weights that the operands were made of

    @property
    def settled(self):
        """Whether no scale is calibrated any more, and no kernel runs twice for one."""
        return self.steps >= CALIBRATED_STEPS or not self.scaling.state_dict()

    def follow(self):
        """Make what is older than the weights anew, in place; the host waits for nothing. Several
        ranks make what is theirs, all at once, and get the rest from its owners."""
        self.lead()
        self.arrive()

    @torch.no_grad()
    def settle_scales(self):
        """Update the scales at the end of an optimiser step's passes; what was recorded otherwise
        is forgotten. Several ranks share a word here."""
        if self.recorded:
            self.scaling.update(self.taken)
            self.steps += 1
        else:
            self.scaling.forget()
        self.recorded = False

    @torch.no_grad()
    def arrive(self):
        """Have what the device does next wait for the operands that other ranks made."""
        if self.weights.arrived():
            self.completing(self.weights.complete, self.settled)

    @torch.no_grad()
    def lead(self):
        """As follow, but what other ranks have made may still be on its way: until `arrive`."""
        version = self.weights.version()
        if version == self._version:
            return
        self.settle_scales()
        self._version = version
        # once each: the weights' operands here, the other tensors in the micro-step that follows
        self.scaling.calibrate(self.steps < CALIBRATED_STEPS)
        self.refreshing(partial(self.weights.refresh, self.scaling), self.settled)
        self.weights.exchange()

    def state_dict(self):
        """The state of the FP8 scales for a checkpoint, {name: tensor}; empty without FP8."""
        self.follow()
        tensors = self.scaling.state_dict()
        return tensors and {**tensors, "updates": torch.tensor(self.steps + 1)}

    def check(
        self,
        tensors,  # {name: tensor}
    ):
        """Raise ValueError for tensors that `load_state_dict` cannot take."""
        if not tensors or not self.scaling.state_dict():
            return
        scale = tensors.get("scale")
        count = scale.size(0) if scale is not None and scale.dim() else self.scaling.count
        shapes = self.scaling.shapes(count) | {"updates": ()}
        for name, shape in shapes.items():
            if name not in tensors or tensors[name].shape != shape:
                raise ValueError(f"FP8 scale {name!r} is missing or of another shape")

    @torch.no_grad()
    def load_state_dict(
        self,
        tensors,  # {name: tensor}
    ):
        """Restore what `state_dict` gave, before or after the weights are loaded. Start with fresh
        scales without FP8, without tensors, and with scales of another number of tensors: those of
        a version that wrote others in FP8.

        Raises:
            ValueError: a tensor is missing or of another shape; nothing has changed.
        """
        self.check(tensors)
        self.scaling.reset()
        self.steps, self.recorded, self._version = 0, False, None
        if not tensors or not self.scaling.state_dict():
            return
        if tensors["scale"].size(0) == self.scaling.count:
            self.scaling.load_state_dict(tensors)
            self.steps = int(tensors["updates"]) - 1
