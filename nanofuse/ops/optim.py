"""Steps of optimisers, in place: Muon for stacks of matrices, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from nanofuse.ops.backend import Backend, runs_kernel

if TYPE_CHECKING:
    from nanofuse.kernels.adamw import AdamWTensors


@torch.no_grad()
def muon_update(
    param: Tensor,  # (N, R, C) fp32, updated
    grad: Tensor,  # (N, R, C) fp32 or bf16
    momentum_buffer: Tensor,  # (N, R, C) fp32, updated; zeros at first
    second_moment: Tensor,  # (N, R, 1) if R >= C, else (N, 1, C); fp32, updated; zeros at first
    *,
    lr: float,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    beta2: float = 0.9,
    equilibration: Literal["row", "col", "none"] = "row",
    muon_plus: bool = True,
    clear_grad: bool = False,
    backend: Backend = "kernel",
) -> None:
    """One Muon step of N matrices of one shape, in place.

    Nesterov momentum, `newton_schulz`, variance reduction per row (column) at an unchanged norm,
    decay only where it does not fight the update. The step's size is lr * sqrt(max(1, R / C)).

    Args:
        beta2: of the second moment.
        equilibration, muon_plus: as `newton_schulz` takes them.
        clear_grad: zero the gradient after it is read; otherwise it is not changed.

    In a CUDA graph call nanofuse.kernels.muon_update, which reads lr, momentum and weight decay
    from a tensor.

    Sources: Muon (https://kellerjordan.github.io/posts/muon/), NorMuon
    (https://arxiv.org/abs/2510.05491).

    Raises:
        RuntimeError, ValueError: see `nanofuse.ops`.
        ValueError: shapes or dtypes other than above, for the kernel; an unknown equilibration.

    >>> import torch
    >>> from nanofuse import ops
    >>> param, grad = torch.zeros(1, 2, 2), torch.eye(2)[None]
    >>> state = torch.zeros(1, 2, 2), torch.zeros(1, 2, 1)
    >>> ops.muon_update(param, grad, *state, lr=0.5, backend="eager")
    >>> (param[0] * 10).round().abs()
    tensor([[5., 0.],
            [0., 5.]])
    """
    written = {"param": param, "grad": grad, "momentum_buffer": momentum_buffer}
    written |= {"second_moment": second_moment}
    kernel = runs_kernel("muon_update", backend, written)
    from nanofuse.kernels import muon_update as op

    if not kernel:
        op.muon_update_ref(
            param, grad.to(param.dtype), momentum_buffer, second_moment,
            lr, momentum, weight_decay, beta2, equilibration, muon_plus,
        )  # fmt: skip
        if clear_grad:
            grad.zero_()
        return
    from nanofuse.ops.launch import launch_in_place

    hyper = op.muon_hyper(lr, momentum, weight_decay, param.device)
    launch_in_place(
        lambda p, g, m, s: op.muon_update(
            p, g, m, s, hyper, beta2, equilibration, muon_plus, clear_grad=clear_grad
        ),
        list(written.values()),
    )


def adamw_tensors(
    params: Sequence[Tensor],  # any shapes, fp32 or bf16
    grads: Sequence[Tensor],  # params' shapes, fp32 or bf16
    exp_avgs: Sequence[Tensor],  # params' shapes and dtypes; zeros at first
    exp_avg_sqs: Sequence[Tensor],  # params' shapes and dtypes; zeros at first
    *,
    lr: float | Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Sequence[float] = 0.01,
) -> AdamWTensors:
    """Tensors that `adamw` updates together, in one launch per pair of dtypes.

    They must be contiguous and stay where they are: updates in place and `zero_grad(
    set_to_none=False)` are fine. lr and weight_decay are one number, or one for each parameter.

    Source: Loshchilov and Hutter, https://arxiv.org/abs/1711.05101.

    Raises:
        ValueError: lists of different lengths or empty; a shape, dtype, device or layout other
            than above; a beta outside of [0, 1).

    >>> import torch
    >>> from nanofuse import ops
    >>> p, g = torch.ones(4), torch.ones(4)
    >>> state = ops.adamw_tensors([p], [g], [torch.zeros(4)], [torch.zeros(4)], lr=0.1)
    >>> len(state.tensors)
    1
    """
    from nanofuse.kernels.adamw import AdamWHyper, AdamWTensors

    rates, decays = (
        [x] * len(params) if isinstance(x, (int, float)) else list(x) for x in (lr, weight_decay)
    )
    if not len(rates) == len(decays) == len(params):
        raise ValueError("adamw_tensors: lr and weight_decay are one number, or one per parameter")
    hypers = [AdamWHyper(r, *betas, eps, d) for r, d in zip(rates, decays, strict=True)]
    return AdamWTensors(params, grads, exp_avgs, exp_avg_sqs, hypers)


@torch.no_grad()
def adamw(
    tensors: AdamWTensors,
    step: int,
    *,
    lr_mult: float = 1.0,
    clear_grad: bool = False,
    backend: Backend = "kernel",
) -> None:
    """One AdamW step of all `tensors` (see `adamw_tensors`), in place.

    Args:
        step: 1 at the first update.
        lr_mult: the schedule's factor on every learning rate.
        clear_grad: zero the gradients after they are read.

    In a CUDA graph call nanofuse.kernels.adamw, which reads lr_mult and step from a tensor.

    Source: Loshchilov and Hutter, https://arxiv.org/abs/1711.05101.

    Raises:
        RuntimeError, ValueError: see `nanofuse.ops`.
        ValueError: for the kernel, a tensor moved, or a parameter's .grad is another tensor.

    >>> import torch
    >>> from nanofuse import ops
    >>> p, g, m, v = torch.ones(4), torch.ones(4), torch.zeros(4), torch.zeros(4)
    >>> state = ops.adamw_tensors([p], [g], [m], [v], lr=0.1, weight_decay=0.0)
    >>> ops.adamw(state, step=1, backend="eager")
    >>> p
    tensor([0.9000, 0.9000, 0.9000, 0.9000])
    """
    param = tensors.tensors[0][0]
    kernel = runs_kernel("adamw", backend, {"params": param})
    from nanofuse.kernels import adamw as op

    if kernel:
        from nanofuse.ops.launch import launch_in_place

        schedule = op.adamw_schedule(lr_mult, step, param.device)
        launch_in_place(lambda schedule: op.adamw(tensors, schedule, clear_grad), [schedule])
        return
    for (p, g, m, v), hyper in zip(tensors.tensors, tensors.hyper.tolist(), strict=True):
        lr, beta1, beta2, eps, weight_decay = hyper
        op.adamw_ref(p, g, m, v, lr * lr_mult, beta1, beta2, eps, weight_decay, step)
        if clear_grad:
            g.zero_()
