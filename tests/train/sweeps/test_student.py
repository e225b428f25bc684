"""Student's t against tables, and the paired test against a case worked by hand."""

import math

import pytest

from nanofuse.train.sweeps.student import paired, quantile, within

# two-sided 95 % and 99 % points, as printed in every table of t
TABLE = {1: (12.7062, 63.6567), 2: (4.30265, 9.92484), 3: (3.18245, 5.84091),
         4: (2.77645, 4.60409), 5: (2.57058, 4.03214), 9: (2.26216, 3.24984),
         30: (2.04227, 2.75000), 100: (1.98397, 2.62589)}  # fmt: skip


@pytest.mark.parametrize("freedom", TABLE)
def test_quantiles_are_those_of_the_tables(freedom):
    for share, t in zip((0.95, 0.99), TABLE[freedom], strict=True):
        assert quantile(share, freedom) == pytest.approx(t, rel=3e-6)
        assert within(quantile(share, freedom), freedom) == pytest.approx(share, abs=1e-12)


def test_many_degrees_of_freedom_come_to_the_normal_distribution():
    assert within(1.959964, 100_001) == pytest.approx(0.95, abs=1e-5)
    assert within(0, 7) == 0


def test_a_paired_test_worked_by_hand():
    """Differences 1, 2, 3, 4, 5: mean 3, sd sqrt(2.5), t = 3 / sqrt(0.5) with 4 degrees of freedom,
    for which P(|T| < t) = sin(a) (1 + cos(a)^2 / 2) with tan(a) = t / 2, so sin(a)^2 = 9 / 11."""
    found = paired([1, 2, 3, 4, 5])
    assert (found.pairs, found.mean) == (5, 3)
    assert found.margin == pytest.approx(2.776445 * math.sqrt(0.5), rel=1e-6)
    assert found.p == pytest.approx(1 - math.sqrt(9 / 11) * (1 + 1 / 11), rel=1e-9)


def test_one_pair_has_no_interval_and_equal_ones_an_empty_one():
    assert paired([0.5]) == paired([0.5], 0.99)
    assert paired([0.5]).margin is None and paired([0.5]).p is None
    assert (paired([0.25, 0.25]).margin, paired([0.25, 0.25]).p) == (0, 0)
    assert paired([0.0, 0.0]).p == 1
