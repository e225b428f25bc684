"""Student's t distribution, as far as a paired comparison needs it."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


def within(t: float, freedom: int) -> float:
    """P(|T| < |t|) of Student's T with so many degrees of freedom, a whole number.

    The finite sums are those of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan(abs(t) / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(1 + odd, freedom, 2):  # the k-th power of the cosine less `odd`
        total += term
        term *= cosine * cosine * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def quantile(share: float, freedom: int) -> float:
    """t with P(|T| < t) = share, 0 <= share < 1."""
    low, high = 0.0, 1.0
    while within(high, freedom) < share:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if within(middle, freedom) < share else (low, middle)
    return high


@dataclass(frozen=True)
class Paired:
    """Of differences within pairs: their number, mean, half the width of the mean's confidence
    interval, and the p-value of a mean of 0; the last two are None of a single pair."""

    pairs: int
    mean: float
    margin: float | None
    p: float | None


def paired(differences: Sequence[float], share: float = 0.95) -> Paired:
    """Student's t test of differences within pairs, two-sided.

    Args:
        differences: one at least.
        share: of the interval.
    """
    count, mean = len(differences), statistics.mean(differences)
    if count == 1:
        return Paired(1, mean, None, None)
    error = statistics.stdev(differences) / math.sqrt(count)
    margin = quantile(share, count - 1) * error
    if error == 0:
        return Paired(count, mean, margin, 0.0 if mean else 1.0)
    return Paired(count, mean, margin, 1 - within(mean / error, count - 1))
