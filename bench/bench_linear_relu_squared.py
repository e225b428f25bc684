"""linear_relu_squared at the MLP of depth 16, in FP8 and bf16, forward and backward.

The alternatives are a library's GEMM followed by the relu_squared kernel, between which the hidden
layer passes through memory in bf16.
"""

from functools import partial

import pytest
import torch

from nanofuse.bench.cases import mlp
from nanofuse.bench.cases.case import ROWS
from nanofuse.bench.checks import relative_error
from nanofuse.bench.harness import CAST_ERROR, ON_GPU, compiled, measure_case, op_benchmark
from nanofuse.kernels.linear_relu_squared import (
    linear_relu_squared_bwd_ref,
    linear_relu_squared_ref,
)
from nanofuse.kernels.relu_squared import relu_squared_bwd, relu_squared_fwd
from nanofuse.model.providers import PRODUCTS

PLAIN = torch.bfloat16 if ON_GPU else torch.float32  # the interpreter's products of bf16 are wrong
PASSES = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


def providers():
    """{name: provider of products} of the libraries that load; Transformer Engine is optional."""
    found = {}
    for record in PRODUCTS:
        if "fp8" not in record.dtypes:
            continue
        try:
            found[record.name] = record.build()
        except ValueError as error:
            print(error)
    return found


def unfused(case, gemm, backward):
    """What a provider of products computes, and then the relu_squared kernel."""
    if backward:
        dz, v, _, scaling, h = case.args
        return relu_squared_bwd(gemm.input_grad(dz, v), h, scaling)
    x, w, scaling = case.args
    return relu_squared_fwd(gemm.forward(x, w), scaling)


@op_benchmark
@PASSES
def bench_linear_relu_squared(benchmark, device, backward):
    make = mlp.linear_relu_squared_bwd_case if backward else mlp.linear_relu_squared_case
    case = make(ROWS, device)
    reference = linear_relu_squared_bwd_ref if backward else linear_relu_squared_ref
    operands = case.args[: 3 if backward else 2]
    exact = reference(*(x.dequantize() for x in operands))
    alternatives = {
        name: partial(unfused, case, gemm, backward) for name, gemm in providers().items()
    }
    bound = 0.08 if backward else 0.04  # e5m2 rounds to 2^-3, e4m3 to 2^-4
    for run in (case.run, *alternatives.values()):
        assert relative_error(run().dequantize(), exact) < CAST_ERROR * bound
    del exact
    measure_case(benchmark, case, alternatives)


@op_benchmark
@PASSES
def bench_linear_relu_squared_bf16(benchmark, device, backward):
    """In bf16 (fp32 on a CPU): a GEMM followed by a kernel, and torch.compile, beside it."""
    if backward:
        case = mlp.linear_relu_squared_bwd_bf16_case(ROWS, device, PLAIN)
        dz, v, y, h = case.args
        reference = partial(linear_relu_squared_bwd_ref, dz, v, y)
    else:
        case = mlp.linear_relu_squared_bf16_case(ROWS, device, PLAIN)
        x, w = case.args
        reference = partial(linear_relu_squared_ref, x, w)

    def two_kernels():
        return relu_squared_bwd(dz @ v, h) if backward else relu_squared_fwd(x @ w.t())

    # twice the rounding of bf16, and of h
    assert relative_error(case.run(), two_kernels()) < 0.01
    alternatives = {"product and kernel": two_kernels, "compile": compiled(reference)}
    measure_case(benchmark, case, alternatives)
