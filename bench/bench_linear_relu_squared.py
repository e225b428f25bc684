"""linear_relu_squared at the MLP of depth 16, against a product and the relu_squared kernel."""

import pytest
import torch

from bench.harness import ON_GPU, measure, op_benchmark
from kernels.fp8 import E4M3, E5M2, Scaling
from kernels.linear_relu_squared import (
    linear_relu_squared_bwd,
    linear_relu_squared_bwd_ref,
    linear_relu_squared_fwd,
    linear_relu_squared_ref,
)
from kernels.quantize import quantize
from kernels.relu_squared import relu_squared_bwd, relu_squared_fwd
from model.gemm import TorchGemm, TransformerEngineGemm
from tests.kernels.checks import relative_error

M, K, N = (65536, 1024, 4096) if ON_GPU else (64, 32, 48)


def providers():
    """{name: products} of the libraries that load; Transformer Engine is optional."""
    try:
        return {"scaled_mm": TorchGemm(), "te": TransformerEngineGemm()}
    except (ImportError, OSError) as error:
        print(f"without Transformer Engine: {error}")
        return {"scaled_mm": TorchGemm()}


def forward(device):
    """The op, {name: the same by a product and relu_squared}, and its reference."""
    x = quantize(torch.randn(M, K, device=device), Scaling.from_bound(6.0, E4M3, device))
    w = torch.randn(N, K, device=device) / K**0.5
    w = quantize(w, Scaling.from_bound(6 / K**0.5, E4M3, device))
    scaling = Scaling.from_bound(36.0, E4M3, device)

    def unfused(gemm):
        h = gemm.forward(x, w)
        return h, relu_squared_fwd(h, scaling, want_plain=False)[1]

    return (
        lambda: linear_relu_squared_fwd(x, w, scaling),
        {name: lambda gemm=gemm: unfused(gemm) for name, gemm in providers().items()},
        lambda: linear_relu_squared_ref(x.dequantize(), w.dequantize()),
    )


def backward(device):
    """The same of the backward pass, whose results have no plain part."""
    g = quantize(torch.randn(M, K, device=device), Scaling.from_bound(6.0, E5M2, device))
    w = torch.randn(K, N, device=device) / K**0.5
    w = quantize(w, Scaling.from_bound(6 / K**0.5, E4M3, device))
    h = torch.randn(M, N, device=device).bfloat16()
    scaling = Scaling.from_bound(60.0, E5M2, device)

    def unfused(gemm):
        return None, relu_squared_bwd(gemm.input_grad(g, w), h, scaling, want_plain=False)[1]

    def reference():
        return None, linear_relu_squared_bwd_ref(g.dequantize(), w.dequantize(), h.float())

    return (
        lambda: (None, linear_relu_squared_bwd(g, w, h, scaling)),
        {name: lambda gemm=gemm: unfused(gemm) for name, gemm in providers().items()},
        reference,
    )


def check(results, expected):
    """(h or None, operand) against (h or None, activation or gradient) in fp32. FP8 rounds to 2^-4
    (e4m3) or 2^-3 (e5m2) at most, and its layouts agree."""
    (h, operand), (exact_h, exact) = results, expected
    bound = 0.04 if h is not None else 0.08
    if h is not None:
        assert relative_error(h, exact_h) < 5e-3
    assert relative_error(operand.dequantize(), exact) < bound
    assert torch.equal(operand.data.t().view(torch.uint8), operand.transposed.view(torch.uint8))


@op_benchmark
@pytest.mark.parametrize("case", [forward, backward], ids=lambda case: case.__name__)
def bench_linear_relu_squared(benchmark, device, case):
    op, alternatives, reference = case(device)
    if ON_GPU:
        expected = reference()
        for run in (op, *alternatives.values()):
            check(run(), expected)
        del expected
    measure(
        benchmark,
        op if ON_GPU else reference,
        # operands; h in bf16, written or read; the activation or its gradient in both layouts
        bytes_moved=(M + N) * K + 4 * M * N,
        flops=2 * M * N * K,
        alternatives=alternatives,
        shape=(M, K, N),
    )
