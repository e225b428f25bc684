"""Figures of steps that several ranks take together."""

from types import SimpleNamespace

import pytest

from nanofuse.bench import bench_scaling as module
from nanofuse.bench import training
from nanofuse.bench.scaling import (
    differences,
    scaling_table,
    scheme_figures,
    skew,
    step_seconds,
    take_turns,
)
from nanofuse.bench.scaling_worker import Worker


def ranks(*seconds):
    """A step: of each rank the seconds by itself, and those in which it waits."""
    return [
        {"forward": own, "optimizer": 0.5, "gradients": gradients, "values": values}
        for own, gradients, values in seconds
    ]


def test_exposed_is_what_the_last_rank_waits():
    """The first rank to come waits for the other one, too."""
    steps = [ranks((1.0, 0.4, 0.1), (1.25, 0.15, 0.1))] * 3
    told = [{"peak_gib": 1.0, "losses": [4.0]}, {"peak_gib": 2.0, "losses": [4.5]}]
    found = scheme_figures(steps, told, [3.0, 5.0])
    assert found["ms_per_step"] == pytest.approx(2000)
    assert found["exposed_ms"] == pytest.approx(250)
    assert found["exposed_mean_ms"] == pytest.approx(375)
    assert (found["gradients_ms"], found["values_ms"]) == pytest.approx((150, 100))
    assert found["skew"] == pytest.approx(1.75 / 1.625)
    assert (found["speedup_slowest"], found["speedup_mean"]) == pytest.approx((2.5, 2.0))


def test_a_step_ends_with_its_slowest_rank():
    assert step_seconds(ranks((1, 0, 0), (3, 0.5, 0), (2, 0, 0))) == 4.0
    assert skew([1.0, 2.0, 3.0]) == 1.5


def test_a_phase_within_another_is_taken_out_of_it(monkeypatch):
    now = iter([0, 1, 11, 111, 1111, 11111])
    monkeypatch.setattr(training, "ON_GPU", False)
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(now))
    clock = training.PhaseClock()
    with clock("optimizer"), clock("values"), clock("gradients"):
        pass
    assert clock.seconds() == {"optimizer": 1 + 10000, "values": 10 + 1000, "gradients": 100}


def test_the_table_has_a_row_for_each_scheme():
    steps, told = [ranks((1.0, 0.2, 0.1), (1.0, 0.2, 0.1))], [{"peak_gib": None, "losses": []}] * 2
    figures = scheme_figures(steps, told, [3.0, 3.0])
    info = {
        "depth": 4,
        "world": 2,
        "alone_ms": [3000.0, 3000.0],
        "alone_peak_gib": [None, 5.25],
        "nbytes": 1234e6,
        "library_ms": {"gradients": 1.0, "values": 2.0},
        "schemes": {"owned": figures},
        "against": {"nanochat": (-0.01, (-0.02, 0.005))},
        "left_out": ["nanochat is left out: no room"],
    }
    lines = list(scaling_table([info]))
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert lines[2].endswith("| 1.0000 | 5.2 |") and "| 3,000.0 |" in lines[2]
    assert "| owned | 1,800.0 | 1.667 | 1.667 | 300.00 | 200.00 | 100.00 |" in lines[3]
    assert lines[4:] == [
        "d4 on 2: alone 3,000.0, 3,000.0 ms",
        "d4 on 2: 1,234 MB, library's reduce-scatter 1.00, all-gather 2.00 ms",
        "d4 on 2: owned against nanochat -1.00% (-2.00% to +0.50%)",
        "d4 on 2: nanochat is left out: no room",
    ]


def test_differences_are_those_of_a_round():
    """A round in which both are slow changes none."""
    seconds = {"owned": (0.9, 1.9, 0.9), "nanochat": (1.0, 2.0, 1.0), "all-reduce": (0.9, 1.9, 0.9)}
    steps = {name: [ranks((x - 0.5, 0, 0)) for x in each] for name, each in seconds.items()}
    found = differences(steps, list(seconds))
    assert found["nanochat"][0] == pytest.approx(-0.1)
    assert found["nanochat"][1] == pytest.approx((-0.1, -0.05))
    assert found["all-reduce"] == (0, (0, 0))
    assert differences(steps, []) == {}


def test_ranks_with_different_weights_are_refused():
    class Told:
        def collect(self, thing):
            return [thing, thing + 1e-12]

    class Made:
        class crew:
            world = 2

        def checksum(self):
            return 1.0

    worker = Worker(None, Told(), None)
    worker.contenders = {"owned": Made()}
    with pytest.raises(AssertionError, match="owned: the ranks' weights differ"):
        worker.check()


class FakeCrew:
    """Two ranks that take no time; `no_room` says what cannot be built beside what."""

    def __init__(self, no_room):
        self.no_room, self.built, self.asked = no_room, [], []

    def __call__(self, world, task):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def ask(self, command, *names):
        self.asked.append((command, *names))
        if command == "library":
            return [({"gradients": 1.0, "values": 1.0}, 8)] * 2
        if command == "drop":
            self.built.clear()
        if command == "build":
            if any((names[0], there) in self.no_room for there in self.built):
                return [{}] * 2
            self.built.extend(names)
            return [{"losses": [4.0], "facts": [], "peak_gib": 1.0}] * 2
        if command == "step":
            assert names[0] in self.built
            return ranks((1.0, 0.2, 0.1), (1.0, 0.2, 0.1))
        return [None] * 2


@pytest.mark.parametrize("no_room", [(), (("nanochat", "owned"),)])
def test_schemes_take_turns_and_then_each_is_alone(monkeypatch, no_room):
    crew = FakeCrew(no_room)
    monkeypatch.setattr(module, "Crew", crew)
    monkeypatch.setattr(module, "CPU_ROUNDS", 3)
    monkeypatch.setattr(module, "ON_GPU", False)
    monkeypatch.setattr(module, "WARMUP_ROUNDS", 2)
    monkeypatch.setattr(module.CLOCK, "now", 0.0)
    passed = []

    def pedantic(function, rounds):
        for _ in range(rounds):
            function()
            passed.append(module.CLOCK.now)

    benchmark = SimpleNamespace(disabled=False, extra_info={}, pedantic=pedantic)
    options = {"--schemes": "owned,nanochat"}
    config = SimpleNamespace(getoption=lambda name: options.get(name, 1))
    module.bench_scaling(benchmark, SimpleNamespace(config=config), 3, 1, "off", 2)
    turns = ["owned"] if no_room else ["owned", "nanochat"]
    steps = [each[1] for each in crew.asked if each[0] == "step"]
    assert steps == 2 * (turns + turns[::-1]) + turns + 5 * ["alone"]
    assert crew.asked.index(("drop",)) < crew.asked.index(("build", "alone"))
    assert passed == pytest.approx([1.8, 3.6, 5.4])
    found = benchmark.extra_info
    assert found["left_out"] == (["nanochat is left out: no room"] if no_room else [])
    assert found["alone_ms"] == [1500.0, 1500.0] and list(found["schemes"]) == turns


def test_the_first_rounds_are_left_out():
    crew = FakeCrew(())
    crew.built, numbers = ["a", "b"], iter(range(10))
    crew.ask = lambda command, name: (name, next(numbers))
    found = take_turns(crew, ["a", "b"], rounds=2, warmup=3)
    assert found == {"a": [("a", 7), ("a", 8)], "b": [("b", 6), ("b", 9)]}
