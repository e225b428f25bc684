"""gradient_squares at depth 16: every gradient of the recipe's model, fp32 and bf16."""

import torch

from nanofuse.bench.harness import ON_GPU, measure, op_benchmark
from nanofuse.kernels.gradient_squares import GradientSquares, gradient_squares_ref
from nanofuse.model.config import GPTConfig

FP32_ROLES = ("matrices", "lm_head")
WIDTH = 1024 if ON_GPU else 16


def gradients(device):
    """A gradient per role of d16, or tiny ones; the tables' are bf16."""
    config = GPTConfig.from_depth(16) if ON_GPU else GPTConfig.from_depth(2, 32, 32, vocab_size=64)
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(count, device=device, generator=generator).to(
            torch.float32 if role in FP32_ROLES else torch.bfloat16
        )
        for role, count in config.param_counts().items()
    ]


@op_benchmark
def bench_gradient_squares(benchmark, device):
    grads = gradients(device)
    op = GradientSquares(grads)
    truth = gradient_squares_ref(grads)
    assert ((op().double() - truth) / truth).abs().max() < 1e-4
    alternatives = {"foreach_norm": lambda: torch._foreach_norm(grads)}
    moved = sum(g.numel() * g.element_size() for g in grads)
    measure(benchmark, op, moved, alternatives=alternatives, shape=f"{len(grads)} tensors")
