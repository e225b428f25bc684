"""Jit helpers that reduce what one thread holds, so that accumulators in a loop stay small.

A thread that loads 16 bytes of a 16-bit row holds eight neighbours of it: reducing them costs no
exchange between threads, and an accumulator of a block takes an eighth of the registers. With wider
elements the same code is right too, at the price of a few shuffles.
"""

import triton
import triton.language as tl

LANE = tl.constexpr(8)  # neighbours reduced to one


@triton.jit
def lane_sums(
    x,  # (BM, BN) fp32
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Sums of LANE neighbours of a row, (BM, BN / LANE)."""
    return tl.sum(tl.reshape(x, (BM, BN // LANE, LANE)), axis=2)


@triton.jit
def lane_maxima(
    x,  # (BM, BN) int32
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Maxima of LANE neighbours of a row, (BM, BN / LANE)."""
    return tl.max(tl.reshape(x, (BM, BN // LANE, LANE)), axis=2)
