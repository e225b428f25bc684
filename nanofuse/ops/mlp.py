"""Squared ReLU, alone and between the two layers of an MLP."""

from torch import Tensor

from nanofuse.ops.backend import Backend, runs_kernel


def relu_squared(
    x: Tensor,  # (..., C) bf16 or fp32
    *,
    backend: Backend = "kernel",
) -> Tensor:
    """max(x, 0)^2 of every element, in x's shape and dtype; differentiable.

    Source: Primer, https://arxiv.org/abs/2109.08668.

    Raises:
        RuntimeError, ValueError: see `nanofuse.ops`.

    >>> import torch
    >>> from nanofuse import ops
    >>> ops.relu_squared(torch.tensor([-1.0, 2.0, 3.0]), backend="eager")
    tensor([0., 4., 9.])
    """
    kernel = runs_kernel("relu_squared", backend, {"x": x})
    from nanofuse.kernels import relu_squared as op

    if not kernel:
        return op.relu_squared_ref(x)
    from nanofuse.ops.launch import launch

    return launch(op.relu_squared, x)


def relu_squared_mlp(
    x: Tensor,  # (..., C) bf16 or fp32
    up: Tensor,  # (F, C), x's dtype
    down: Tensor,  # (E, F), x's dtype
    *,
    backend: Backend = "kernel",
) -> Tensor:
    """max(x up^T, 0)^2 down^T, (..., E) in x's dtype; differentiable.

    The first product and the squared ReLU are one kernel, and so are their backward passes. The
    other products are PyTorch's. F hidden features are kept for the backward pass, once.

    Source: Primer, https://arxiv.org/abs/2109.08668.

    Raises:
        RuntimeError, ValueError: see `nanofuse.ops`.
        ValueError: shapes that do not fit; for the kernel no rows, or C, E or F that are no
            multiples of 16.

    >>> import torch
    >>> from nanofuse import ops
    >>> x, up, down = torch.ones(2, 3, 16), torch.ones(32, 16), torch.ones(16, 32)
    >>> z = ops.relu_squared_mlp(x, up, down, backend="eager")
    >>> z.shape, z[0, 0, 0].item()
    (torch.Size([2, 3, 16]), 8192.0)
    """
    if up.dim() != 2 or up.size(1) != x.size(-1) or down.dim() != 2 or down.size(1) != up.size(0):
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, up, down))
        raise ValueError(f"relu_squared_mlp: x, up and down of shapes {shapes} do not fit")
    kernel = runs_kernel("relu_squared_mlp", backend, {"x": x, "up": up, "down": down})
    from nanofuse.kernels import relu_squared_mlp as op

    if not kernel:
        return op.relu_squared_mlp_ref(x, up, down)
    from nanofuse.ops.launch import launch

    return launch(op.relu_squared_mlp, x, up, down)
