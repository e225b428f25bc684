"""Cases of the MLP's ops and of the loss."""

import torch

from nanofuse.bench.cases.case import Case, looked_up, randn, sizes
from nanofuse.bench.harness import zipf_tokens
from nanofuse.kernels.common.fp8 import E4M3, E5M2, Scaling
from nanofuse.kernels.linear_relu_squared import linear_relu_squared_bwd, linear_relu_squared_fwd
from nanofuse.kernels.linear_softcap_cross_entropy import (
    linear_softcap_cross_entropy_dw,
    linear_softcap_cross_entropy_dx,
    linear_softcap_cross_entropy_fwd,
    weighted_rows,
)
from nanofuse.kernels.quantize import quantize
from nanofuse.kernels.relu_squared import relu_squared_bwd, relu_squared_fwd
from nanofuse.kernels.softcap_cross_entropy import (
    mean_grad_scale,
    softcap_cross_entropy_bwd,
    softcap_cross_entropy_fwd,
    softcap_cross_entropy_fwd_bwd,
)


def relu_squared_case(rows, device):
    x = randn(device, rows, 4 * sizes(device).width)
    scaling = Scaling.from_bound(x.max().item() ** 2, E4M3, device)

    def run():
        return relu_squared_fwd(x, scaling)

    return Case(run, tuple(x.shape), x, args=(x, scaling))


def relu_squared_bwd_case(rows, device):
    dy, x = (randn(device, rows, 4 * sizes(device).width) for _ in range(2))
    bound = 2 * (x.relu() * dy).abs().max().item()
    scaling = Scaling.from_bound(1.01 * bound, E5M2, device)  # the product is rounded to bf16

    def run():
        return relu_squared_bwd(dy, x, scaling)

    return Case(run, tuple(x.shape), (dy, x), args=(dy, x, scaling))


def operand(device, bound, dtype, *shape, factor=1.0):
    """A random FP8Operand."""
    x = factor * torch.randn(shape, device=device)
    return quantize(x, Scaling.from_bound(bound, dtype, device))


def linear_relu_squared_case(rows, device):
    k = sizes(device).width
    n = 4 * k
    x = operand(device, 6.0, E4M3, rows, k)
    w = operand(device, 6 / k**0.5, E4M3, n, k, factor=k**-0.5)
    scaling = Scaling.from_bound(36.0, E4M3, device)
    return Case(
        lambda: linear_relu_squared_fwd(x, w, scaling),
        (rows, k, n),
        (x.data, w.data),
        flops=2 * rows * k * n,
        args=(x, w, scaling),
    )


def linear_relu_squared_bwd_case(rows, device):
    k = sizes(device).width
    n = 4 * k
    dz = operand(device, 6.0, E5M2, rows, k)
    v = operand(device, 6 / k**0.5, E4M3, k, n, factor=k**-0.5)
    h = randn(device, rows, n)
    y = relu_squared_fwd(h, Scaling.from_bound(36.0, E4M3, device))
    scaling = Scaling.from_bound(60.0, E5M2, device)
    return Case(
        lambda: linear_relu_squared_bwd(dz, v, y, scaling),
        (rows, k, n),
        (dz.data, v.transposed, y.data),
        flops=2 * rows * k * n,
        args=(dz, v, y, scaling, h),
    )


def linear_relu_squared_bf16_case(rows, device, dtype=torch.bfloat16):
    k = sizes(device).width
    x = torch.randn(rows, k, device=device).to(dtype)
    w = (torch.randn(4 * k, k, device=device) / k**0.5).to(dtype)
    return Case(
        lambda: linear_relu_squared_fwd(x, w),
        (rows, k, 4 * k),
        (x, w),
        flops=8 * rows * k**2,
        args=(x, w),
    )


def linear_relu_squared_bwd_bf16_case(rows, device, dtype=torch.bfloat16):
    k = sizes(device).width
    dz, h = (torch.randn(rows, n, device=device).to(dtype) for n in (k, 4 * k))
    v, y = (torch.randn(k, 4 * k, device=device) / k**0.5).to(dtype), h.relu().square()
    return Case(
        lambda: linear_relu_squared_bwd(dz, v, y),
        (rows, k, 4 * k),
        (dz, v, y),
        flops=8 * rows * k**2,
        args=(dz, v, y, h),
    )


def logits_inputs(rows, device):
    """Logits (N, V) bf16, targets (N,) and V."""
    vocab = sizes(device).vocab
    logits = torch.empty(rows, vocab, dtype=torch.bfloat16, device=device).normal_(0, 3)
    return logits, zipf_tokens((rows,), vocab, device), vocab


