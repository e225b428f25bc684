"""Storage of a GPT's matrices for the fused pass: stacked masters and gradients, and GEMM operands.

The optimiser updates all matrices of one shape together, so their fp32 masters are stored in one
stack (N, R, C) and their gradients, into which the GEMMs accumulate, in another. The parameters of
the model's modules become views of these stacks. The pieces (model/pieces) say which LinearWeights
there are.
"""

import torch

from nanofuse.kernels.common.fp8 import E4M3
from nanofuse.kernels.quantize import quantize


class LinearWeight:
    """The weight of one GEMM: one linear layer's, or those of several below each other.

    Args:
        name: of its FP8 scale, "kind.layer".
        linears: modules with a `weight` (R, K), whose rows together are the N rows.
        stacked: whether it lies in a stack that Muon updates, or is a parameter of its own.

    Attributes:
        master, grad: (N, K) fp32, of Weights.
        operand: what the GEMMs take, of `refresh`: an FP8Operand, or (N, K) in `dtype`.
        dtype: of the operand without FP8, of Weights.
    """

    def __init__(self, name, linears, stacked=True):
        self.name, self.linears, self.stacked = name, linears, stacked
        self.master = self.grad = self.dtype = self.operand = None

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
    """Stacks of matrices and their gradients, of which the modules' parameters become views.

    Args:
        pieces: fused pieces, in order: their LinearWeights, of which those of one kind have one
            shape, and the other linear layers that Muon updates.
        dtype: of operands without FP8.
        deal: deal([(LinearWeights of a kind, shapes of the matrices of each)]) gives the owner of
            each LinearWeight, by kind, where several ranks share the optimiser; None: all are 0's.

    Attributes:
        stacks: [(parameters in the order of the stack, matrices (N, R, C), gradients (N, R, C),
            their N owners)] of everything that Muon updates, those of one owner together. Where the
            linear layers of a LinearWeight have one shape, they are consecutive matrices of the
            stack of that shape. Where they do not (q, k and v of grouped heads), each has a stack,
            a strided view of all LinearWeights. A gate's owner is None: it is everybody's.
    """

    def __init__(self, pieces, dtype, deal=None):
        self.weights = [weight for piece in pieces for weight in piece.weights]
        self.stacks = []
        kinds, shapes = {}, {}
        for weight in self.weights:
            weight.dtype = dtype
            if weight.stacked:
                kinds.setdefault(weight.name.split(".")[0], []).append(weight)
            else:
                (linear,) = weight.linears
                linear.weight.grad = torch.zeros_like(linear.weight)
                weight.master, weight.grad = linear.weight.detach(), linear.weight.grad
        owners = self._owners(kinds.values(), deal)
        for group in kinds.values():
            group.sort(key=owners.get)
            sizes = {linear.weight.shape for linear in group[0].linears}
            if len(sizes) == 1:
                shapes.setdefault(sizes.pop(), []).extend(group)
            else:
                self._add_views(group, owners)
        for group in shapes.values():
            group.sort(key=owners.get)
            self._add_stack(group, owners)
        gates = {}
        for linear in (linear for piece in pieces for linear in piece.matrices):
            gates.setdefault(linear.weight.shape, []).append(linear)
        for linears in gates.values():
            pair = self._pair(linears[0], len(linears), *linears[0].weight.shape)
            self._add(linears, *pair, [None] * len(linears))

    @staticmethod
    def _owners(groups, deal):
        """{LinearWeight: its owner}."""
        shapes = [[tuple(linear.weight.shape) for linear in group[0].linears] for group in groups]
        counts = [len(group) for group in groups]
        dealt = [[0] * n for n in counts]
        if deal is not None:
            dealt = deal(list(zip(counts, shapes, strict=True)))
        pairs = [
            zip(group, owners, strict=True) for group, owners in zip(groups, dealt, strict=True)
        ]
        return {weight: owner for pair in pairs for weight, owner in pair}

    @staticmethod
    def _pair(linear, *shape):
        """Two tensors of zeros beside a linear layer's weight: values and gradients."""
        return [torch.zeros(shape, device=linear.weight.device) for _ in range(2)]

    def _add_stack(self, group, owners):
        """One stack for LinearWeights whose linear layers have one shape."""
        linears = [linear for weight in group for linear in weight.linears]
        stack = self._pair(linears[0], len(linears), *linears[0].weight.shape)
        first = 0
        for weight in group:
            rows = slice(first, first + len(weight.linears))
            weight.master, weight.grad = (x[rows].flatten(0, 1) for x in stack)
            first = rows.stop
        self._add(linears, *stack, [owners[w] for w in group for _ in w.linears])

    def _add_views(self, group, owners):
        """A stack for each of the linear layers of a kind, in a tensor that holds them all."""
        linears = group[0].linears
        rows = [linear.weight.size(0) for linear in linears]
        whole = self._pair(linears[0], len(group), sum(rows), linears[0].weight.size(1))
        for i, weight in enumerate(group):
            weight.master, weight.grad = (x[i] for x in whole)
        parts = zip(*(x.split(rows, dim=1) for x in whole), strict=True)
        for i, pair in enumerate(parts):
            self._add([w.linears[i] for w in group], *pair, [owners[w] for w in group])

    def _add(
        self,
        linears,
        values,  # (N, R, C)
        grads,  # (N, R, C)
        owners,
    ):
        """Copy the weights of N linear layers into the stack `values` and make their parameters
        views of it, and their .grad views of `grads`."""
        for linear, value, grad in zip(linears, values, grads, strict=True):
            value.copy_(linear.weight.detach())
            linear.weight.data = value
            linear.weight.grad = grad
        self.stacks.append(([linear.weight for linear in linears], values, grads, owners))

    def all(self):
        """Every LinearWeight."""
        return self.weights

    def fp8_names(self):
        """{name: dtype} of the weights' FP8 operands."""
        return {weight.name: E4M3 for weight in self.weights}

    def version(self):
        """A number that grows with every change in place of one of the matrices."""
        return sum(linear.weight._version for weight in self.weights for linear in weight.linears)
