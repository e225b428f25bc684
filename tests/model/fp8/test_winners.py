"""Measure, choose, keep, find again: with products whose times are given."""

from dataclasses import dataclass

import pytest
import torch

from nanofuse.kernels.common.store import Store
from nanofuse.model.fp8.winners import FINALISTS, GAIN, GLANCE, Winners, agrees

PRODUCT = "64x32x16"
RIGHT = torch.arange(64.0 * 32).view(64, 32)


@dataclass(frozen=True)
class FakePlan:
    text: str


class Machine:
    """A library with plans of one letter each, of which "a" is its first choice, the other library,
    and the seconds that each takes."""

    def __init__(self, path, seconds, wrong=(), section="GPU, 1", listed="abc"):
        self.seconds, self.wrong, self.measured, self.rounds = seconds, wrong, [], []
        self.known = self.listed = listed
        self.winners = Winners(self, self.measure, Store(path, section))

    def first(self, product):
        return FakePlan("a")

    def candidates(self, product):
        return [FakePlan(text) for text in self.listed]

    def restore(self, product, text):
        return FakePlan(text) if text in tuple(self.known) else None

    def measure(self, calls, rounds=16):
        names = [self.call(call) for call in calls]
        self.measured.append(names)
        self.rounds.append(rounds)
        return [self.seconds[name] for name in names]

    def call(self, call):
        call()
        return self.last

    def run(self, plan):
        self.last = plan.text
        return RIGHT * (1.1 if plan.text in self.wrong else 1.0005)

    def other(self):
        self.last = "other"
        return RIGHT

    def tune(self):
        return self.winners.tune(PRODUCT, self.run, self.other)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "products.json"


@pytest.mark.parametrize(
    ("seconds", "best", "default"),
    [
        ({"other": 10.0, "a": 10.0, "b": 8.0, "c": 9.0}, "b", "other"),
        ({"other": 7.0, "a": 10.0, "b": 8.0, "c": 9.0}, None, "other"),
        ({"other": 9.0, "a": 7.0, "b": 8.0, "c": 6.99}, "a", "a"),  # no more than noise
        ({"other": 10.0, "a": 10.5, "b": 10.0 * GAIN, "c": 9.95}, None, "other"),
        ({"other": 10.0, "a": 9.0, "b": 8.8, "c": 8.8}, "b", "a"),
    ],
)
def test_the_fastest_is_chosen_and_never_slower_than_either_default(path, seconds, best, default):
    machine = Machine(path, seconds)
    winner = machine.tune()
    assert winner.plan == (best and FakePlan(best))
    assert winner.seconds == seconds[best or "other"] and winner.default_seconds == seconds[default]
    glance, final, *again = machine.measured
    assert sorted(glance) == ["a", "b", "c", "other"] and final[0] == default
    assert again == ([[default, best]] if (best or "other") != default else [])
    assert machine.rounds[:2] == [GLANCE, 16]


def test_the_first_choice_is_measured_where_it_is_not_listed(path):
    seconds = {"other": 10.0, "a": 7.0, "b": 8.0, "c": 9.0}
    machine = Machine(path, seconds, listed="bc")
    assert machine.tune().plan == FakePlan("a")
    assert sorted(machine.measured[0]) == ["a", "b", "c", "other"]


def test_only_the_fastest_meet_for_long(path):
    seconds = {"other": 10.0, "a": 9.9} | {text: 9.0 - ord(text) / 128 for text in "bcdefgh"}
    machine = Machine(path, seconds, listed="abcdefgh")
    assert machine.tune().plan == FakePlan("h")
    assert machine.measured[1:] == [["a", *"hgfe"[:FINALISTS]], ["a", "h"]]


def test_who_wins_by_luck_loses_the_second_time(path):
    machine = Machine(path, {"other": 10.0, "a": 10.0, "b": 8.0, "c": 9.0})
    measure = machine.winners.measure

    def lucky_twice(calls, **options):
        machine.seconds["b"] = 8.0 if len(machine.measured) < 2 else 10.5
        return measure(calls, **options)

    machine.winners.measure = lucky_twice
    winner = machine.tune()
    assert winner.plan is None and winner.seconds == winner.default_seconds == 10.0


def test_a_plan_with_another_result_is_left_out(path):
    seconds = {"other": 10.0, "a": 9.0, "b": 1.0, "c": 8.0}
    assert Machine(path, seconds, wrong="b").tune().plan == FakePlan("c")
    assert Machine(path, seconds, wrong="ab").tune().plan == FakePlan("c")
    machine = Machine(path, seconds, wrong="abc")
    assert machine.tune().plan is None and machine.measured == [["other"], ["other"]]


def test_what_is_added_to_is_compared_anew_each_time(path):
    machine = Machine(path, {"other": 10.0, "a": 9.0, "b": 8.0, "c": 1.0}, wrong="c")
    out = torch.zeros_like(RIGHT)

    def cleared(call):
        out.zero_()
        call()
        return out

    def run(plan):
        out.add_(machine.run(plan))

    winner = machine.winners.tune(PRODUCT, run, lambda: out.add_(machine.other()), cleared)
    assert winner.plan == FakePlan("b")


def test_sums_in_fp32_agree_more_closely():
    near = RIGHT * 1.01
    assert agrees(near.bfloat16(), RIGHT.bfloat16()) and not agrees(near, RIGHT)


@pytest.mark.parametrize("bad", [float("nan"), 0.0])
def test_rounding_agrees_and_nan_and_zeros_do_not(bad):
    assert agrees(RIGHT.bfloat16(), RIGHT) and not agrees(RIGHT * bad, RIGHT)
    wrong = RIGHT.clone()
    wrong[-1] = 0
    assert agrees(RIGHT * 0, RIGHT * 0) and not agrees(wrong, RIGHT)


@pytest.mark.parametrize("fastest", ["c", "other"])
def test_a_choice_is_found_again_by_the_next_process(path, fastest):
    seconds = {"other": 10.0, "a": 10.0, "b": 10.0, "c": 10.0, fastest: 8.0}
    machine = Machine(path, seconds)
    assert machine.winners.recall(PRODUCT) is None
    winner = machine.tune()
    assert machine.winners.keep({PRODUCT: winner}) is None
    again = Machine(path, {})
    assert again.winners.recall(PRODUCT) == winner and not again.measured
    assert again.winners.recall("64x32x32") is None


def test_what_is_stale_foreign_or_damaged_is_not_taken(path):
    machine = Machine(path, {"other": 10.0, "a": 9.0, "b": 8.0, "c": 7.0})
    machine.winners.keep({PRODUCT: machine.tune()})
    assert Machine(path, {}, section="GPU, 2").winners.recall(PRODUCT) is None
    assert Machine(path, {}, section="GPU of another kind, 1").winners.recall(PRODUCT) is None
    library_without = Machine(path, {})
    library_without.known = "ab"
    assert library_without.winners.recall(PRODUCT) is None
    good = {"algorithm": "c", "seconds": 7.0, "default_seconds": 10.0}
    wrong = [{"seconds": "7"}, {"seconds": None}, {"default_seconds": -1.0}, {"algorithm": "z"}]
    for entry in (None, 3, [], {}, *({**good, **each} for each in wrong)):
        Store(path, "GPU, 1").add({PRODUCT: entry})
        assert Machine(path, {}).winners.recall(PRODUCT) is None, entry
    Store(path, "GPU, 1").add({PRODUCT: good})
    assert Machine(path, {}).winners.recall(PRODUCT).plan == FakePlan("c")
