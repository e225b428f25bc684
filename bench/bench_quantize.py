"""quantize: bf16 to FP8, row-major and transposed, of attention outputs and MLP activations."""

import pytest
import torch

from nanofuse.bench.checks import fp8_steps, relative_error
from nanofuse.bench.harness import ON_GPU, compiled, measure, op_benchmark, quantize_both_layouts
from nanofuse.kernels.common.fp8 import E4M3, Scaling
from nanofuse.kernels.quantize import quantize

SHAPES = [(65536, 1024), (65536, 4096)] if ON_GPU else [(64, 128)]


@op_benchmark
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_quantize(benchmark, device, shape):
    x = torch.randn(shape, device=device).bfloat16()
    scaling = Scaling.from_bound(x.abs().max().item(), E4M3, device)
    expected, transposed, inverse_scale = quantize_both_layouts(x, E4M3)
    operand = quantize(x, scaling)
    if ON_GPU:
        assert fp8_steps(operand.data, expected).max() <= 1
        assert fp8_steps(operand.transposed, transposed).max() <= 1
    else:  # the interpreter truncates
        assert relative_error(operand.dequantize(), expected.float() * inverse_scale) < 0.1
    measure(
        benchmark,
        lambda: quantize(x, scaling),
        bytes_moved=x.numel() * (2 + 1 + 1),
        alternatives={
            "eager": lambda: quantize_both_layouts(x, E4M3),
            "compile": lambda: compiled(quantize_both_layouts)(x, E4M3),
        },
        shape=shape,
    )
