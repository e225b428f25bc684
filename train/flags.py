"""Types of a command's flags whose values have bounds: a value outside of them is one line."""

import math
from argparse import ArgumentTypeError
from collections.abc import Callable

SEEDS = 0, 2**63 - 1  # what torch's generators take


def _within(value: float, least: float, most: float) -> None:
    if value < least:
        raise ArgumentTypeError(f"must be at least {least:,}, got {value}")
    if value > most:
        raise ArgumentTypeError(f"must be at most {most:,}, got {value}")


def whole(least: float = -math.inf, most: float = math.inf) -> Callable[[str], int]:
    """A flag's type: a whole number within bounds, inclusive."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ArgumentTypeError(f"must be a whole number, got {text!r:.50}") from None
        _within(value, least, most)
        return value

    return parse


def number(least: float = -math.inf, most: float = math.inf) -> Callable[[str], float]:
    """A flag's type: a finite number within bounds, inclusive."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ArgumentTypeError(f"must be a number, got {text!r:.50}") from None
        if not math.isfinite(value):
            raise ArgumentTypeError(f"must be a finite number, got {value}")
        _within(value, least, most)
        return value

    return parse


STEP = whole(0, 10**12)  # of a checkpoint
