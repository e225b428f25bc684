"""How long a rank works on its own part of a step, and how long it waits for the others."""

import time

import torch


class Pace:
    """A stop watch: of the GPU's time by events, which wait for nothing, of the CPU's by its clock.
    A context manager.

    Args:
        device: that works; what counts is the stream that is current now, and no other.
    """

    def __init__(self, device):
        self.cuda = device.type == "cuda"
        self.stream = torch.cuda.current_stream(device) if self.cuda else None
        self.laps = []  # (start, end)

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.stream)
        return event

    def __enter__(self):
        self.laps.append([self._now()])

    def __exit__(self, *error):
        self.laps[-1].append(self._now())

    def take(self):
        """Seconds of all laps since the last call; the device has finished them."""
        laps, self.laps = self.laps, []
        if self.cuda:
            return sum(start.elapsed_time(end) for start, end in laps) * 1e-3
        return sum(end - start for start, end in laps)
