"""Seconds and joules of training steps, by windows: from one wait for the device to the next."""

import time


class StepTimes:
    """What steps have taken, without what is between them.

    Args:
        energy: train.energy.EnergyMeter.
        phases: train.clock.Phases since the start of the process.

    Attributes:
        steps: of the window that is open, 0 where none is.
        windows: that were closed.
        first_step_seconds: from the start of the process to the end of the first step, or None.
        steady_seconds, steady_steps: of the steps after the first window, which compiles.
        steady_joules: of those steps, None where the GPU's energy is not read.
    """

    def __init__(self, energy, phases):
        self.energy, self.phases = energy, phases
        self.steps = self.windows = 0
        self.first_step_seconds = None
        self.steady_seconds, self.steady_steps, self.steady_joules = 0.0, 0, None

    def open(self):
        """A window begins; the device has nothing to do."""
        self._joules, self._start = self.energy.joules(), time.perf_counter()

    def take_steps(self):
        """How many steps the window had; it has none from now on."""
        steps, self.steps = self.steps, 0
        return steps

    def seconds(self):
        """Since the window began."""
        return time.perf_counter() - self._start

    def close(self, seconds, steps):
        """A window of so many steps ended that took `seconds`; returns whether it was the first."""
        self.windows += 1
        if self.windows == 1:
            self.first_step_seconds = time.perf_counter() - self.phases.started
            self.phases.end("step")
            return True
        self.steady_seconds += seconds
        self.steady_steps += steps
        joules = self.energy.joules()
        if joules is not None:
            self.steady_joules = (self.steady_joules or 0.0) + joules - self._joules
        return False
