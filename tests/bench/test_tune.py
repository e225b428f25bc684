"""bench.tune without its GPU: its widths, and how entries come together."""

import pytest

from nanofuse.bench.tune import merged, parse_widths
from nanofuse.train.errors import UserError


def entry(width, us, cols=1):
    return {"width": width, "us": us, "cols": cols}


def test_widths():
    assert parse_widths("512,256,512") == [256, 512]
    for text in ("0", "200", "256,", "x", "9" * 5000):
        with pytest.raises(UserError, match="--widths"):
            parse_widths(text)


def test_other_widths_stay():
    old = [entry(256, 1.0), entry(1024, 2.0)]
    assert merged(old, [entry(1024, 3.0), entry(512, 4.0)]) == [
        entry(256, 1.0), entry(512, 4.0), entry(1024, 3.0)
    ]  # fmt: skip
    assert merged([entry(1024, 2.0)], [entry(1024, 1.0, None)]) == [entry(1024, 1.0, None)]
