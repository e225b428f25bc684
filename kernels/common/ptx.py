"""Approximate special-function instructions as inline PTX: ex2, rcp, sqrt and tanh in fp32.

Triton has no function for them, or adds code for denormals and exact rounding that is not needed
here. Relative errors (ex2.approx.ftz 2^-22, rcp.approx.ftz and sqrt.approx.ftz 2^-23, tanh.approx
2^-11) are those of the PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution. The
interpreter takes no PTX: under it the same functions are plain Triton, accurate to fp32.
"""

import os

from nanofuse.kernels.common.jit import tl, triton

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
EXP2 = tl.constexpr("ex2.approx.ftz.f32 $0, $1;")
TANH = tl.constexpr("tanh.approx.f32 $0, $1;")
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def fast_exp2(
    x,  # fp32 block
):
    """2^x; results below 2^-126 are 0, NaN stays NaN."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(EXP2, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def fast_reciprocal(
    x,  # fp32 block
):
    """1 / x; a denormal gives Inf, NaN stays NaN."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def fast_sqrt(
    x,  # fp32 block
):
    """Square root; a denormal gives 0, NaN stays NaN."""
    if INTERPRETED:
        return tl.sqrt(x)
    else:
        return tl.inline_asm_elementwise(
            "sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def fast_tanh(
    x,  # fp32 block
):
    """tanh(x), to 11 bits: a quarter of the error of an x rounded to bf16; NaN stays NaN."""
    if INTERPRETED:
        return 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268))
    else:
        return tl.inline_asm_elementwise(TANH, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
