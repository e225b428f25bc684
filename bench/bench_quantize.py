"""quantize: bf16 to FP8 in both layouts, at the sizes of attention outputs and MLP activations."""

from functools import partial

import pytest
import torch

from bench.harness import ON_GPU, compiled, measure, op_benchmark
from kernels.fp8 import E4M3, Scaling
from kernels.quantize import quantize, quantize_ref

SHAPES = [(65536, 1024), (65536, 4096)] if ON_GPU else [(64, 128)]


def quantize_both_layouts(x):
    """What the compiled baseline does: dynamic scale, cast, transposed copy."""
    q, inverse_scale = quantize_ref(x, E4M3)
    return q, q.t().contiguous(), inverse_scale


@op_benchmark
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_quantize(benchmark, device, shape):
    x = torch.randn(shape, device=device).bfloat16()
    scaling = Scaling.from_bound(x.abs().max().item(), E4M3, device)
    op = quantize_both_layouts
    if ON_GPU:
        expected, transposed, _ = quantize_both_layouts(x)
        operand = quantize(x, scaling)
        assert torch.equal(operand.data.view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(operand.transposed.view(torch.uint8), transposed.view(torch.uint8))
        op = partial(quantize, scaling=scaling)
    measure(
        benchmark,
        lambda: op(x),
        bytes_moved=x.numel() * (2 + 1 + 1),
        alternatives={
            "eager": lambda: quantize_both_layouts(x),
            "compile": lambda: compiled(quantize_both_layouts)(x),
        },
        shape=shape,
    )
