"""linear_relu_squared at the MLP of depth 16, against a product and the relu_squared kernel."""

from functools import partial

import torch

from bench.harness import ON_GPU, measure, op_benchmark
from kernels.fp8 import E4M3, Scaling
from kernels.linear_relu_squared import linear_relu_squared_fwd, linear_relu_squared_ref
from kernels.quantize import quantize
from kernels.relu_squared import relu_squared_fwd
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


@op_benchmark
def bench_linear_relu_squared(benchmark, device):
    x = quantize(torch.randn(M, K, device=device), Scaling.from_bound(6.0, E4M3, device))
    w = torch.randn(N, K, device=device) / K**0.5
    w = quantize(w, Scaling.from_bound(6 / K**0.5, E4M3, device))
    scaling = Scaling.from_bound(36.0, E4M3, device)

    def unfused(gemm):
        h = gemm.forward(x, w)
        return h, relu_squared_fwd(h, scaling, want_plain=False)[1]

    op = partial(linear_relu_squared_ref, x.dequantize(), w.dequantize())
    alternatives = {name: partial(unfused, gemm) for name, gemm in providers().items()}
    if ON_GPU:
        exact_h, exact = op()
        op = partial(linear_relu_squared_fwd, x, w, scaling)
        for run in (op, *alternatives.values()):
            h, operand = run()
            assert relative_error(h, exact_h) < 5e-3
            assert relative_error(operand.dequantize(), exact) < 0.04  # e4m3 rounds to 2^-4
        del exact_h, exact
    measure(
        benchmark,
        op,
        bytes_moved=(M + N) * K + 4 * M * N,  # operands; h in bf16; the activation in two layouts
        flops=2 * M * N * K,
        alternatives=alternatives,
        shape=(M, K, N),
    )
