"""adamw at depth 16: lm_head, wte, eight value embeddings and the bigram table in two launches."""

import torch

from nanofuse.bench.cases.case import BIGRAM_FACTOR, D16, ROWS, TINY
from nanofuse.bench.cases.optim import adamw_case
from nanofuse.bench.checks import relative_error
from nanofuse.bench.harness import ON_GPU, compiled, measure_case, op_benchmark
from nanofuse.kernels.adamw import AdamWHyper, adamw_ref

VOCAB = (D16 if ON_GPU else TINY).vocab
BIGRAM_ROWS = BIGRAM_FACTOR * VOCAB
BF16, FP32 = torch.bfloat16, torch.float32
TENSORS = [  # (rows, dtype, AdamWHyper)
    (VOCAB, FP32, AdamWHyper(0.008, 0.8, 0.96, 1e-10, 0.01)),
    (VOCAB, BF16, AdamWHyper(0.3, 0.8, 0.995, 1e-10, 0.001)),
    *[(VOCAB, BF16, AdamWHyper(0.15, 0.8, 0.995, 1e-10, 0.01))] * 8,
    (BIGRAM_ROWS, BF16, AdamWHyper(0.3, 0.8, 0.995, 1e-10, 0.0)),
]
BOUND = 1e-3 if ON_GPU else 0.01  # bf16's rounding: the interpreter truncates
HYPERS = [hyper for *_, hyper in TENSORS]


def reference_step(lists, update, lr, step):
    """AdamW step of every tensor by `update` (adamw_ref, plain or compiled); clears the gradients.
    `lr` and `step` are CPU tensors."""
    for *tensors, hyper in zip(*lists, HYPERS, strict=True):
        update(
            *tensors, hyper.lr * lr, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay, step
        )
    torch._foreach_zero_(lists[1])


def fused_adamw(params, grads, *moments):
    """A step of torch.optim.AdamW(fused=True) on the same tensors, which clears the gradients."""
    groups = []
    for param, grad, hyper in zip(params, grads, HYPERS, strict=True):
        param.requires_grad_().grad = grad
        betas = hyper.beta1, hyper.beta2
        groups.append(
            {"params": [param], "lr": hyper.lr, "betas": betas, "eps": hyper.eps}
            | {"weight_decay": hyper.weight_decay}
        )
    optimizer = torch.optim.AdamW(groups, fused=True)

    def step():
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step


@op_benchmark
def bench_adamw(benchmark, device):
    case, *others = (adamw_case(ROWS, device, TENSORS) for _ in range(3))
    twin, third = (other.args for other in others)
    numbers = torch.tensor(1.0), torch.tensor(1.0)
    case.run()
    reference_step(twin, adamw_ref, *numbers)
    for ours, theirs in zip(case.args, twin, strict=True):
        assert all(relative_error(a, b) < BOUND for a, b in zip(ours, theirs, strict=True))
    alternatives = {
        "eager": lambda: reference_step(twin, adamw_ref, *numbers),
        "compile": lambda: reference_step(twin, compiled(adamw_ref), *numbers),
        "torch_fused": fused_adamw(*third),
    }
    measure_case(benchmark, case, alternatives)
