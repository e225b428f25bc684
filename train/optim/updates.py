"""How MuonAdamW's numbers are computed: in torch, eager or compiled, or by the kernels.

An update is made of tables, stacks and the shares of parameters in them. `squares_of` prepares sums
of squares of gradients, and a call takes one step; both leave it to the optimiser what the tensors
are, whose they are and what they are called. The formulas are those of kernels/adamw.py and
kernels/muon_update.py.
"""

from dataclasses import dataclass

import torch

from nanofuse.kernels.adamw import AdamWTensors, adamw, adamw_ref, adamw_schedule
from nanofuse.kernels.gradient_squares import GradientSquares
from nanofuse.kernels.muon_update import muon_hyper, muon_update, muon_update_ref
from nanofuse.model.graphs import GraphedCall

RECOMPILE_LIMIT = 64  # a compiled update has one graph per parameter shape; torch's limit is 8


@dataclass(frozen=True)
class Numbers:
    """A step's: its count from 1 on, the multiplier of AdamW's rates, Muon's rate, momentum and
    decay."""

    step: int
    lr_mult: float
    matrix_lr: float
    momentum: float
    weight_decay: float


class NumbersOnDevice:
    """A step's Numbers as the kernels read them, where they are in every step: a CUDA graph reads
    what is there.

    Attributes:
        schedule: of kernels.adamw, (2,) fp32.
        hyper: of kernels.muon_update, (3,) fp32.
    """

    def __init__(self, device):
        self.schedule, self.hyper = (torch.zeros(n, device=device) for n in (2, 3))
        self.latest = None

    def take(self, numbers):
        """Put a step's numbers there, the first time."""
        if numbers is self.latest:
            return
        self.latest, device = numbers, self.hyper.device
        self.schedule.copy_(adamw_schedule(numbers.lr_mult, numbers.step, device))
        rates = numbers.matrix_lr, numbers.momentum, numbers.weight_decay
        self.hyper.copy_(muon_hyper(*rates, device))


class EagerUpdate:
    """The reference: torch's ops, for gradients as autograd leaves them.

    A step that is not to be taken changes nothing on a CPU, and on a GPU where on_nonfinite is
    "skip", which waits for the device.

    Args:
        tables, stacks, shares, config, take, total: MuonAdamW's.
        compile: run the formulas through torch.compile.
        newton_schulz_dtype: dtype of Muon's matrix products.
    """

    clears = False  # gradients are dropped, and autograd makes new ones

    def __init__(
        self,
        tables,
        stacks,
        shares,
        config,
        take,  # (1,) fp32, 0 where the step is to be left out
        total=None,  # () fp32, to which the sums of squares of the shares' gradients are added
        compile=False,
        newton_schulz_dtype=torch.float32,
    ):
        self.tables, self.stacks, self.take, self.total = tables, stacks, take, total
        self.squares = None if total is None else self.squares_of(shares)
        self.options = config.muon_beta2, config.muon_eq, config.muon_plus, newton_schulz_dtype
        self.waits = shares[0].param.device.type == "cpu" or config.on_nonfinite == "skip"
        self.adamw, self.muon = adamw_ref, muon_update_ref
        if compile:
            torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
            self.adamw = torch.compile(adamw_ref, dynamic=False, fullgraph=True)
            self.muon = torch.compile(muon_update_ref, dynamic=False, fullgraph=True)

    @staticmethod
    def squares_of(shares):
        """A function that gives the sum of squares of each share's gradient, (S,)."""

        def squares():
            grads = [share.grad for share in shares]
            dtype = torch.promote_types(torch.float32, grads[0].dtype)
            return torch.stack(torch._foreach_norm(grads, dtype=dtype)).square()

        return squares

    def __call__(self, numbers):
        if self.total is not None:
            self.total += self.squares().sum()
        if self.waits and not self.take.item():
            return
        # 0-d CPU tensors, so that a compiled update does not specialise on changing numbers
        step = torch.tensor(float(numbers.step))
        for x in self.tables:
            h, lr = x.hyper, torch.tensor(x.hyper.lr * numbers.lr_mult)
            constants = h.beta1, h.beta2, h.eps, h.weight_decay
            self.adamw(x.param, x.grad, x.exp_avg, x.exp_avg_sq, lr, *constants, step)
        rates = numbers.matrix_lr, numbers.momentum, numbers.weight_decay
        rates = [torch.tensor(x) for x in rates]
        for stack in self.stacks:
            values, grads = stack.gather()
            self.muon(values, grads, stack.momentum, stack.second, *rates, *self.options)
            stack.scatter(values)


class KernelUpdate:
    """The kernels: one launch of AdamW per pair of dtypes, Muon on whole stacks in place.

    Gradients are tensors that stay where they are, and are cleared as they are read. A step that is
    not to be taken changes nothing else, which is decided on the device.

    Args:
        tables, stacks, shares, config, take, total: MuonAdamW's.
        pool: of CUDA graphs' memory: from the second call on the host launches one graph in place
            of every kernel. None: it launches every kernel.
        numbers: NumbersOnDevice, which the updates of one optimiser share; None: its own.
    """

    clears = True

    def __init__(
        self,
        tables,
        stacks,
        shares,
        config,
        take,  # (1,) fp32, 0 where the step is to be left out
        total=None,  # () fp32, to which the sums of squares of the shares' gradients are added
        pool=None,
        numbers=None,
    ):
        self.stacks, self.take, self.total = stacks, take, total
        self.squares = None if total is None else self.squares_of(shares)
        self.options = config.muon_beta2, config.muon_eq, config.muon_plus
        fields = [(x.param, x.grad, x.exp_avg, x.exp_avg_sq, x.hyper) for x in tables]
        self.tensors = AdamWTensors(*zip(*fields, strict=True)) if tables else None
        self.numbers = numbers or NumbersOnDevice(shares[0].param.device)
        self.graphed = GraphedCall(pool)

    @staticmethod
    def squares_of(shares):
        """A function that gives the sum of squares of each share's gradient, (S,) fp32."""
        return GradientSquares([share.grad for share in shares])

    def __call__(self, numbers):
        """Take a step.

        Raises:
            ValueError: a tensor of a table has moved.
        """
        self.numbers.take(numbers)
        if self.graphed.graph is not None and self.tensors is not None:
            self.tensors.check_addresses()
        self.graphed(self._launch)

    def _launch(self):
        if self.total is not None:
            self.total += self.squares().sum()
        if self.tensors is not None:
            adamw(self.tensors, self.numbers.schedule, clear_grad=True, take=self.take)
        for stack in self.stacks:
            values, grads = stack.gather()
            tensors = values, grads, stack.momentum, stack.second, self.numbers.hyper
            clear = stack.in_place
            muon_update(*tensors, *self.options, clear_grad=clear, take=self.take)
            if not clear:
                stack.scatter(values)
                stack.clear()
