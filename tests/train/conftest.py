"""Runs in the tests' process, which holds many more objects than a run's own."""

import pytest


@pytest.fixture(autouse=True)
def no_garbage(monkeypatch):
    """A run collects garbage twice, and here that goes over the objects of all tests: half of the
    time of a tiny run. The processes of tests that start some collect it."""
    monkeypatch.setattr("nanofuse.train.loop.settle_garbage", lambda: None)
