"""bench.roofline: the floor table of the design at d16, and how it scales."""

import pytest

from nanofuse.bench.roofline import attention_ms, floor_ms, floor_parts
from nanofuse.model.config import GPTConfig

D16 = GPTConfig.from_depth(16)


def test_d16_is_the_floor_table():
    """130 ms, and 8 fewer with squared ReLU and its backward in the products' epilogues."""
    parts = floor_parts(D16, 32)
    assert parts == pytest.approx(
        {"products": 69, "attention": 23, "elementwise": 33 - 8, "loss": 3}, rel=0.03
    )
    plain = floor_parts(D16, 32, fp8=False)["elementwise"]
    # reads the activation once more, at twice the bytes
    assert plain == pytest.approx(parts["elementwise"] * 51 / 49)
    assert floor_ms(D16, 32) == pytest.approx(130 - 8, rel=0.02)


def test_attention_at_the_measured_windows():
    measured = {512: 1.256, 768: 1.524, 2048: 2.045}  # 768 is interpolated
    assert {w: attention_ms(D16, 32, w) for w in measured} == pytest.approx(measured, rel=0.02)


def test_the_floor_grows_with_rows_and_without_fp8():
    assert floor_ms(D16, 16) == pytest.approx(floor_ms(D16, 32) / 2)
    parts = floor_parts(D16, 32), floor_parts(D16, 32, fp8=False)
    assert parts[1]["products"] == pytest.approx(134, rel=0.01)
    assert parts[1]["attention"] == parts[0]["attention"]
