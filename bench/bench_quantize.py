"""quantize: bf16 to FP8, row-major and transposed, of attention outputs and MLP activations."""

import pytest

from nanofuse.bench.cases.case import ROWS
from nanofuse.bench.cases.stream import quantize_case
from nanofuse.bench.checks import fp8_steps, relative_error
from nanofuse.bench.harness import (
    ON_GPU,
    compiled,
    measure_case,
    op_benchmark,
    quantize_both_layouts,
)
from nanofuse.kernels.common.fp8 import E4M3


@op_benchmark
@pytest.mark.parametrize("factor", [1, 4], ids=["C", "4C"])
def bench_quantize(benchmark, device, factor):
    case = quantize_case(ROWS, device, factor)
    x, _ = case.args
    expected, transposed, inverse_scale = quantize_both_layouts(x, E4M3)
    operand = case.run()
    if ON_GPU:
        assert fp8_steps(operand.data, expected).max() <= 1
        assert fp8_steps(operand.transposed, transposed).max() <= 1
    else:  # the interpreter truncates
        assert relative_error(operand.dequantize(), expected.float() * inverse_scale) < 0.1
    alternatives = {
        "eager": lambda: quantize_both_layouts(x, E4M3),
        "compile": lambda: compiled(quantize_both_layouts)(x, E4M3),
    }
    measure_case(benchmark, case, alternatives)
