"""Storage of a GPT's matrices for the fused pass: stacked masters and gradients, and GEMM operands.

The optimiser updates all matrices of one shape together, so their fp32 masters are stored in one
stack (N, R, C) and their gradients, into which the GEMMs accumulate, in another. The parameters of
the model's modules become views of these stacks. The pieces (model/pieces) say which LinearWeights
there are.

Where several ranks train, a master lies with its owner alone. The owner makes the operand, and what
travels to the others is that, FP8 row-major or `dtype`: between two updates they have nothing else
of the matrix. What wants the values themselves asks for them: `Weights.gathered`.
"""

import contextlib
import dataclasses
from itertools import pairwise

import torch

from nanofuse.kernels.common.fp8 import E4M3, FP8Operand, empty_operand
from nanofuse.kernels.quantize import quantize
from nanofuse.kernels.transpose import transpose


def absent(x):
    """NaN in the shape and dtype of a tensor, without memory: its values are elsewhere."""
    return x.new_full((), float("nan"), requires_grad=False).expand(x.shape)


class LinearWeight:
    """The weight of one GEMM: one linear layer's, or those of several below each other.

    Args:
        name: of its FP8 scale, "kind.layer".
        linears: modules with a `weight` (R, K), whose rows together are the N rows.
        stacked: whether it lies in a stack that Muon updates, or is a parameter of its own.

    Attributes:
        grad: (N, K) fp32, of Weights.
        parts: [(owner, slice of the N rows)], alone one of all rows.
        master: (n, K) fp32, the rows that this rank owns.
        whole: (N, K) fp32, `master` where that is all rows; else None, but for `gathered`.
        operand: what the GEMMs take, of `refresh`: an FP8Operand, or (N, K) in `dtype`.
        dtype: of the operand without FP8, of Weights.
    """

    def __init__(self, name, linears, stacked=True):
        self.name, self.linears, self.stacked = name, linears, stacked
        self.master = self.whole = self.grad = self.dtype = self.operand = None
        self.parts, self.rows = [], slice(0)

    def keep(
        self,
        master,  # (n, K) fp32
        parts,  # [(owner, slice of the rows)]
        rank,
    ):
        """Take the rows that this rank owns."""
        self.master, self.parts = master, parts
        self.rows = next((rows for owner, rows in parts if owner == rank), slice(0))
        self.whole = master if self.owned else None

    @property
    def owned(self):
        """Whether all rows are this rank's."""
        return self.master.shape == self.grad.shape

    def plain(self):
        """The weight in `dtype`, (N, K), for GEMMs without FP8.

        Raises:
            RuntimeError: other ranks have it, and it was not gathered.
        """
        if isinstance(self.operand, torch.Tensor):
            return self.operand
        if self.whole is None:
            raise RuntimeError(f"{self.name} is another rank's; use it within Weights.gathered")
        return self.whole.to(self.dtype)

    def refresh(self, scaling):
        """Rewrite this rank's rows of the operand from the master, in place: CUDA graphs hold its
        address."""
        self.operand = scaling.produce(self.name, self._write)

    def _write(self, scaling):
        master, (rows, columns) = self.master, self.grad.shape
        operand = self.operand
        if operand is None and scaling is None:
            operand = torch.empty(rows, columns, dtype=self.dtype, device=master.device)
        elif operand is None:
            operand = empty_operand(rows, columns, scaling, master.device)
        if scaling is None:
            operand[self.rows].copy_(master)
        elif self.owned:
            quantize(master, scaling, operand)
        elif master.numel():
            transposed = operand.transposed.new_empty(columns, len(master))  # see `complete`
            part = FP8Operand(operand.data[self.rows], transposed, operand.inverse_scale)
            quantize(master, scaling, part)
        return operand

    @property
    def wire(self):
        """The operand as it travels, (N, K): FP8 as uint8, which every transport takes."""
        operand = self.operand
        return operand.data.view(torch.uint8) if isinstance(operand, FP8Operand) else operand

    def lie_in(
        self,
        room,  # (n,) uint8, as many bytes as `wire`
    ):
        """Have the operand travel from there, and be there."""
        operand, wire = self.operand, self.wire
        data = room.view(wire.dtype).view(wire.shape)
        data.copy_(wire)
        if isinstance(operand, FP8Operand):
            data = dataclasses.replace(operand, data=data.view(operand.data.dtype))
        self.operand = data

    @property
    def turned(self):
        """Whether it is turned here, as rows of it come from other ranks, one layout alone."""
        return isinstance(self.operand, FP8Operand) and not self.owned

    def complete(self):
        """Make the other layout of what has come."""
        if self.turned:
            transpose(self.operand.data, self.operand.transposed)

    def show(
        self,
        values,  # (N, K) fp32 or None
    ):
        """Let the linear layers' parameters be views of the values, or absent."""
        self.whole, start = values, 0
        for linear in self.linears:
            rows = slice(start, start + linear.weight.size(0))
            start = rows.stop
            linear.weight.data = absent(linear.weight) if values is None else values[rows]


