"""relu_squared with FP8 operands in both layouts, forward and backward, at MLP activations."""

import pytest
import torch

from nanofuse.bench.cases.case import ROWS
from nanofuse.bench.cases.mlp import relu_squared_bwd_case, relu_squared_case
from nanofuse.bench.checks import assert_fp8, relative_error
from nanofuse.bench.harness import (
    ON_GPU,
    compiled,
    measure_case,
    op_benchmark,
    quantize_both_layouts,
)
from nanofuse.kernels.common.fp8 import E4M3, E5M2
from nanofuse.kernels.relu_squared import relu_squared_ref


def forward_ref(x):
    """The activation, then the quantisation that the compiled baseline does for the next GEMM."""
    return quantize_both_layouts(relu_squared_ref(x), E4M3)


def backward_ref(dy, x):
    """The activation's gradient, then quantised in the same way."""
    return quantize_both_layouts(2 * torch.relu(x) * dy, E5M2)


@op_benchmark
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def bench_relu_squared(benchmark, device, backward):
    case = (relu_squared_bwd_case if backward else relu_squared_case)(ROWS, device)
    *args, scaling = case.args
    reference = backward_ref if backward else forward_ref
    x = args[-1].float()
    exact = 2 * x.relu() * args[0].float() if backward else relu_squared_ref(x)
    operand = case.run()
    if ON_GPU:
        assert_fp8("relu_squared", operand, exact, scaling)
    else:  # the interpreter truncates
        assert relative_error(operand.dequantize(), exact) < 0.2
    del exact, operand, x
    alternatives = {
        "eager": lambda: reference(*args),
        "compile": lambda: compiled(reference)(*args),
    }
    measure_case(benchmark, case, alternatives)
