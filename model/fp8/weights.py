"""Storage of a GPT's matrices for the fused pass: stacked masters and gradients, and GEMM operands.

The optimiser updates all matrices of one shape together, so their fp32 masters are stored in one
stack (N, R, C) and their gradients, into which the GEMMs accumulate, in another. The parameters of
the model's modules become views of these stacks. A LinearWeight is the weight of one GEMM; q, k and
v of a layer are one.
Shapes: L layers, C width, K key/value heads of D columns.
"""

from dataclasses import dataclass

import torch

from nanofuse.kernels.common.fp8 import E4M3, FP8Operand
from nanofuse.kernels.quantize import quantize

KINDS = ("qkv", "attn_proj", "fc", "mlp_proj")  # the GEMMs of a layer


@dataclass
class LinearWeight:
    """The weight of one GEMM.

    Fields: name, of its FP8 scale; master and grad, (N, K) fp32; dtype, of the operand without FP8;
    operand, what the GEMMs take, written by `refresh`: an FP8Operand, or (N, K) in `dtype`.
    """

    name: str
    master: torch.Tensor
    grad: torch.Tensor
    dtype: torch.dtype
    operand: FP8Operand | torch.Tensor | None = None

    def plain(self):
        """The weight in `dtype`, (N, K), for GEMMs without FP8."""
        kept = isinstance(self.operand, torch.Tensor)
        return self.operand if kept else self.master.to(self.dtype)

    def refresh(self, scaling):
        """Rewrite the operand from the master, in place: CUDA graphs hold its address."""

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
        layers: {kind: LinearWeight} with the keys KINDS, for each layer.
        lm_head: LinearWeight.
        stacks: [(parameters in the order of the stack, matrices (N, R, C), gradients (N, R, C))]
            of everything that Muon updates. With as many key as query heads, q, k and v of a layer
            are consecutive matrices of the stack of square ones. With fewer key heads, q, k and v
            have a stack each, a strided view of the layers' QKV weights.
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
        self._matrices = [head, *(p for params, _, _ in self.stacks for p in params)]

    def _add(
        self,
        linears,
        values,  # (N, R, C)
        grads,  # (N, R, C)
    ):
        """Copy the weights of N linear layers into the stack `values` and make their parameters
        views of it, and their .grad views of `grads`."""
        for linear, value, grad in zip(linears, values, grads, strict=True):
            value.copy_(linear.weight.detach())
            linear.weight.data = value
            linear.weight.grad = grad
        self.stacks.append(([linear.weight for linear in linears], values, grads))

    def all(self):
        """Every LinearWeight."""
        return [weight for layer in self.layers for weight in layer.values()] + [self.lm_head]

    def fp8_names(self):
        """{name: dtype} of the weights' FP8 operands."""
        return {weight.name: E4M3 for weight in self.all()}

    def version(self):
        """A number that grows with every change in place of one of the matrices."""
        return sum(p._version for p in self._matrices)
