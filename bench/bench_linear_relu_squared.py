"""linear_relu_squared at the MLP of depth 16, in FP8 and bf16, forward and backward.

The alternatives are a library's GEMM followed by the relu_squared kernel, between which the hidden
layer passes through memory in bf16.
"""

from functools import partial

import pytest
import torch

from nanofuse.bench.checks import relative_error
from nanofuse.bench.harness import CAST_ERROR, ON_GPU, compiled, measure, op_benchmark
from nanofuse.kernels.common.fp8 import E4M3, E5M2, Scaling
from nanofuse.kernels.linear_relu_squared import (
    linear_relu_squared_bwd,
    linear_relu_squared_bwd_ref,
    linear_relu_squared_fwd,
    linear_relu_squared_ref,
)
from nanofuse.kernels.quantize import quantize
from nanofuse.kernels.relu_squared import relu_squared_bwd, relu_squared_fwd
from nanofuse.model.providers import PRODUCTS

M, K, N = (65536, 1024, 4096) if ON_GPU else (64, 32, 48)
PLAIN = torch.bfloat16 if ON_GPU else torch.float32  # the interpreter's products of bf16 are wrong


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


def operand(device, bound, dtype, *shape, factor=1.0):
    """A random FP8Operand."""
    x = factor * torch.randn(shape, device=device)
    return quantize(x, Scaling.from_bound(bound, dtype, device))


def forward_case(device):
    """The fused op, its unfused alternative, which takes a provider of products, and the fp32
    reference."""
    x = operand(device, 6.0, E4M3, M, K)
    w = operand(device, 6 / K**0.5, E4M3, N, K, factor=K**-0.5)
    scaling = Scaling.from_bound(36.0, E4M3, device)

    def unfused(gemm):
        return relu_squared_fwd(gemm.forward(x, w), scaling, want_plain=False)[1]

    fused = partial(linear_relu_squared_fwd, x, w, scaling)
    reference = partial(linear_relu_squared_ref, x.dequantize(), w.dequantize())
    return fused, unfused, reference


def backward_case(device):
    dz = operand(device, 6.0, E5M2, M, K)
    v = operand(device, 6 / K**0.5, E4M3, K, N, factor=K**-0.5)
    h = torch.randn(M, N, device=device).bfloat16()
    _, y = relu_squared_fwd(h, Scaling.from_bound(36.0, E4M3, device), want_plain=False)
    scaling = Scaling.from_bound(60.0, E5M2, device)

    def unfused(gemm):
        return relu_squared_bwd(gemm.input_grad(dz, v), h, scaling, want_plain=False)[1]

    fused = partial(linear_relu_squared_bwd, dz, v, y, scaling)
    tensors = [x.dequantize() for x in (dz, v, y)]
    return fused, unfused, partial(linear_relu_squared_bwd_ref, *tensors)


def bf16_case(device, backward):
    """In bf16 (fp32 on a CPU): the fused op, a GEMM followed by a kernel, and the reference, for
    torch.compile to fuse."""
    x, h = (torch.randn(M, n, device=device).to(PLAIN) for n in (K, N))
    w = torch.randn((K, N) if backward else (N, K), device=device) / K**0.5
    w, y = w.to(PLAIN), h.relu().square()

    def unfused():
        if backward:
            return relu_squared_bwd(x @ w, h)[0]
        return relu_squared_fwd(x @ w.t())[0]

    if backward:
        op, reference = linear_relu_squared_bwd, linear_relu_squared_bwd_ref
        return partial(op, x, w, y), unfused, partial(reference, x, w, y)
    op, reference = linear_relu_squared_fwd, linear_relu_squared_ref
    return partial(op, x, w), unfused, partial(reference, x, w)


@op_benchmark
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def bench_linear_relu_squared(benchmark, device, backward):
    op, unfused, reference = (backward_case if backward else forward_case)(device)
    alternatives = {name: partial(unfused, gemm) for name, gemm in providers().items()}
    exact = reference()
    bound = 0.08 if backward else 0.04  # e5m2 rounds to 2^-3, e4m3 to 2^-4
    for run in (op, *alternatives.values()):
        assert relative_error(run().dequantize(), exact) < CAST_ERROR * bound
    del exact
    measure(
        benchmark,
        op,
        # operands; what is written in two layouts; y, which backward reads
        bytes_moved=(M + N) * K + (3 if backward else 2) * M * N,
        flops=2 * M * N * K,
        alternatives=alternatives,
        shape=(M, K, N),
    )


@op_benchmark
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def bench_linear_relu_squared_bf16(benchmark, device, backward):
    op, unfused, reference = bf16_case(device, backward)
    assert relative_error(op(), unfused()) < 0.01  # twice the rounding of bf16, and of h
    measure(
        benchmark,
        op,
        bytes_moved=2 * (M + N) * K + (4 if backward else 2) * M * N,
        flops=2 * M * N * K,
        alternatives={"product and kernel": unfused, "compile": compiled(reference)},
        shape=(M, K, N),
    )
