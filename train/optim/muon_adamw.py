"""The combined optimiser: Muon for the matrices inside the blocks, AdamW for everything else.

Matrices of one shape are stacked and updated together; the state is kept per stack (Muon) and per
tensor (AdamW). The update formulas are kernels/muon_update.py and kernels/adamw.py.
"""

import torch

from nanofuse.kernels.adamw import adamw_ref
from nanofuse.kernels.muon_update import muon_update_ref, second_moment_shape
from nanofuse.train.errors import UserError
from nanofuse.train.optim.config import ADAMW_EPS
from nanofuse.train.optim.watch import GradientWatch

RECOMPILE_LIMIT = 64  # a compiled update has one graph per parameter shape; torch's limit is 8


class MuonAdamW:
    """Muon + AdamW over the parameters of a GPT.

    Args:
        roles: {role: [(name, parameter)]}, GPT.param_roles.
        config: OptimConfig.
        width: C of the model, for the width scaling of AdamW's learning rates.
        lr_scale: the batch's factor on learning rates, of all groups that it scales.
        compile: run the updates through torch.compile.
        newton_schulz_dtype: dtype of Muon's matrix products.
    """

    def __init__(
        self,
        roles,
        config,
        width,
        lr_scale=1.0,
        compile=False,
        newton_schulz_dtype=torch.float32,
    ):
        self.config, self.lr_scale = config, lr_scale
        self.newton_schulz_dtype = newton_schulz_dtype
        self.step_count = 0
        self.adamw = [
            (name, p, group, group.lr_at(width, lr_scale))
            for role, group in config.adamw_groups().items()
            for name, p in roles.get(role, [])
        ]
        self.stacks = {}  # "RxC" -> parameters of that shape, in model order
        for _, p in roles["matrices"]:
            self.stacks.setdefault(f"{p.size(0)}x{p.size(1)}", []).append(p)
        self.parameters = dict(member for members in roles.values() for member in members)
        device = next(iter(self.parameters.values())).device
        self.watch = GradientWatch(self.parameters, device)
        self.state = {}
        for name, p, *_ in self.adamw:
            self.state[f"{name}.exp_avg"] = torch.zeros_like(p, requires_grad=False)
            self.state[f"{name}.exp_avg_sq"] = torch.zeros_like(p, requires_grad=False)
        for key, params in self.stacks.items():
            shape = (len(params), *params[0].shape)
            moment = second_moment_shape(shape)
            self.state[f"muon.{key}.momentum"] = params[0].new_zeros(shape, requires_grad=False)
            self.state[f"muon.{key}.second"] = params[0].new_zeros(moment, requires_grad=False)
        self._adamw_update, self._muon_update = adamw_ref, muon_update_ref
        if compile:
            torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
            self._adamw_update = torch.compile(adamw_ref, dynamic=False, fullgraph=True)
            self._muon_update = torch.compile(muon_update_ref, dynamic=False, fullgraph=True)

    @torch.no_grad()
    def step(self, lr_mult=1.0, momentum=0.95, weight_decay=0.0):
        """Update every parameter from its .grad. A step whose gradients are not all finite changes
        nothing on a CPU, and on a GPU where config.on_nonfinite is "skip", which waits for the
        device; `watch` has seen it.

        Args:
            lr_mult: the schedule's multiplier on every learning rate.
            momentum: Muon's momentum.
            weight_decay: Muon's decoupled decay, already scaled and scheduled.
        """
        self.step_count += 1
        grads = [p.grad for p in self.parameters.values()]
        norms = torch._foreach_norm(grads, dtype=torch.promote_types(torch.float32, grads[0].dtype))
        self.watch.take(torch.stack(norms).square(), self.step_count)
        waits = self.watch.ok.device.type == "cpu" or self.config.on_nonfinite == "skip"
        if waits and not self.watch.ok.item():
            return
        # 0-d CPU tensors, so that a compiled update does not specialise on changing numbers
        count = torch.tensor(float(self.step_count))
        for name, p, group, lr in self.adamw:
            self._adamw_update(
                p,
                p.grad,
                self.state[f"{name}.exp_avg"],
                self.state[f"{name}.exp_avg_sq"],
                torch.tensor(lr * lr_mult),
                *group.betas,
                ADAMW_EPS,
                group.weight_decay,
                count,
            )
        matrix_lr = self.config.matrix_lr * self.lr_scale * lr_mult
        scalars = [torch.tensor(x) for x in (matrix_lr, momentum)]
        for key, params in self.stacks.items():
            stacked = torch.stack(params)  # (N, R, C)
            self._muon_update(
                stacked,
                torch.stack([p.grad for p in params]),
                self.state[f"muon.{key}.momentum"],
                self.state[f"muon.{key}.second"],
                *scalars,
                torch.tensor(weight_decay),
                self.config.muon_beta2,
                self.config.muon_eq,
                self.config.muon_plus,
                self.newton_schulz_dtype,
            )
            torch._foreach_copy_(params, list(stacked.unbind()))

    def zero_grad(self):
        """Drop every gradient."""
        for p in [p for _, p, *_ in self.adamw] + [p for ps in self.stacks.values() for p in ps]:
            p.grad = None

    def state_dict(self):
        """All state as a flat {name: tensor}; step_count travels in the checkpoint's meta."""
        return dict(self.state)

    @torch.no_grad()
    def load_state_dict(self, tensors, step_count):
        """Restore what state_dict gave.

        Raises:
            UserError: names or shapes of another model.
        """
        for name, mine in self.state.items():
            if name not in tensors or tensors[name].shape != mine.shape:
                raise UserError(f"optimiser state {name!r} is missing or of another shape")
        for name, mine in self.state.items():
            mine.copy_(tensors[name])
        self.step_count = step_count
