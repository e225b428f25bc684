"""The MLP with squared ReLU: a branch of the stream.

Shapes: B rows, T tokens, N = B*T positions, C width.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from nanofuse.kernels.common.fp8 import E4M3, E5M2
from nanofuse.kernels.linear_relu_squared import linear_relu_squared_bwd, linear_relu_squared_fwd
from nanofuse.kernels.relu_squared import relu_squared_ref
from nanofuse.kernels.resid_lambda_grad import resid_lambda_grad
from nanofuse.model.fp8.linear import Linear
from nanofuse.model.fp8.weights import LinearWeight
from nanofuse.model.pieces.stream import Stream, StreamGrad


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def init_weights(self, generator):
        bound = 0.4 * math.sqrt(3 / self.c_fc.weight.size(1))
        nn.init.uniform_(self.c_fc.weight, -bound, bound, generator=generator)
        nn.init.zeros_(self.c_proj.weight)

    def forward(
        self,
        x,  # (B, T, C) normalised
    ):
        return self.c_proj(relu_squared_ref(self.c_fc(x)))


@dataclass
class Saved:
    """What the forward pass saves."""

    x: torch.Tensor  # (N, C) stream
    normed: Any  # operand (N, C), of which the weight gradient's part
    activated: Any  # operand (N, 4C): squared ReLU


class FusedMLP:
    ops = ("linear_relu_squared",)
    matrices = ()

    def __init__(self, module, layer):
        self.activated, self.grad_fc = f"activated.{layer}", f"grad_fc.{layer}"
        self.grad_name = f"grad_mlp.{layer}"
        self.fc = LinearWeight(f"fc.{layer}", [module.c_fc])
        self.proj = LinearWeight(f"mlp_proj.{layer}", [module.c_proj])
        self.weights = (self.fc, self.proj)
        self.fp8 = {self.activated: E4M3, self.grad_fc: E5M2, self.grad_name: E5M2}

    def forward(self, step, stream):
        precision, normed = step.precision, stream.take_normed()
        activated = precision.scaling.produce(
            self.activated, partial(linear_relu_squared_fwd, normed, precision.weight(self.fc))
        )
        saved = Saved(stream.x, precision.gemm.keep(normed), activated)
        branch = precision.gemm.forward(activated, precision.weight(self.proj))
        return Stream(stream.x, branch, self.grad_name), saved

    def backward(self, step, saved, grad):
        gemm, operand = step.precision.gemm, grad.take_branch()
        fc, proj = self.fc.operand, self.proj.operand
        if grad.factor is not None:
            resid_lambda_grad(grad.g, saved.x, saved.activated, proj, grad.factor, grad.shares)
        gemm.weight_grad(operand, saved.activated, self.proj.grad)
        grad_fc = step.precision.scaling.produce(
            self.grad_fc, partial(linear_relu_squared_bwd, operand, proj, saved.activated)
        )
        saved.activated = operand = None
        gemm.weight_grad(grad_fc, saved.normed, self.fc.grad)
        saved.normed = None
        return StreamGrad(grad.g, grad.factor, normed=gemm.input_grad(grad_fc, fc))
