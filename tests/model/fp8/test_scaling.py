"""DelayedScaling: scales from the history of amax, calibration, clipping and state."""

import pytest
import torch

from nanofuse.kernels.common.fp8 import E4M3, E5M2
from nanofuse.model.fp8.scaling import HISTORY, LARGEST_SCALE, MARGIN, DelayedScaling
from tests.train.thread_ranks import run_ranks

LIMITS = {E4M3: 448.0, E5M2: 57344.0}


@pytest.fixture
def scaling():
    return DelayedScaling({"a": E4M3, "b": E5M2}, "cpu")


def record(scaling, **peaks):
    """Kernels that see these maxima: they raise an amax, NaN above all, and never lower it."""

    def raise_to(peak):
        return lambda s: s.amax.copy_(torch.maximum(s.amax, torch.tensor(peak)))

    for name, peak in peaks.items():
        scaling.produce(name, raise_to(peak))


def seen(scaling, take=None, **peaks):
    """One optimiser step in which kernels recorded these maxima."""
    record(scaling, **peaks)
    scaling.update(take)


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
        s.amax.clamp_min_(4.0)

    scaling.calibrate(True)
    scaling.produce("a", run)
    assert runs == [1.0, 448 / (MARGIN * 4)]
    scaling.produce("a", run)  # once
    assert len(runs) == 3 and runs[2] == runs[1] and scaling.calibrating  # b is not yet
    scaling.calibrate(False)
    scaling.produce("b", run)
    assert len(runs) == 4 and not scaling.calibrating


def test_state_goes_around(scaling):
    seen(scaling, a=2.0, b=3.0)
    other = DelayedScaling({"a": E4M3, "b": E5M2}, "cpu")
    seen(other, a=50.0)
    record(other, a=70.0)  # of a step that the state does not know
    other.load_state_dict({name: x.clone() for name, x in scaling.state_dict().items()})
    assert not other.amax.any()
    for x in (scaling, other):
        seen(x, a=1.0)
    for name, x in scaling.state_dict().items():
        assert torch.equal(x, other.state_dict()[name]), name


def test_maxima_of_one_step_do_not_reach_the_next(scaling):
    seen(scaling, a=8.0, b=2.0)
    assert not scaling.amax.any()
    seen(scaling, a=1.0)
    assert scaling.history[:2].tolist() == [[1.0, 0.0], [8.0, 2.0]]


def test_a_step_left_out_leaves_nothing_behind(scaling):
    seen(scaling, a=3.0, b=3.0)
    before = [x.clone() for x in scaling.state_dict().values()]
    for peak in (5.0, float("nan"), float("inf")):
        seen(scaling, torch.zeros(1), a=peak, b=peak)
        after = scaling.state_dict().values()
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        assert not scaling.amax.any()
    seen(scaling, torch.ones(1), a=5.0, b=5.0)
    assert (scaling.history[0] == 5.0).all() and (scaling.history[1] == 3.0).all()


def test_reset_is_the_beginning(scaling):
    seen(scaling, a=3.0, b=3.0)
    record(scaling, a=4.0)
    scaling.reset()
    fresh = DelayedScaling({"a": E4M3, "b": E5M2}, "cpu")
    for name, x in fresh.state_dict().items():
        assert torch.equal(scaling.state_dict()[name], x), name
    assert not scaling.amax.any()


def test_what_is_forgotten_does_not_count(scaling):
    record(scaling, a=9.0)
    scaling.forget()
    seen(scaling, a=2.0)
    assert scaling.history[0].tolist() == [2.0, 0.0]


def test_what_goes_beyond_its_scale_is_counted(scaling):
    seen(scaling, a=1.0, b=1.0)  # within the scale of 1
    seen(scaling, a=MARGIN, b=0.5)  # exactly at the limit
    assert scaling.clipped == 0
    seen(scaling, a=2.5 * MARGIN, b=1.0)
    assert scaling.clipped == 1
    seen(scaling, a=2.5 * MARGIN, b=1.0)  # the scale has followed
    assert scaling.clipped == 1


def test_ranks_have_the_scales_of_the_largest_maximum_of_any():
    """While scales are calibrated and when they are updated; a rank alone has the same as one that
    saw everything."""
    peaks = [{"a": 2.0, "b": 8.0}, {"a": 3.0, "b": 0.5}]
    largest = {"a": 3.0, "b": 8.0}

    def found(ranks):
        scaling = DelayedScaling({"a": E4M3, "b": E5M2}, "cpu", ranks.maximum_)
        mine = peaks[ranks.rank] if ranks.world > 1 else largest
        scaling.calibrate(True)
        record(scaling, **mine)
        calibrated = [current(scaling, name) for name in "ab"]
        scaling.update()
        return calibrated, [current(scaling, name) for name in "ab"], scaling.clipped.item()

    (alone,) = run_ranks(1, found)
    assert run_ranks(2, found) == [alone, alone]
    assert alone[0][0][0] == pytest.approx(448 / (MARGIN * 3))
