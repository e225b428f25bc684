"""relu_squared with FP8 operands in both layouts, forward and backward, at MLP activations."""

import pytest
import torch

from nanofuse.bench.checks import assert_fp8, relative_error
from nanofuse.bench.harness import ON_GPU, compiled, measure, op_benchmark, quantize_both_layouts
from nanofuse.kernels.common.fp8 import E4M3, E5M2, Scaling
from nanofuse.kernels.relu_squared import relu_squared_bwd, relu_squared_fwd, relu_squared_ref

SHAPE = (65536, 4096) if ON_GPU else (64, 128)


def forward_ref(x):
    """The activation, then the quantisation that the compiled baseline does for the next GEMM."""
    return quantize_both_layouts(relu_squared_ref(x), E4M3)


def backward_ref(dy, x):
    """The activation's gradient, then quantised in the same way."""
    return quantize_both_layouts(2 * torch.relu(x) * dy, E5M2)


@op_benchmark
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def bench_relu_squared(benchmark, device, backward):
    x, dy = (torch.randn(SHAPE, device=device).bfloat16() for _ in range(2))
    args, reference, kernel, dtype = (x,), forward_ref, relu_squared_fwd, E4M3
    if backward:
        args, reference, kernel, dtype = (dy, x), backward_ref, relu_squared_bwd, E5M2
    exact = 2 * x.float().relu() * dy.float() if backward else relu_squared_ref(x.float())
    scaling = Scaling.from_bound(exact.abs().max().item(), dtype, device)
    operand = kernel(*args, scaling, want_plain=False)[1]
    if ON_GPU:
        assert_fp8("relu_squared", operand, exact, scaling)
    else:  # the interpreter truncates
        assert relative_error(operand.dequantize(), exact) < 0.2
    del exact, operand
    measure(
        benchmark,
        lambda: kernel(*args, scaling, want_plain=False),
        bytes_moved=x.numel() * (6 if backward else 4),
        alternatives={
            "eager": lambda: reference(*args),
            "compile": lambda: compiled(reference)(*args),
        },
        shape=SHAPE,
    )
