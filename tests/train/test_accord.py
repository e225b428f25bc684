"""What ranks decide as one, told by made-up words of the others."""

from types import SimpleNamespace

import pytest

from nanofuse.train import accord
from nanofuse.train.accord import Accord
from nanofuse.train.errors import PeerFailed, RunBroken, UserError
from nanofuse.train.guard import START_SECONDS, NoGuard
from nanofuse.train.ranks import Alone
from nanofuse.train.signals import Interrupted

NO_SIGNAL = SimpleNamespace(number=None)


class Guard(NoGuard):
    def __init__(self):
        self.allowed = []

    def allow(self, seconds):
        self.allowed.append(seconds)


class Second(Alone):
    """Rank 1 of 3; `others` are the largest words of the other two."""

    rank, world, main = 1, 3, False

    def __init__(self, *others):
        self.others, self.said, self.guard = others, [], Guard()

    def agree(self, *numbers):
        self.said.append(numbers)
        return tuple(map(max, numbers, self.others))


def test_where_nothing_happened_all_go_on():
    ranks = Second(0, 0, 0)
    word = Accord(ranks, NO_SIGNAL)
    assert word.together(lambda a, b: a + b, 2, 3) == 5
    word.check_stop()
    assert (ranks.said, word.stop, word.speaker) == ([(0, 0, 0)], 0, None)


def test_an_error_of_this_rank_ends_it_with_its_own_words():
    ranks = Second(0, 0, 0)
    word = Accord(ranks, NO_SIGNAL)
    with pytest.raises(UserError, match="no shard"):
        word.together(lambda: (_ for _ in ()).throw(UserError("no shard")))
    assert ranks.said == [(0, 2, 2)] and word.speaker == 1


def test_an_error_of_another_rank_ends_this_one_and_names_the_first():
    word = Accord(Second(0, 1, 3), NO_SIGNAL)  # rank 0's, which outranks rank 2's
    with pytest.raises(PeerFailed, match="rank 1 ends with rank 0"):
        word.together(int)
    assert word.speaker == 0


def test_a_signal_is_noted_and_ends_what_may_be_ended():
    word = Accord(Second(15, 0, 0), NO_SIGNAL)
    word.decide()
    assert word.stop == 15
    with pytest.raises(Interrupted) as stop:
        word.decide_now()
    assert stop.value.number == 15 and word.speaker == 0


def test_a_broken_run_decides_nothing():
    ranks = Second(0, 0, 0)
    with pytest.raises(RunBroken):
        Accord(ranks, NO_SIGNAL).decide(RunBroken("rank 2 is gone", 1))
    assert not ranks.said


def test_what_rank_0_does_alone_is_decided_by_all():
    ranks, done = Second(0, 0, 0), []
    Accord(ranks, NO_SIGNAL).by_main(done.append, 1)
    assert not done and len(ranks.said) == 1
    Accord(Alone(), NO_SIGNAL).by_main(done.append, 2)
    assert done == [2]


def test_steps_are_promised_by_the_slowest_so_far():
    ranks = Second(0, 0, 0)
    word = Accord(ranks, NO_SIGNAL)
    word.allow(1)
    word.note_step(50.0, anew=True)
    word.note_step(10.0, anew=True)  # the one before compiled
    word.note_step(7.0, anew=False)
    word.allow(1)
    word.allow(3)
    word.note_step(0.1, anew=True)
    word.allow(1)
    assert ranks.guard.allowed == [
        accord.PATIENCE * START_SECONDS,
        accord.PATIENCE * 10,
        accord.PATIENCE * 30,
        accord.LEAST_SECONDS,
    ]
