"""DelayedScaling: scales from the history of amax, calibration, clipping and state."""

import pytest
import torch

from nanofuse.kernels.common.fp8 import E4M3, E5M2
from nanofuse.model.fp8.scaling import HISTORY, LARGEST_SCALE, MARGIN, DelayedScaling

LIMITS = {E4M3: 448.0, E5M2: 57344.0}


@pytest.fixture
def scaling():
    return DelayedScaling({"a": E4M3, "b": E5M2}, "cpu")


def seen(scaling, **peaks):
    """One optimiser step in which kernels recorded these amax values."""
    for name, peak in peaks.items():
        scaling.produce(name, lambda s, peak=peak: s.amax.fill_(peak))
    scaling.update()


def current(scaling, name):
    return scaling.produce(name, lambda s: (s.scale.item(), s.inverse_scale.item()))


def test_the_largest_maximum_of_the_history_counts(scaling):
    seen(scaling, a=2.0, b=1e-6)
    assert current(scaling, "a") == pytest.approx((448 / (MARGIN * 2), MARGIN * 2 / 448))
    assert current(scaling, "b")[0] == pytest.approx(57344 / (MARGIN * 1e-6))
    for _ in range(HISTORY - 1):
        seen(scaling, a=1.0)
        assert current(scaling, "a")[0] == pytest.approx(448 / (MARGIN * 2))
    seen(scaling, a=1.0)
    assert current(scaling, "a")[0] == pytest.approx(448 / MARGIN)


def test_scales_lie_where_cublas_takes_them(scaling):
    for name in "ab":
        assert scaling.produce(name, lambda s: s.inverse_scale.data_ptr()) % 16 == 0


def test_without_a_maximum_the_scale_stays(scaling):
    seen(scaling, a=2.0)
    before = current(scaling, "b")
    for _ in range(HISTORY + 1):
        seen(scaling, b=0.0)
    assert current(scaling, "b") == before == (1.0, 1.0)


@pytest.mark.parametrize("peak", [1e-36, 1e-44])
def test_tiny_maxima_keep_the_scale_finite(scaling, peak):
    seen(scaling, b=peak)
    scale, inverse = current(scaling, "b")
    assert scale == LARGEST_SCALE and inverse == 1 / LARGEST_SCALE


@pytest.mark.parametrize("peak", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(scaling, peak):
    seen(scaling, a=peak)
    scale, inverse = current(scaling, "a")
    assert not (scale > 0 and inverse < float("inf"))


def test_calibration_scales_from_the_tensor_itself(scaling):
    runs = []

    def run(s):
        runs.append(s.scale.item())
        s.amax.fill_(4.0)

    scaling.calibrate(True)
    scaling.produce("a", run)
    assert runs == [1.0, 448 / (MARGIN * 4)]
    scaling.calibrate(False)
    scaling.produce("a", run)
    assert len(runs) == 3 and runs[2] == runs[1]


def test_state_goes_around(scaling):
    seen(scaling, a=2.0, b=3.0)
    other = DelayedScaling({"a": E4M3, "b": E5M2}, "cpu")
    other.load_state_dict({name: x.clone() for name, x in scaling.state_dict().items()})
    seen(scaling, a=1.0)
    seen(other, a=1.0)
    assert torch.equal(scaling.scale, other.scale)


def test_what_goes_beyond_its_scale_is_counted(scaling):
    seen(scaling, a=1.0, b=1.0)  # within the scale of 1
    seen(scaling, a=MARGIN, b=0.5)  # exactly at the limit
    assert scaling.clipped == 0
    seen(scaling, a=2.5 * MARGIN, b=1.0)
    assert scaling.clipped == 1
    seen(scaling, a=2.5 * MARGIN, b=1.0)  # the scale has followed
    assert scaling.clipped == 1
