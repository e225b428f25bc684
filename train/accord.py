"""What ranks that train together decide as one: whether something failed on one of them, whether a
signal came, and how long the others wait for one that is not heard of."""

import contextlib
import time

from nanofuse.train.command import exit_code
from nanofuse.train.errors import PeerFailed, RunBroken
from nanofuse.train.guard import START_SECONDS
from nanofuse.train.signals import Interrupted

LEAST_SECONDS = 15  # that a step may take before a rank counts as hung
DATA_SECONDS = 600  # that a batch may take besides, such as from a slow disk
PATIENCE = 4  # times the slowest step so far, where that is longer


class Accord:
    """The word that this rank has with the others of a run; a run of one process has it alone.

    Args:
        ranks: train.ranks.Ranks, or Alone.
        signals: train.signals.Signals of this process.

    Attributes:
        stop: number of the signal on which all ranks end, 0 until one came.
        speaker: the rank that says why all end, None until all have agreed to.
        slowest: seconds of the slowest step.
    """

    def __init__(self, ranks, signals):
        self.ranks, self.signals = ranks, signals
        self.stop, self.speaker = 0, None
        self.slowest = START_SECONDS
        self.took = {}  # {kind of report: seconds of the slowest}

    def decide(self, failure=None):
        """One decision of all ranks: whether a signal has come, which `stop` notes, and whether one
        has failed.

        Args:
            failure: what went wrong on this rank, or None.

        Raises:
            PeerFailed: something went wrong on another rank, and nothing here.
            BaseException: failure.
        """
        if isinstance(failure, RunBroken):  # there is nobody to decide with
            raise failure
        rank, world = self.ranks.rank, self.ranks.world
        own = failure is not None and not isinstance(failure, PeerFailed)
        codes = self.signals.number or 0, exit_code(failure), (world - rank) * own
        number, code, first = self.ranks.agree(*codes)
        self.stop = self.stop or number
        if first:
            self.speaker = world - first
        if not code:
            return
        raise failure or PeerFailed(f"rank {rank} ends with rank {self.speaker}", code)

    def decide_now(self, failure=None):
        """As decide; a signal ends what is going on.

        Raises:
            Interrupted: a signal came, on any rank.
        """
        self.decide(failure)
        self.check_stop()

    def check_stop(self):
        """Raise Interrupted if all ranks are to end."""
        if self.stop:
            self.speaker = 0
            raise Interrupted(self.stop)

    def together(self, action, *args):
        """action(*args), on all ranks or on none: where it raises on one, all raise, as decide
        does."""
        failure = result = None
        try:
            result = action(*args)
        except BaseException as error:  # panics of native libraries are no Exception
            failure = error
        self.decide(failure)
        return result

    def by_main(self, action, *args):
        """action(*args) on rank 0, under `together`."""
        self.together(action if self.ranks.main else lambda *_: None, *args)

    def allow(self, steps):
        """Promise the other ranks to be heard of within the time of so many steps."""
        self.ranks.guard.allow(max(LEAST_SECONDS, PATIENCE * self.slowest * steps))

    def note_step(self, seconds, anew):
        """A step took so long; where `anew`, the ones before it say nothing of those to come."""
        self.slowest = seconds if anew else max(self.slowest, seconds)

    def patient(self):
        """A context in which this rank may wait for a batch."""
        return self.ranks.guard.patient(DATA_SECONDS)

    @contextlib.contextmanager
    def promised(self, kind):
        """Promise the other ranks to be heard of within the time that a report takes, and a batch:
        any time for the first of its kind, which may compile, and where files are written."""
        took = self.took.get(kind)
        known = took is not None and kind != "save"
        self.ranks.guard.allow(max(LEAST_SECONDS, PATIENCE * took) if known else START_SECONDS)
        began = time.perf_counter()
        with self.patient():
            yield
        self.took[kind] = max(took or 0.0, time.perf_counter() - began)