def softcap_cross_entropy_fwd_case(rows, device):
    """Losses and no gradient, as in an evaluation."""
    args = logits_inputs(rows, device)
    return Case(lambda: softcap_cross_entropy_fwd(*args), tuple(args[0].shape), args[:2], args=args)


def softcap_cross_entropy_bwd_case(rows, device):
    """The gradient in FP8, row-major and transposed."""
    logits, targets, vocab = logits_inputs(rows, device)
    _, lse = softcap_cross_entropy_fwd(logits, targets, vocab)
    scale, scaling = torch.ones(1, device=device), Scaling.from_bound(2.0, E5M2, device)

    def run():
        return softcap_cross_entropy_bwd(logits, targets, lse, scale, vocab, scaling)

    return Case(run, tuple(logits.shape), (logits, targets, lse))


def softcap_cross_entropy_case(rows, device, fp8):
    """Losses and gradient: in FP8, or in bf16 over the logits."""
    logits, targets, vocab = logits_inputs(rows, device)
    scale = mean_grad_scale(targets)
    scaling = Scaling.from_bound(2.0 / rows, E5M2, device) if fp8 else None
    buffer = logits if fp8 else logits.clone()

    def run():
        return softcap_cross_entropy_fwd_bwd(
            buffer, targets, scale, vocab, scaling, inplace=not fp8
        )

    return Case(run, tuple(logits.shape), (logits, targets), args=(logits, targets, vocab))


def head_inputs(rows, device, fp8, width=None, dtype=torch.bfloat16):
    """x (N, C) and w (V, C), FP8Operands or in `dtype`; targets (N,) and V."""
    width, vocab = width or sizes(device).width, sizes(device).vocab
    targets = zipf_tokens((rows,), vocab, device)
    if fp8:
        x = operand(device, 6.0, E4M3, rows, width)
        w = operand(device, 18 / width**0.5, E4M3, vocab, width, factor=3 * width**-0.5)
    else:
        x = torch.randn(rows, width, device=device).to(dtype)
        w = (torch.randn(vocab, width, device=device) * (3 * width**-0.5)).to(dtype)
    return x, w, targets, vocab


def linear_softcap_case(rows, device, fp8, width=None, dtype=torch.bfloat16):
    """lm_head's product with losses and u, in FP8 in both layouts."""
    args = head_inputs(rows, device, fp8, width, dtype)
    x, w, targets, vocab = args

    def run():
        losses, lse, grad = linear_softcap_cross_entropy_fwd(*args)
        return losses, lse, grad.u, grad.weights, grad.at_target

    read = (x.data, w.data, targets) if fp8 else (x, w, targets)
    c = (x.data if fp8 else x).size(1)
    return Case(run, (rows, c, vocab), read, flops=2 * rows * c * vocab, args=args)


def head_grad(rows, device, fp8, width=None):
    """x, w and targets, and the LogitsGrad and scale of their mean loss."""
    args = head_inputs(rows, device, fp8, width)
    *_, grad = linear_softcap_cross_entropy_fwd(*args)
    return *args[:3], grad, mean_grad_scale(args[2])


def weighted_rows_case(rows, device, fp8, width=None):
    x, _, _, grad, scale = head_grad(rows, device, fp8, width)
    read = x.transposed if fp8 else x

    def run():
        weighted = weighted_rows(x, grad, scale)
        return weighted.transposed if fp8 else weighted

    return Case(run, tuple(read.shape), (read, grad.weights), args=(x, grad, scale))


def linear_softcap_dx_case(rows, device, fp8, width=None):
    """In place of the product; rows of w are gathered."""
    x, w, targets, grad, scale = head_grad(rows, device, fp8, width)
    matrix = w.data if fp8 else w
    product = torch.zeros(rows, matrix.size(1), dtype=torch.bfloat16, device=device)
    return Case(
        lambda: linear_softcap_cross_entropy_dx(product, w, grad, scale),
        tuple(product.shape),
        (product, grad.weights, grad.at_target, looked_up(matrix, targets)),
        product,
        returns_new=False,
        args=(product, w, grad, scale),
    )


def linear_softcap_dw_case(rows, device, fp8, width=None):
    """Adds the targets' rows, sorted, to the gradient of w."""
    x, w, targets, grad, scale = head_grad(rows, device, fp8, width)
    x_data = x.data if fp8 else x
    out = torch.zeros(grad.u.data.size(1) if fp8 else w.size(0), x_data.size(1), device=device)
    rows_moved = looked_up(out, targets)
    return Case(
        lambda: linear_softcap_cross_entropy_dw(x, grad, scale, out),
        tuple(x_data.shape),
        (x_data, targets, grad.at_target, rows_moved),
        rows_moved,
        returns_new=False,
        args=(x, grad, scale, out),
    )
