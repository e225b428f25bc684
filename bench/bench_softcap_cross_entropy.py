"""softcap_cross_entropy: the logits of 65,536 tokens over a vocabulary of 32,768."""

import importlib.util

import pytest
import torch

from nanofuse.bench.harness import (
    CAST_ERROR,
    ON_GPU,
    compiled,
    measure,
    op_benchmark,
    quantize_both_layouts,
    zipf_tokens,
)
from nanofuse.kernels.common.fp8 import E5M2, Scaling
from nanofuse.kernels.softcap_cross_entropy import (
    LOGIT_SOFTCAP,
    mean_grad_scale,
    softcap_cross_entropy_fwd,
    softcap_cross_entropy_fwd_bwd,
    softcap_cross_entropy_ref,
)

ROWS, VOCAB = (65536, 32768) if ON_GPU else (16, 32)
EAGER_ROWS = ROWS // 8  # eager keeps about ten fp32 copies of the logits
CHECKED_ROWS = min(ROWS, 1024)


def gradient(logits, targets):
    """Loss and bf16 gradient of the reference by autograd."""
    logits = logits.detach().requires_grad_()
    loss = compiled(softcap_cross_entropy_ref)(logits, targets, VOCAB)
    return loss.detach(), *torch.autograd.grad(loss, logits)


def fp8_gradient(logits, targets):
    """The reference's gradient, then FP8 with a dynamic scale, then a transposed copy."""
    return compiled(quantize_both_layouts)(gradient(logits, targets)[1], E5M2)


def eager_chunks(logits, targets):
    """Eager loss and gradient in chunks of EAGER_ROWS rows, to fit into memory."""
    for x, t in zip(logits.split(EAGER_ROWS), targets.split(EAGER_ROWS), strict=True):
        x = x.detach().requires_grad_()
        torch.autograd.grad(softcap_cross_entropy_ref(x, t, VOCAB), x)


def liger(logits, targets):
    """Loss and gradient in place by Liger-Kernel's softcapped cross-entropy."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    x = logits.detach().requires_grad_()
    arguments = (None, -1, 0.0, 0.0, "mean", LOGIT_SOFTCAP)
    loss = LigerCrossEntropyFunction.apply(x, targets, *arguments)[0]
    return torch.autograd.grad(loss, x)


def with_liger(alternatives, logits, targets):
    if importlib.util.find_spec("liger_kernel"):
        copy = logits.clone()  # it overwrites its logits
        alternatives["liger"] = lambda: liger(copy, targets)
    return alternatives


@pytest.fixture(scope="module")
def case(device):
    """Logits (N, V) bf16 and targets (N,); the kernels are checked on their first rows."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.empty(ROWS, VOCAB, dtype=torch.bfloat16, device=device)
    logits.normal_(0, 3, generator=generator)
    targets = zipf_tokens((ROWS,), VOCAB, device)
    check(logits[:CHECKED_ROWS], targets[:CHECKED_ROWS])
    return logits, targets


def check(logits, targets):
    scaling = Scaling.from_bound(2.0 / CHECKED_ROWS, E5M2, logits.device)
    scale = mean_grad_scale(targets)
    x = logits.float().requires_grad_()
    expected = softcap_cross_entropy_ref(x, targets, VOCAB)
    expected.backward()
    losses, _, grad, operand = softcap_cross_entropy_fwd_bwd(logits, targets, scale, VOCAB, scaling)
    torch.testing.assert_close(losses.mean(), expected, rtol=1e-5, atol=1e-5)
    for got, limit in ((grad.float(), 3e-3), (operand.dequantize(), 0.1)):
        error = (got - x.grad).norm() / x.grad.norm()
        assert error < CAST_ERROR * limit, error


@op_benchmark
def bench_losses(benchmark, case):
    """Evaluation: losses and no gradient."""
    logits, targets = case

    def reference(op):
        with torch.no_grad():
            return op(logits, targets, VOCAB)

    measure(
        benchmark,
        lambda: softcap_cross_entropy_fwd(logits, targets, VOCAB),
        bytes_moved=2 * logits.numel(),
        alternatives={
            "compile": lambda: reference(compiled(softcap_cross_entropy_ref)),
        },
        shape=logits.shape,
    )


@op_benchmark
def bench_bf16_gradient(benchmark, case):
    """Losses, and the gradient written over the logits."""
    logits, targets = case
    scale = mean_grad_scale(targets)
    buffer = logits.clone()

    def op():
        return softcap_cross_entropy_fwd_bwd(buffer, targets, scale, VOCAB, None, True, True)

    alternatives = {
        "eager": lambda: eager_chunks(logits, targets),
        "compile": lambda: gradient(logits, targets),
    }
    measure(
        benchmark,
        op,
        bytes_moved=(2 + 2) * logits.numel(),
        alternatives=with_liger(alternatives, logits, targets),
        shape=logits.shape,
    )


@op_benchmark
def bench_fp8_gradient(benchmark, case, device):
    """Losses, and the gradient in FP8, row-major and transposed."""
    logits, targets = case
    scale = mean_grad_scale(targets)
    scaling = Scaling.from_bound(2.0 / ROWS, E5M2, device)

    def op():
        return softcap_cross_entropy_fwd_bwd(logits, targets, scale, VOCAB, scaling, False)

    measure(
        benchmark,
        op,
        bytes_moved=(2 + 1 + 1) * logits.numel(),
        alternatives={"compile": lambda: fp8_gradient(logits, targets)},
        shape=logits.shape,
    )
