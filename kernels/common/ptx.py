"""Single instructions that Triton has no word for, or wraps in code that is not needed here.

Relative errors: exp2 2^-22, reciprocal and square root 2^-23 (PTX ISA, https://docs.nvidia.com/
cuda/parallel-thread-execution: ex2.approx.ftz, rcp.approx.ftz, sqrt.approx.ftz). Under the
interpreter, which takes no PTX, the same is done in plain Triton, exactly.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def fast_exp2(
    x,  # fp32 block
):
    """2^x; results below 2^-126 are 0, NaN stays NaN."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def fast_reciprocal(
    x,  # fp32 block
):
    """1 / x; of a denormal it is Inf, NaN stays NaN."""
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
    """Square root; of a denormal it is 0, NaN stays NaN."""
    if INTERPRETED:
        return tl.sqrt(x)
    else:
        return tl.inline_asm_elementwise(
            "sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
