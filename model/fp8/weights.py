"""Storage of a GPT's matrices for the fused path: stacks, gradients, and what products take.

The parameters of the model stay where its modules keep them, but become views: the matrices of all
layers that the optimiser updates together lie in one tensor, and so do their gradients, which the
matrix products add to. A LinearWeight is one product's weight: q, k and v of a layer are one.
Shapes: L layers, C width, K key/value heads of D columns.
"""

from dataclasses import dataclass

import torch

from nanofuse.kernels.common.fp8 import E4M3, FP8Operand
from nanofuse.kernels.quantize import quantize

KINDS = ("qkv", "attn_proj", "fc", "mlp_proj")  # the products of a layer


@dataclass
class LinearWeight:
    """The weight of one product.

    Fields: name; master and grad, (N, K) fp32; operand, what the products take, written by
    `refresh`: an FP8Operand, or (N, K) in `dtype`.
    """

    name: str
    master: torch.Tensor
    grad: torch.Tensor
    dtype: torch.dtype
    operand: FP8Operand | torch.Tensor | None = None

    def plain(self):
        """The weight in `dtype`, (N, K), for products that are not quantised."""
        kept = isinstance(self.operand, torch.Tensor)
        return self.operand if kept else self.master.to(self.dtype)

    def refresh(self, scaling):
        """Make the operand anew from the master, where it lies: CUDA graphs know its address."""

        def run(scale):
            if scale is not None:
                return quantize(self.master, scale, self.operand)
            if self.operand is None:
                return self.master.to(self.dtype, copy=True)
            return self.operand.copy_(self.master)

        self.operand = scaling.produce(self.name, run)


class Weights:
    """Stacks of a GPT's matrices and their gradients; the model's parameters become their views.

    Attributes:
        layers: a {kind: LinearWeight} of KINDS for each layer; lm_head: LinearWeight.
        stacks: [(parameters in the order of the stack, matrices (N, R, C), gradients (N, R, C))]
            of everything that Muon updates. With as many key as query heads q, k and v of a layer
            follow each other in the stack of square matrices; else they are stacks of three views
            whose matrices are not contiguous.
    """

    def __init__(self, model):
        self.dtype = model.dtype
        blocks = model.transformer.h
        device, layers = model.lm_head.weight.device, len(blocks)
        attention = [(b.attn.c_q, b.attn.c_k, b.attn.c_v) for b in blocks]
        width = model.config.n_embd
        qkv_rows = width + 2 * model.config.kv_dim

        def pair(*shape):
            return [torch.zeros(shape, device=device) for _ in range(2)]

        self.stacks = []
        if qkv_rows == 3 * width:
            square = pair(4 * layers, width, width)
            qkv = [x[: 3 * layers].view(layers, qkv_rows, width) for x in square]
            proj = [x[3 * layers :] for x in square]
            members = [linear for three in attention for linear in three]
            self._add(members + [b.attn.c_proj for b in blocks], *square)
        else:
            qkv, proj = pair(layers, qkv_rows, width), pair(layers, width, width)
            at = (0, width, width + model.config.kv_dim, qkv_rows)
            for i in range(3):
                views = [x[:, at[i] : at[i + 1]] for x in qkv]
                self._add([three[i] for three in attention], *views)
            self._add([b.attn.c_proj for b in blocks], *proj)
        fc, mlp = pair(layers, 4 * width, width), pair(layers, width, 4 * width)
        self._add([b.mlp.c_fc for b in blocks], *fc)
        self._add([b.mlp.c_proj for b in blocks], *mlp)
        gates = [b.attn.ve_gate for b in blocks if hasattr(b.attn, "ve_gate")]
        self._add(gates, *pair(len(gates), *gates[0].weight.shape))
        self.layers = [
            {
                kind: LinearWeight(f"{kind}.{layer}", values[layer], grads[layer], self.dtype)
                for kind, (values, grads) in zip(KINDS, (qkv, proj, fc, mlp), strict=True)
            }
            for layer in range(layers)
        ]
        head = model.lm_head.weight
        head.grad = torch.zeros_like(head)
        self.lm_head = LinearWeight("lm_head", head.detach(), head.grad, self.dtype)

    def _add(
        self,
        linears,
        values,  # (N, R, C)
        grads,  # (N, R, C)
    ):
        """Make the weights of N linears views of `values`, with gradients in `grads`."""
        for linear, value, grad in zip(linears, values, grads, strict=True):
            value.copy_(linear.weight.detach())
            linear.weight.data = value
            linear.weight.grad = grad
        self.stacks.append(([linear.weight for linear in linears], values, grads))

    def all(self):
        """Every LinearWeight."""
        return [weight for layer in self.layers for weight in layer.values()] + [self.lm_head]

    def fp8_names(self):
        """{name: dtype} of the FP8 operands."""
        return {weight.name: E4M3 for weight in self.all()}

    def refresh(self, scaling):
        """Make every operand anew, after the masters changed."""
        for weight in self.all():
            weight.refresh(scaling)
