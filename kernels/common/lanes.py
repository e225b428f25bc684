"""Jit helpers that reduce the elements of one lane, so that a loop's accumulators stay small.

In a blocked register layout a lane that loads 16 bytes of a bf16 row holds eight adjacent elements.
Reducing those first needs no shuffle, and the accumulator of a row reduction takes an eighth of the
registers: the reduction across lanes happens once, after the loop. With fp32 elements, of which a
lane holds four, results are right too, at the price of a few shuffles.
"""

from nanofuse.kernels.common.jit import tl, triton

LANE = tl.constexpr(8)  # adjacent elements that are reduced to one


@triton.jit
def lane_sums(
    x,  # (BM, BN) fp32
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Sums of every LANE adjacent elements of a row, (BM, BN / LANE)."""
    return tl.sum(tl.reshape(x, (BM, BN // LANE, LANE)), axis=2)


@triton.jit
def lane_maxima(
    x,  # (BM, BN) int32
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Maxima of every LANE adjacent elements of a row, (BM, BN / LANE)."""
    return tl.max(tl.reshape(x, (BM, BN // LANE, LANE)), axis=2)
