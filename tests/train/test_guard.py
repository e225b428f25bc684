"""The guard of a rank, over a store in this process."""

import json
import threading
import time

import pytest
from torch.distributed import HashStore

from nanofuse.train import guard as module
from nanofuse.train.errors import RunBroken
from nanofuse.train.guard import Guard


@pytest.fixture
def ended(monkeypatch):
    """Exit codes of processes that a guard would have ended; short times."""
    codes = []
    monkeypatch.setattr(module.os, "_exit", codes.append)
    monkeypatch.setattr(module, "PULSE_SECONDS", 0.02)
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.8)
    monkeypatch.setattr(module, "DEAF_SECONDS", 0.2)
    monkeypatch.setattr(module, "TOLD_SECONDS", 0.2)
    return codes


@pytest.fixture
def guards(ended):
    """guards(world): started, with one store."""
    made = []

    def make(world, store=None):
        store = store or HashStore()
        made.extend(Guard(store, rank, world) for rank in range(world))
        for guard in made:
            guard.start()
        return made

    yield make
    for guard in made:
        guard.stop()


def wait_for(condition, seconds=5):
    until = time.monotonic() + seconds
    while time.monotonic() < until and not condition():
        time.sleep(0.01)
    assert condition()


def test_ranks_that_live_hear_nothing(guards, ended):
    made = guards(3)
    for _ in range(20):
        for guard in made:
            guard.allow(0.8)
            guard.check()
        time.sleep(0.05)
    assert ended == []


def test_a_last_word_reaches_all_and_the_first_one_counts(guards, capfd):
    made = guards(3)
    assert made[1].claim(2, "error: of rank 1").rank == 1
    assert made[2].claim(1, "error: of rank 2").rank == 1
    wait_for(lambda: made[0].word and made[2].word)
    assert (made[0].word.line, made[0].word.code) == ("error: of rank 1", 2)
    assert made[1].word is None  # it knows
    with pytest.raises(RunBroken, match="rank 0 ends with rank 1") as stop:
        made[0].check()
    assert stop.value.code == 2


def test_the_others_wait_until_the_first_has_told(guards):
    made = guards(2)
    began = time.monotonic()
    made[0].wait_for_the_first()
    assert 0.15 < time.monotonic() - began < 1
    threading.Timer(0.1, made[1].tell).start()
    made[0].wait_for_the_first()
    assert made[0].store.check([module.TOLD])


def test_rank_0_parts_when_all_others_have_heard(guards, monkeypatch):
    monkeypatch.setattr(module, "TOLD_SECONDS", 30)
    made = guards(3)
    parted = [threading.Thread(target=guard.part) for guard in made]
    parted[0].start()
    parted[1].start()
    time.sleep(0.1)
    assert parted[0].is_alive()
    parted[2].start()
    parted[0].join(10)
    assert not parted[0].is_alive()


def test_a_rank_that_keeps_no_promise_is_named_with_its_place(guards, ended, capfd):
    made = guards(2)
    made[1].main = threading.current_thread()
    made[1].allow(0.8)
    wait_for(lambda: ended)
    assert ended[0] == 1
    err = capfd.readouterr().err
    assert err.startswith("error: rank 1 hangs since 1 s, in ") and "test_guard.py" in err
    wait_for(lambda: made[0].word)


def test_a_rank_that_waits_for_others_owes_nothing(guards, ended):
    made = guards(2)
    made[0].allow(0.8)
    with made[0].waiting():
        time.sleep(1.2)
    made[0].allow(100)
    assert ended == [] and made[1].word is None


def test_a_rank_that_waits_for_data_has_longer(guards, ended):
    made = guards(2)
    made[0].main = threading.current_thread()
    made[0].allow(0.8)
    with made[0].patient(600):
        time.sleep(1.2)
    assert ended == []
    made[0].check()
    wait_for(lambda: ended)


def test_a_deaf_rank_is_ended(guards, ended, capfd, monkeypatch):
    monkeypatch.setattr(module, "SILENT_SECONDS", 30)  # of a machine whose cores are taken
    made = guards(2)
    made[0].claim(143, "stopped")
    wait_for(lambda: ended)
    assert ended[0] == 143 and "rank 1 ends with rank 0\n" in capfd.readouterr().err


def test_a_neighbour_without_pulse_is_named_by_one(guards, ended, capfd):
    made = guards(3)
    for guard in made:
        guard.allow(0.8)
    made[1].stop()
    with made[0].waiting(), made[2].waiting():
        wait_for(lambda: made[0].word and made[2].word)
    assert made[0].word.rank == 1 and made[2].word.rank == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert lines == ["error: rank 1 gives no sign of life for 1 s"]


def test_who_promises_longer_is_waited_for_longer(guards, ended):
    made = guards(2)
    made[1].allow(0.8)
    made[1].allow(600)
    assert json.loads(made[1].store.get("pulse 1"))[1] == 600  # all know before it goes quiet
    made[0].allow(600)
    made[1].stop()
    time.sleep(1.2)
    assert made[0].word is None


class Stuck:
    """A store whose host has stopped: no answer, for ever or until `free`."""

    def __init__(self):
        self.store, self.free = HashStore(), threading.Event()
        self.free.set()

    def __getattr__(self, name):
        def call(*args):
            self.free.wait()
            return getattr(self.store, name)(*args)

        return call


def test_a_store_that_does_not_answer_ends_the_rank(guards, ended):
    store = Stuck()
    made = guards(2, store)
    store.free.clear()
    try:
        wait_for(lambda: made[1].word)
        with pytest.raises(RunBroken, match="rank 1 ends with rank 0, as rank 0's store gives no"):
            made[1].check()
        began = time.monotonic()
        assert made[1].claim(1, "mine").rank == 1
        made[1].wait_for_the_first()
        assert time.monotonic() - began < 1
    finally:
        store.free.set()
