"""Signals that end a run: the step is finished and saved first; a second one ends it at once.

What follows within SAME_SECONDS is the same request: a terminal that closes sends SIGHUP twice, and
who ends all processes of a service reaches a rank by itself and by its parent.
"""

import os
import signal
import threading
import time

# a user's, a terminal's, those that batch systems send before a limit, that of a power cut
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGPWR")
SAME_SECONDS = 0.5


class Interrupted(BaseException):
    """A signal asked the run to end; `number` is the signal's."""

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """Context manager that catches the signals of NAMES (one that was ignored stays so).

    Before `defer` the first signal raises Interrupted wherever the main thread is. After it the
    signal is only noted, and `check` raises. A second signal, unless it follows at once, ends the
    process, with the exit code that a shell gives it.
    """

    def __init__(self):
        self.number, self.deferred, self.since = None, False, 0.0
        self.previous = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name, None) for name in NAMES):
                if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                    self.previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def _handle(self, number, frame):
        if self.number is not None:
            if time.monotonic() - self.since > SAME_SECONDS:
                os._exit(128 + number)
            return
        self.number, self.since = number, time.monotonic()
        if not self.deferred:
            raise Interrupted(number)

    def defer(self):
        """From now on note signals; `check` raises."""
        self.deferred = True

    def check(self):
        """Raise Interrupted if a signal has come."""
        if self.number is not None:
            raise Interrupted(self.number)
