"""The order of what travels between ranks and of what computes: one after the other, or beside it.

Gradients become final piece by piece in a backward pass, which leaves a mark behind each; a forward
pass needs operands one after the other. `InOrder` takes no notice of either. `Beside` has a stream
of its own for transfers: behind a mark gradients leave while the pass goes on, and a product waits
for its own operand alone. Marks and waits are recorded into CUDA graphs with the kernels around
them, and count anew with each replay.
"""

import contextlib

import torch


class InOrder:
    """Everything follows what was launched before it."""

    hides = False

    def mark(self, number):
        """The piece of this number, counted from 0 in the order of the backward pass, is through:
        called by the pass. Others may mark what was launched so far by a name."""

    def behind(self, number=None):
        """A context for transfers behind the latest mark of a number or name; None: behind all that
        was launched."""
        return contextlib.nullcontext()

    def arrive(self, name):
        """What has this name is there: called within `behind`, after its transfer."""

    def wait(self, name):
        """Have what follows come after the arrival of what has this name."""


class Beside(InOrder):
    """Transfers on a stream of their own.

    Args:
        device: a GPU.
    """

    hides = True

    def __init__(self, device):
        self.stream = torch.cuda.Stream(device)
        self.marks, self.arrivals = {}, {}

    @staticmethod
    def _record(events, key):
        if key not in events:
            events[key] = torch.cuda.Event(external=True)  # within a graph it is seen outside
        events[key].record()

    def mark(self, number):
        self._record(self.marks, number)

    @contextlib.contextmanager
    def behind(self, number=None):
        if number is None:
            self.stream.wait_stream(torch.cuda.current_stream())
        else:
            self.stream.wait_event(self.marks[number])
        with torch.cuda.stream(self.stream):
            yield

    def arrive(self, name):
        self._record(self.arrivals, name)

    def wait(self, name):
        if name in self.arrivals:
            self.arrivals[name].wait()


IN_ORDER = InOrder()
