"""Quantisation to FP8 operands of matrix products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanofuse.ops.backend import Backend, runs_kernel

if TYPE_CHECKING:
    from nanofuse.kernels.common.fp8 import FP8Operand, Scaling


def fp8_scaling(
    bound: float,
    dtype: torch.dtype = torch.float8_e4m3fn,
    device: torch.device | str = "cuda",
) -> Scaling:
    """How `quantize` scales a tensor whose magnitudes are at most `bound`.

    Its fields, (1,) fp32 on `device`: scale, inverse_scale, and amax, the largest magnitude seen.
    dtype is float8_e4m3fn for activations and weights, float8_e5m2 for gradients.

    Source: https://arxiv.org/abs/2209.05433.

    Raises:
        ValueError: bound is not positive.

    >>> from nanofuse import ops
    >>> scaling = ops.fp8_scaling(7.0, device="cpu")
    >>> scaling.scale  # 448 / 7
    tensor([64.])
    """
    from nanofuse.kernels.common.fp8 import Scaling

    return Scaling.from_bound(bound, dtype, device)


@torch.no_grad()
def quantize(
    x: Tensor,  # (M, N) bf16 or fp32
    scaling: Scaling,
    *,
    backend: Backend = "kernel",
) -> FP8Operand:
    """FP8 copies of x in both layouts; scaling.amax is raised to max|x|. Not differentiable.

    The result has `data` (M, N), `transposed` (N, M), `inverse_scale` (1,) fp32, and
    `dequantize()`, x again but for the rounding. Values beyond the scaling's bound become it.

    Source: https://arxiv.org/abs/2209.05433.

    Raises:
        RuntimeError, ValueError: see `nanofuse.ops`.
        ValueError: x is no matrix; M or N is no multiple of 16.

    >>> import torch
    >>> from nanofuse import ops
    >>> scaling = ops.fp8_scaling(7.0, device="cpu")
    >>> operand = ops.quantize(torch.full((16, 32), 3.0), scaling, backend="eager")
    >>> operand.data.dtype, operand.transposed.shape, operand.dequantize()[0, 0].item()
    (torch.float8_e4m3fn, torch.Size([32, 16]), 3.0)
    >>> scaling.amax
    tensor([3.])
    """
    if x.dim() != 2:
        raise ValueError(f"quantize: x must be a matrix, not {tuple(x.shape)}")
    kernel = runs_kernel("quantize", backend, {"x": x, "scale": scaling.scale})
    from nanofuse.kernels import quantize as op

    if not kernel:
        return op.quantize_by_scaling_ref(x, scaling)
    from nanofuse.ops.launch import launch

    return launch(op.quantize, x, scaling)
