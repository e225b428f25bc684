"""How long this process has been running, and with what."""

import os
import time
from pathlib import Path

from nanofuse.train.command import LOADED

LONGEST_LOADING = 60  # seconds from the start of a process to the load of its first module


def process_seconds():
    """Seconds since this process started, imports included: between 0 and a minute more than since
    its first module was loaded, where the system's clocks do not fit together since then."""
    loaded = time.perf_counter() - LOADED
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # field 22: start, in ticks
        seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, ValueError, IndexError, AttributeError):
        return loaded
    return seconds if loaded <= seconds <= loaded + LONGEST_LOADING else loaded


class Phases(dict):
    """{phase: seconds}: what the time since `started`, a time.perf_counter(), went to."""

    def __init__(self, started):
        super().__init__()
        self.started = self._last = started

    def end(self, name):
        """What ran since the end before this one was `name`."""
        now = time.perf_counter()
        self[name] = self.get(name, 0.0) + now - self._last
        self._last = now

    def __str__(self):
        return ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.items())
