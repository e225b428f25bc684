"""The head: logits, softcap and loss.

Shapes: B rows, T tokens, N = B*T positions, C width, V vocabulary, padded.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nanofuse.kernels.linear_softcap_cross_entropy import (
    LogitsGrad,
    linear_softcap_cross_entropy_dw,
    linear_softcap_cross_entropy_dx,
    linear_softcap_cross_entropy_fwd,
    weighted_rows,
)
from nanofuse.kernels.softcap_cross_entropy import (
    mean_grad_scale,
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

    normed: Any  # operand (N, C)
    grad: LogitsGrad | None


class FusedHead:
    """The end of the list: gives losses (N,) instead of a stream, and takes grad_loss () back."""

    ops = ("linear_softcap_cross_entropy", "embedding_grad")
    matrices, fp8 = (), {}

    def __init__(self, module):
        self.vocab_size = module.vocab_size
        self.lm_head = LinearWeight("lm_head", [module.lm_head], stacked=False)
        self.weights = (self.lm_head,)
        # smallest and largest logsumexp of the latest micro-step
        self.lse_range = torch.zeros(2, device=module.lm_head.weight.device)

    def forward(self, step, stream):
        normed, weight = stream.take_normed(), step.precision.weight(self.lm_head)
        losses, lse, grad = linear_softcap_cross_entropy_fwd(
            normed, weight, step.targets, self.vocab_size
        )
        torch.aminmax(lse, out=tuple(self.lse_range))
        return losses, Saved(normed, grad)

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
        gemm, grad, normed = step.precision.gemm, saved.grad, saved.normed
        saved.grad = saved.normed = None
        scale = mean_grad_scale(step.targets) * grad_loss
        gemm.weight_grad(grad.u, weighted_rows(normed, grad, scale), self.lm_head.grad)
        linear_softcap_cross_entropy_dw(normed, grad, scale, self.lm_head.grad)
        product = gemm.input_grad(grad.u, self.lm_head.operand)
        return StreamGrad(
            normed=linear_softcap_cross_entropy_dx(product, self.lm_head.operand, grad, scale)
        )
