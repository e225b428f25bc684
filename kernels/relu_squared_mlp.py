"""An MLP of two linear layers with a squared ReLU between them, differentiable, in bf16 or fp32.

    forward     y = max(x up^T, 0)^2,             z = y down^T
    backward    dh = 2 max(h, 0) (dz down),       h = x up^T
                dx = dh up,   dup = dh^T x,   ddown = dz^T y

kernels/linear_relu_squared.py makes y and dh, each in one kernel with its product; the other four
products are PyTorch's. y is kept for the backward pass, h is not. Squared ReLU: Primer,
https://arxiv.org/abs/2109.08668. The fused model does the same by hand, with FP8 operands.

Bytes, M rows, F hidden features: what the products read and write, and s*M*F kept. FLOPs, C
channels in and E out: 2*M*F*(C + E) forward, twice that backward.
"""

import torch

from nanofuse.kernels.linear_relu_squared import linear_relu_squared_bwd, linear_relu_squared_fwd
from nanofuse.kernels.relu_squared import relu_squared_ref


def relu_squared_mlp_ref(
    x,  # (..., C)
    up,  # (F, C)
    down,  # (E, F)
):
    """max(x up^T, 0)^2 down^T, (..., E) in x's dtype."""
    return relu_squared_ref(x @ up.t()) @ down.t()


class _ReluSquaredMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x,  # (M, C)
        up,  # (F, C)
        down,  # (E, F)
    ):
        y = linear_relu_squared_fwd(x, up)
        ctx.save_for_backward(x, up, down, y)
        return y @ down.t()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx,
        dz,  # (M, E), any strides
    ):
        x, up, down, y = ctx.saved_tensors
        wants_x, wants_up, wants_down = ctx.needs_input_grad
        dz = dz.contiguous()
        if wants_x or wants_up:
            dh = linear_relu_squared_bwd(dz, down, y)
        return (
            dh @ up if wants_x else None,
            dh.t() @ x if wants_up else None,
            dz.t() @ y if wants_down else None,
        )


def relu_squared_mlp(
    x,  # (..., C) bf16 or fp32, contiguous
    up,  # (F, C), x's dtype, contiguous
    down,  # (E, F), x's dtype, contiguous
):
    """max(x up^T, 0)^2 down^T, (..., E) in x's dtype; differentiable.

    Raises:
        ValueError: shapes or dtypes that do not fit; no rows; C, E or F that are no multiples of
            16; a tensor that is not contiguous.
    """
    if not x.is_contiguous():
        raise ValueError("relu_squared_mlp takes a contiguous x; call .contiguous() on it")
    z = _ReluSquaredMLP.apply(x.view(-1, x.size(-1)), up, down)
    return z.view(*x.shape[:-1], -1)
