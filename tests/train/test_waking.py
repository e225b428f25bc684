"""The context of the GPU: asked of the driver, of which there is none here."""

import ctypes
import threading

import pytest

from nanofuse.train import waking


class Driver:
    """Stands in for the driver's library; `fails` names a function that gives an error."""

    def __init__(self, fails=None):
        self.fails, self.calls = fails, []

    def _called(self, name, *args):
        self.calls.append((name, *args))
        return 100 if name == self.fails else 0

    def cuInit(self, flags):
        return self._called("cuInit", flags)

    def cuDeviceGet(self, device, index):
        device._obj.value = 40 + index
        return self._called("cuDeviceGet", index)

    def cuDevicePrimaryCtxRetain(self, context, device):
        return self._called("cuDevicePrimaryCtxRetain", device.value)


@pytest.mark.parametrize(
    ("fails", "count"),
    [(None, 3), ("cuDevicePrimaryCtxRetain", 3), ("cuDeviceGet", 2), ("cuInit", 1)],
)
def test_the_context_is_that_of_the_rank(monkeypatch, fails, count):
    driver = Driver(fails)
    monkeypatch.setattr(ctypes, "CDLL", {waking.LIBRARY: driver}.get)
    monkeypatch.setenv("LOCAL_RANK", "2")
    waking.wake_gpu()
    for thread in threading.enumerate():
        if thread.name == "waking":
            thread.join()
    asked = [("cuInit", 0), ("cuDeviceGet", 2), ("cuDevicePrimaryCtxRetain", 42)]
    assert driver.calls == asked[:count]


def test_a_machine_without_a_driver(monkeypatch):
    monkeypatch.setattr(waking, "LIBRARY", "no_such_library.so")
    waking.make_context(0)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    waking.make_context(0)