class Weights:
    """Stacks of matrices and their gradients, of which the modules' parameters become views.

    Args:
        pieces: fused pieces, in order: their LinearWeights, of which those of one kind have one
            shape, and the other linear layers that Muon updates.
        dtype: of operands without FP8.
        peers: model.fp8.peers.Peers, where several ranks share the optimiser; None: all is this
            rank's.

    Attributes:
        stacks: [(parameters in the order of the stack, the matrices (n, R, C) of those that this
            rank owns, gradients (N, R, C), their N owners)] of everything that Muon updates, those
            of one owner together. Where the linear layers of a LinearWeight have one shape, they
            are consecutive matrices of the stack of that shape. Where they do not (q, k and v of
            grouped heads), each has a stack, a strided view of all LinearWeights. A gate's owner is
            None: it is everybody's.
        masters: {parameter: rows (n, K) fp32} of other parameters that are here in part.
    """

    def __init__(self, pieces, dtype, peers=None):
        self.weights = [weight for piece in pieces for weight in piece.weights]
        self.peers, self.rank = peers, peers.rank if peers else 0
        self.stacks, self.masters = [], {}
        self.coming = None  # Pending of `exchange`
        self.wires = []  # what it moves, as Peers.spread takes it
        kinds, shapes = {}, {}
        for weight in self.weights:
            weight.dtype = dtype
            if weight.stacked:
                kinds.setdefault(weight.name.split(".")[0], []).append(weight)
            else:
                self._add_table(weight)
        owners = self._owners(kinds.values())
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
            shape = linears[0].weight.shape
            pair = (self._zeros(linears[0], len(linears), *shape) for _ in range(2))
            self._add(linears, *pair, [None] * len(linears))

    def _owners(self, groups):
        """{LinearWeight: its owner}."""
        shapes = [[tuple(linear.weight.shape) for linear in group[0].linears] for group in groups]
        counts = [len(group) for group in groups]
        dealt = [[0] * n for n in counts]
        if self.peers is not None:
            dealt = self.peers.deal(list(zip(counts, shapes, strict=True)))
        pairs = [
            zip(group, owners, strict=True) for group, owners in zip(groups, dealt, strict=True)
        ]
        return {weight: owner for pair in pairs for weight, owner in pair}

    @staticmethod
    def _zeros(linear, *shape):
        return torch.zeros(shape, device=linear.weight.device)

    def _add_table(self, weight):
        """A LinearWeight that is a parameter of its own, of whose rows every rank owns a block."""
        (linear,) = weight.linears
        parameter = linear.weight
        parameter.grad = weight.grad = torch.zeros_like(parameter)
        if self.peers is None:
            weight.keep(parameter.detach(), [(0, slice(0, len(parameter)))], 0)
            return
        parts = [(x.owner, slice(x.start, x.stop)) for x in self.peers.rows(len(parameter))]
        mine = next(rows for owner, rows in parts if owner == self.rank)
        self.masters[parameter] = parameter.detach()[mine].clone()
        weight.keep(self.masters[parameter], parts, self.rank)
        weight.show(None)

    def _add_stack(self, group, owners):
        """One stack for LinearWeights whose linear layers have one shape."""
        linears = [linear for weight in group for linear in weight.linears]
        owned = [owners[w] for w in group for _ in w.linears]
        shape = linears[0].weight.shape
        values = self._zeros(linears[0], owned.count(self.rank), *shape)
        grads = self._zeros(linears[0], len(linears), *shape)
        first = mine = 0
        for weight in group:
            count = len(weight.linears)
            weight.grad = grads[first : first + count].flatten(0, 1)
            held = count * (owners[weight] == self.rank)
            self._keep(weight, values[mine : mine + held].flatten(0, 1), owners)
            first, mine = first + count, mine + held
        self._add(linears, values, grads, owned)

    def _add_views(self, group, owners):
        """A stack for each of the linear layers of a kind, in a tensor that holds them all."""
        linears = group[0].linears
        owned = [owners[w] for w in group]
        rows = [linear.weight.size(0) for linear in linears]
        shape = sum(rows), linears[0].weight.size(1)
        values = self._zeros(linears[0], owned.count(self.rank), *shape)
        grads = self._zeros(linears[0], len(group), *shape)
        mine = 0
        for weight, grad in zip(group, grads, strict=True):
            weight.grad, held = grad, owners[weight] == self.rank
            self._keep(weight, values[mine : mine + held].flatten(0, 1), owners)
            mine += held
        parts = zip(*(x.split(rows, dim=1) for x in (values, grads)), strict=True)
        for i, pair in enumerate(parts):
            self._add([w.linears[i] for w in group], *pair, owned)

    def _keep(
        self,
        weight,
        master,  # (N, K) fp32, or (0, K)
        owners,
    ):
        weight.keep(master, [(owners[weight], slice(0, len(weight.grad)))], self.rank)

    def _add(
        self,
        linears,
        values,  # (n, R, C)
        grads,  # (N, R, C)
        owners,
    ):
        """Copy the weights of N linear layers, as far as they are this rank's, into the stack
        `values`, make their parameters views of it, and their .grad views of `grads`."""
        held = iter(values)
        for linear, grad, owner in zip(linears, grads, owners, strict=True):
            value = absent(linear.weight)
            if owner in (None, self.rank):
                value = next(held).copy_(linear.weight.detach())
            linear.weight.data = value
            linear.weight.grad = grad
        self.stacks.append(([linear.weight for linear in linears], values, grads, owners))

    def refresh(self, scaling):
        """Make this rank's rows of every operand anew."""
        for weight in self.weights:
            weight.refresh(scaling)

    def exchange(self):
        """Start bringing every rank what others have made anew of the operands; `arrived` waits for
        it."""
        if self.peers is not None:
            self.wires = self.wires or self._laid_out()
            self.coming = self.peers.spread(self.wires)

    def _laid_out(self):
        """The operands as they travel: those of all matrices in one tensor, owner by owner, so that
        an owner sends one."""
        stacked = [weight for weight in self.weights if weight.stacked]
        stacked.sort(key=lambda weight: weight.parts[0][0])
        sizes = [weight.wire.nbytes for weight in stacked]
        room = torch.empty(sum(sizes), dtype=torch.uint8, device=stacked[0].wire.device)
        ends = {}
        at = 0
        for weight, part in zip(stacked, room.split(sizes), strict=True):
            weight.lie_in(part)
            at += len(part)
            ends[weight.parts[0][0]] = at
        starts = [0, *ends.values()]
        parts = [(owner, slice(*x)) for owner, x in zip(ends, pairwise(starts), strict=True)]
        return [(parts, room), *((x.parts, x.wire) for x in self.weights if not x.stacked)]

    def arrived(self):
        """Have what the device does next wait for the operands that are on their way; whether some
        of them are to be completed."""
        coming, self.coming = self.coming, None
        if coming is not None:
            coming.wait()
        return coming is not None and any(weight.turned for weight in self.weights)

    def complete(self):
        """Make the rest of the operands that have come."""
        for weight in self.weights:
            weight.complete()

    @contextlib.contextmanager
    def gathered(self):
        """Within the context every rank has all values, as if it were alone: in the parameters,
        which are to be read only, and in `whole`. Every rank enters it at once."""
        if self.peers is None:
            yield
            return
        partial = [weight for weight in self.weights if not weight.owned]
        values = {weight: torch.empty_like(weight.grad) for weight in partial}
        for weight, x in values.items():
            x[weight.rows].copy_(weight.master)
        moved = [(weight.parts, values.get(weight, weight.whole)) for weight in self.weights]
        self.peers.spread(moved).wait()
        for weight, x in values.items():
            weight.show(x)
        try:
            yield
        finally:
            for weight in partial:
                weight.show(None)

    def all(self):
        """Every LinearWeight."""
        return self.weights

    def fp8_names(self):
        """{name: dtype} of the weights' FP8 operands."""
        return {weight.name: E4M3 for weight in self.weights}

    def version(self):
        """A number that grows with every change in place of one of the matrices."""
        return sum(linear.weight._version for weight in self.weights for linear in weight.linears)
