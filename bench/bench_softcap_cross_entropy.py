"""softcap_cross_entropy: the logits of 65,536 tokens over a vocabulary of 32,768."""

import importlib.util

import torch

from nanofuse.bench.cases.case import ROWS
from nanofuse.bench.cases.mlp import softcap_cross_entropy_case, softcap_cross_entropy_fwd_case
from nanofuse.bench.harness import (
    CAST_ERROR,
    compiled,
    measure_case,
    op_benchmark,
    quantize_both_layouts,
)
from nanofuse.kernels.common.fp8 import E5M2, Scaling
from nanofuse.kernels.softcap_cross_entropy import (
    LOGIT_SOFTCAP,
    mean_grad_scale,
    softcap_cross_entropy_fwd_bwd,
    softcap_cross_entropy_ref,
)

EAGER_ROWS = ROWS // 8  # eager keeps about ten fp32 copies of the logits
CHECKED_ROWS = min(ROWS, 1024)


def gradient(logits, targets, vocab):
    """Loss and bf16 gradient of the reference by autograd."""
    logits = logits.detach().requires_grad_()
    loss = compiled(softcap_cross_entropy_ref)(logits, targets, vocab)
    return loss.detach(), *torch.autograd.grad(loss, logits)


def fp8_gradient(logits, targets, vocab):
    """The reference's gradient, then FP8 with a dynamic scale, then a transposed copy."""
    return compiled(quantize_both_layouts)(gradient(logits, targets, vocab)[1], E5M2)


def eager_chunks(logits, targets, vocab):
    """Eager loss and gradient in chunks of EAGER_ROWS rows, to fit into memory."""
    for x, t in zip(logits.split(EAGER_ROWS), targets.split(EAGER_ROWS), strict=True):
        x = x.detach().requires_grad_()
        torch.autograd.grad(softcap_cross_entropy_ref(x, t, vocab), x)


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


def check(logits, targets, vocab):
    """The kernels on the first rows."""
    logits, targets = logits[:CHECKED_ROWS], targets[:CHECKED_ROWS]
    scaling = Scaling.from_bound(2.0 / CHECKED_ROWS, E5M2, logits.device)
    scale = mean_grad_scale(targets)
    x = logits.float().requires_grad_()
    expected = softcap_cross_entropy_ref(x, targets, vocab)
    expected.backward()
    losses, _, operand = softcap_cross_entropy_fwd_bwd(logits, targets, scale, vocab, scaling)
    *_, grad = softcap_cross_entropy_fwd_bwd(logits, targets, scale, vocab)
    torch.testing.assert_close(losses.mean(), expected, rtol=1e-5, atol=1e-5)
    for got, limit in ((grad.float(), 3e-3), (operand.dequantize(), 0.1)):
        error = (got - x.grad).norm() / x.grad.norm()
        assert error < CAST_ERROR * limit, error


@op_benchmark
def bench_losses(benchmark, device):
    """Evaluation: losses and no gradient."""
    case = softcap_cross_entropy_fwd_case(ROWS, device)
    check(*case.args)

    def reference(op):
        with torch.no_grad():
            return op(*case.args)

    alternatives = {"compile": lambda: reference(compiled(softcap_cross_entropy_ref))}
    measure_case(benchmark, case, alternatives)


@op_benchmark
def bench_bf16_gradient(benchmark, device):
    """Losses, and the gradient written over the logits."""
    case = softcap_cross_entropy_case(ROWS, device, fp8=False)
    check(*case.args)
    alternatives = {
        "eager": lambda: eager_chunks(*case.args),
        "compile": lambda: gradient(*case.args),
    }
    measure_case(benchmark, case, with_liger(alternatives, *case.args[:2]))


@op_benchmark
def bench_fp8_gradient(benchmark, device):
    """Losses, and the gradient in FP8, row-major and transposed."""
    case = softcap_cross_entropy_case(ROWS, device, fp8=True)
    check(*case.args)
    measure_case(benchmark, case, {"compile": lambda: fp8_gradient(*case.args)})
