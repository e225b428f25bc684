"""The head: logits, softcap and loss.

Shapes: B rows, T tokens, N = B*T positions, C width, V vocabulary, padded.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nanofuse.kernels.common.fp8 import E5M2
from nanofuse.kernels.softcap_cross_entropy import (
    mean_grad_scale,
    softcap_cross_entropy_bwd,
    softcap_cross_entropy_fwd,
    softcap_cross_entropy_ref,
    softcap_ref,
)
from nanofuse.model.fp8.linear import Linear
from nanofuse.model.fp8.weights import LinearWeight
from nanofuse.model.pieces.stream import StreamGrad

EVALUATION_ROWS = 8192  # positions whose logits exist at once in evaluation


class Head(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.vocab_size = config.vocab_size
        self.lm_head = Linear(config.n_embd, config.padded_vocab_size)

    def init_weights(self, generator):
        nn.init.normal_(self.lm_head.weight, std=0.001, generator=generator)

    def forward(
        self,
        x,  # (B, T, C) normalised
        targets=None,  # (B, T) int64 or None
        reduction="mean",
    ):
        """Softcapped logits (B, T, vocab_size); with targets the loss in nats."""
        logits = self.lm_head(x)  # (B, T, V)
        if targets is None:
            return softcap_ref(logits, self.vocab_size)
        return softcap_cross_entropy_ref(
            logits.view(-1, logits.size(-1)),
            targets.reshape(-1),
            self.vocab_size,
            reduction=reduction,
        )


@dataclass
class Saved:
    """What the forward pass saves."""

    normed: Any  # operand (N, C), of which the weight gradient's part
    logits: torch.Tensor  # (N, V) before the softcap
    lse: torch.Tensor  # (N,) logsumexp of the softcapped logits


class FusedHead:
    """The end of the list: gives losses (N,) instead of a stream, and takes grad_loss () back."""

    ops = ("softcap_cross_entropy",)
    matrices, fp8 = (), {"grad_logits": E5M2}

    def __init__(self, module):
        self.vocab_size = module.vocab_size
        self.lm_head = LinearWeight("lm_head", [module.lm_head], stacked=False)
        self.weights = (self.lm_head,)

    def forward(self, step, stream):
        gemm, normed = step.precision.gemm, stream.take_normed()
        logits = gemm.forward(normed, step.precision.weight(self.lm_head))
        losses, lse = softcap_cross_entropy_fwd(logits, step.targets, self.vocab_size)
        return losses, Saved(gemm.keep(normed), logits, lse)

    def losses(self, step, stream):
        """The losses (N,) alone, with the logits of EVALUATION_ROWS positions at a time."""
        weight = step.precision.weight(self.lm_head)
        rows = stream.normed.split(EVALUATION_ROWS), step.targets.split(EVALUATION_ROWS)
        parts = []
        for normed, targets in zip(*rows, strict=True):
            logits = step.precision.gemm.forward(normed, weight)
            parts.append(softcap_cross_entropy_fwd(logits, targets, self.vocab_size)[0])
        return torch.cat(parts)

    def backward(
        self,
        step,
        saved,
        grad_loss,  # ()
    ):
        gemm, scale = step.precision.gemm, mean_grad_scale(step.targets) * grad_loss

        def run(scaling):
            return softcap_cross_entropy_bwd(
                saved.logits, step.targets, saved.lse, scale, self.vocab_size,
                scaling, inplace=scaling is None,
            )  # fmt: skip

        grad_logits = step.precision.scaling.produce("grad_logits", run)
        saved.logits = None
        gemm.weight_grad(grad_logits, saved.normed, self.lm_head.grad)
        return StreamGrad(normed=gemm.input_grad(grad_logits, self.lm_head.operand))
