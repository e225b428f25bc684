"""The matrix products (GEMMs) behind one interface, by several providers (model/providers.py).

A linear layer y = x @ w.T takes three products, each a method of a provider:

    forward       y = x @ w.T        (M, K), (N, K) -> (M, N)
    input_grad    dx = g @ w         (M, N), (N, K) -> (M, K)
    weight_grad   dw += g.T @ x      (M, N), (M, K) -> added to (N, K) in fp32, in place

`prepare` is told the shapes once, before the first step: a provider may measure what suits them
(model/fp8/tuned.py), and returns a line about it, or None. `choices` is what it chose, in plain
data, which another process's provider takes in place of measuring.

Provider `off` takes plain bf16 or fp32 tensors. `te` (Transformer Engine's general_gemm) and
`torch` (torch._scaled_mm) take FP8Operands, which hold a matrix row-major and transposed: Hopper's
FP8 tensor cores need both operands contiguous along the reduction dimension, and that dimension
differs between the three products. As in the baseline (model/fp8/linear.py), forward and
input_grad, which reduce over features, use fast accumulation; weight_grad, which reduces over all
tokens of a micro-step, promotes its partial sums to fp32 registers (Transformer Engine's split
accumulator, use_fast_accum=False in torch).

`gradients` is the FP8 dtype of the layers' gradients, which whoever chooses a provider may set:
E5M2, or E4M3 with less range and twice the precision. Those of lm_head's product are E5M2 always.

The eager and the compiled model differentiate by autograd: `linear` of a provider that serves them
is the autograd.Function of x (M, K) and w (N, K) that its Linear layers apply, None for plain ones.
"""

from dataclasses import replace

import torch

from nanofuse.kernels.common.fp8 import E4M3, E5M2
from nanofuse.model.fp8.linear import ScaledMatmul, ScaledMatmulE4M3


class Gemm:
    """What every provider here has."""

    gradients, choices = E5M2, None

    def prepare(self, shapes, say=print, choices=None):
        """Shapes (model/fp8/shapes.py) of the products to come: nothing to choose here."""


class PlainGemm(Gemm):
    """Products of bf16 or fp32 tensors by torch; weight gradients accumulate in fp32."""

    fp8, linear = False, None

    def forward(
        self,
        x,  # (M, K)
        w,  # (N, K)
    ):
        return x @ w.t()

    def input_grad(
        self,
        g,  # (M, N)
        w,  # (N, K)
    ):
        return g @ w

    def weight_grad(
        self,
        g,  # (M, N)
        x,  # (M, K), as returned by `keep`
        out,  # (N, K) fp32, added to
    ):
        if out.dtype == g.dtype:
            out.addmm_(g.t(), x)
        else:
            torch.addmm(out, g.t(), x, out_dtype=out.dtype, out=out)

    def keep(
        self,
        x,  # (M, K)
    ):
        """The part of x that weight_grad reads, to be saved for the backward pass: all of it."""
        return x


class TorchGemm(Gemm):
    """FP8 products by torch._scaled_mm, which cannot accumulate into its output: a weight gradient
    is computed into a temporary and then added by a second kernel.
    """

    fp8 = True

    @property
    def linear(self):
        return ScaledMatmul if self.gradients == E5M2 else ScaledMatmulE4M3

    def forward(
        self,
        x,  # FP8Operand (M, K)
        w,  # FP8Operand (N, K)
    ):
        return self._product(x.data, w.data, x, w, torch.bfloat16, fast=True)

    def input_grad(
        self,
        g,  # FP8Operand (M, N)
        w,  # FP8Operand (N, K)
    ):
        return self._product(g.data, w.transposed, g, w, torch.bfloat16, fast=True)

    def weight_grad(
        self,
        g,  # FP8Operand (M, N)
        x,  # FP8Operand (M, K), as returned by `keep`
        out,  # (N, K) fp32, added to
    ):
        out += self._product(g.transposed, x.transposed, g, x, torch.float32, fast=False)

    def _product(
        self,
        a,  # FP8, row-major: one layout of operand_a
        b,  # FP8, row-major: one layout of operand_b
        operand_a,  # FP8Operand
        operand_b,  # FP8Operand
        dtype,
        fast,
    ):
        """a @ b.T in `dtype`, dequantised with the inverse scales of the two operands."""
        scales = operand_a.inverse_scale, operand_b.inverse_scale
        return torch._scaled_mm(a, b.t(), *scales, out_dtype=dtype, use_fast_accum=fast)

    def keep(
        self,
        x,  # FP8Operand (M, K)
    ):
        """The part of x that weight_grad reads, to be saved for backward: the transposed layout."""
        return replace(x, data=None)


class TransformerEngineGemm(Gemm):
    """FP8 products by Transformer Engine (https://github.com/NVIDIA/TransformerEngine); weight
    gradients accumulate in the GEMM's epilogue. Constructing one raises whatever the import raises.
    """

    fp8 = True

    def __init__(self):
        # import order: transformer_engine.pytorch loads what transformer_engine_torch links to
        from transformer_engine.pytorch.cpp_extensions import general_gemm
        from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import (
            Float8TensorStorage,
        )
        from transformer_engine_torch import DType

        self._gemm, self._storage = general_gemm, Float8TensorStorage
        self._dtypes = {E4M3: DType.kFloat8E4M3, E5M2: DType.kFloat8E5M2}

    def _wrap(self, operand):
        """An FP8Operand as Transformer Engine's tensor storage; shares its memory."""
        data, transposed = operand.data, operand.transposed
        return self._storage(
            data=None if data is None else data.view(torch.uint8),
            data_transpose=transposed.view(torch.uint8),
            fp8_scale_inv=operand.inverse_scale,
            fp8_dtype=self._dtypes[transposed.dtype],
        )

    def forward(
        self,
        x,  # FP8Operand (M, K)
        w,  # FP8Operand (N, K)
    ):
        return self._gemm(self._wrap(w), self._wrap(x), torch.bfloat16, layout="TN")[0]

    def input_grad(
        self,
        g,  # FP8Operand (M, N)
        w,  # FP8Operand (N, K)
    ):
        return self._gemm(self._wrap(w), self._wrap(g), torch.bfloat16, layout="NN", grad=True)[0]

    def weight_grad(
        self,
        g,  # FP8Operand (M, N)
        x,  # FP8Operand (M, K), as returned by `keep`
        out,  # (N, K) fp32, added to
    ):
        self._gemm(
            self._wrap(x),
            self._wrap(g),
            out.dtype,
            layout="NT",
            out=out,
            accumulate=True,
            grad=True,
            use_split_accumulator=True,
        )

    keep = TorchGemm.keep
