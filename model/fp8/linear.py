"""The baseline's bias-free linear layer: master weight cast to the input's dtype, or FP8 GEMMs.

In FP8 each operand is quantised with one dynamic scale, from its own amax, and multiplied by
torch._scaled_mm: e4m3 activations and weights forward, e5m2 gradients backward (or e4m3, but for
lm_head's). GEMMs that reduce over features (forward and input gradient) use fast accumulation;
weight gradients, which reduce over all tokens of a micro-step, do not.
"""

import torch
import torch.nn.functional as F
from torch import nn

from nanofuse.kernels.quantize import quantize_ref

FP8_MIN_DIM = 128
FP8_MULTIPLE = 16  # torch._scaled_mm's requirement on both dimensions


def _column_major(
    x,  # (R, C) row-major
):
    """The same matrix in column-major layout, which _scaled_mm requires of its second operand."""
    return x.t().contiguous().t()


def _gradients(
    ctx,
    grad,  # (M, N) bf16
    dtype,
):
    """Gradients of a ScaledMatmul's x (M, K) and weight (N, K), `grad` quantised to `dtype`."""
    x_fp8, x_scale, w_fp8, w_scale = ctx.saved_tensors
    g_fp8, g_scale = quantize_ref(grad, dtype)
    grad_x = torch._scaled_mm(
        g_fp8, _column_major(w_fp8), g_scale, w_scale, out_dtype=grad.dtype, use_fast_accum=True
    )
    grad_weight = torch._scaled_mm(
        g_fp8.t().contiguous(), _column_major(x_fp8), g_scale, x_scale, out_dtype=grad.dtype
    )
    return grad_x, grad_weight.to(ctx.weight_dtype)


class ScaledMatmul(torch.autograd.Function):
    """y = x @ weight.T with FP8 operands, and both gradients with FP8 operands too: e5m2."""

    @staticmethod
    def forward(
        ctx,
        x,  # (M, K) bf16
        weight,  # (N, K) fp32 or bf16
    ):
        x_fp8, x_scale = quantize_ref(x, torch.float8_e4m3fn)
        w_fp8, w_scale = quantize_ref(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x_fp8, x_scale, w_fp8, w_scale)
        ctx.weight_dtype = weight.dtype
        return torch._scaled_mm(
            x_fp8, w_fp8.t(), x_scale, w_scale, out_dtype=x.dtype, use_fast_accum=True
        )

    @staticmethod
    def backward(
        ctx,
        grad,  # (M, N) bf16
    ):
        return _gradients(ctx, grad, torch.float8_e5m2)


class ScaledMatmulE4M3(ScaledMatmul):
    """As ScaledMatmul, with gradients in e4m3; lm_head's stay e5m2 (`of_head`)."""

    of_head = ScaledMatmul

    @staticmethod
    def backward(
        ctx,
        grad,  # (M, N) bf16
    ):
        return _gradients(ctx, grad, torch.float8_e4m3fn)


def fp8_eligible(weight):
    """Whether both sizes of a (N, K) weight are large enough and aligned for FP8 GEMMs."""
    return all(size >= FP8_MIN_DIM and size % FP8_MULTIPLE == 0 for size in weight.shape)


class Linear(nn.Module):
    """y = x @ weight.T without bias. In training mode its GEMMs run in FP8 if `fp8` is set, in
    evaluation mode always in the input's dtype.
    """

    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))  # (N, K)
        self.fp8 = None  # autograd.Function of x (M, K) and weight (N, K)

    def forward(
        self,
        x,  # (..., K)
    ):
        if self.fp8 is not None and self.training:
            y = self.fp8.apply(x.reshape(-1, x.size(-1)), self.weight)
            return y.view(*x.shape[:-1], y.size(-1))
        return F.linear(x, self.weight.to(x.dtype))


def set_fp8(
    model,
    product,  # autograd.Function of x (M, K) and weight (N, K), such as ScaledMatmul, or None
):
    """Let `product` multiply in every eligible Linear, in lm_head its `of_head` where it has one;
    None turns FP8 off. Returns how many run in FP8."""
    eligible = [m for m in model.modules() if isinstance(m, Linear) and fp8_eligible(m.weight)]
    for module in eligible:
        of_head = module is getattr(model, "lm_head", None)
        module.fp8 = getattr(product, "of_head", product) if of_head else product
    return len(eligible) if product else 0
