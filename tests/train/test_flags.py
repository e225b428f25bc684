"""Types of flags: what they take, at their bounds, and one line for what they do not."""

from argparse import ArgumentTypeError

import pytest

from nanofuse.train.flags import SEEDS, STEP, number, whole


@pytest.mark.parametrize(("kind", "type_"), [(whole, int), (number, float)])
def test_bounds_are_inclusive(kind, type_):
    parse = kind(-2, 3000)
    for text in ("-2", "3000", "0"):
        assert parse(text) == type_(text) and type(parse(text)) is type_
    for text, words in (("-3", "at least -2, got -3"), ("3001", "at most 3,000, got 3001")):
        with pytest.raises(ArgumentTypeError, match=f"^must be {words}"):
            parse(text)
    assert kind()("-999") == -999


def test_what_is_no_number_is_shown():
    for kind, text, words in (
        (whole, "1.5", "a whole number, got '1.5'"),
        (whole, "x" * 99, "a whole number, got '" + "x" * 49),
        (number, "many", "a number, got 'many'"),
        (number, "nan", "a finite number, got nan"),
        (number, "-inf", "a finite number, got -inf"),
    ):
        with pytest.raises(ArgumentTypeError, match=f"^must be {words}$"):
            kind()(text)


def test_seeds_and_steps():
    assert SEEDS == (0, 9_223_372_036_854_775_807)
    assert (STEP("0"), STEP("1000000000000")) == (0, 10**12)
    for text in ("-1", "1000000000001"):
        with pytest.raises(ArgumentTypeError):
            STEP(text)
