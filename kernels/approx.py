"""Single-instruction exponential and reciprocal: what Triton's own compile to, without the code
around them for denormal inputs and results, which the callers do not have or flush to zero.

Relative errors: exp2 2^-22, reciprocal 2^-23 (PTX ISA, ex2.approx.ftz and rcp.approx.ftz). Under
the interpreter, which takes no PTX, both are exact.
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
