import math

import torch

from kernels.rms_norm import rms_norm_ref
from kernels.rotary_qk_norm import rotary_qk_norm_ref, rotary_ref, rotary_table, value_gate_ref


def test_table_holds_the_angles():
    cos, sin = rotary_table(100, 16, 100_000)
    for t, pair in ((0, 0), (1, 0), (99, 3), (57, 7)):
        angle = t * 100_000 ** (-2 * pair / 16)
        assert math.isclose(cos[t, pair], math.cos(angle), abs_tol=1e-5)
        assert math.isclose(sin[t, pair], math.sin(angle), abs_tol=1e-5)
    assert torch.equal(cos[:, 8:], cos[:, :8]) and torch.equal(sin[:, 8:], -sin[:, :8])


def test_rotation_in_the_halves_layout():
    x = torch.randn(1, 5, 2, 8, dtype=torch.float64)
    cos, sin = (table.double() for table in rotary_table(5, 8, 100_000))
    y = rotary_ref(x, cos, sin)
    for t in range(5):
        for pair in range(4):
            x1, x2 = x[0, t, 1, pair], x[0, t, 1, pair + 4]
            torch.testing.assert_close(y[0, t, 1, pair], x1 * cos[t, pair] + x2 * sin[t, pair])
            torch.testing.assert_close(y[0, t, 1, pair + 4], x2 * cos[t, pair] - x1 * sin[t, pair])


def test_scores_depend_on_distance_only():
    cos, sin = (table.double() for table in rotary_table(40, 8, 100_000))
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    rows = torch.stack([q, k]).expand(40, 2, 8)[None]  # (1, 40, 2, 8)
    y = rotary_ref(rows, cos, sin)[0]
    torch.testing.assert_close(y[30, 0] @ y[25, 1], y[12, 0] @ y[7, 1])


def test_norm_and_gain_per_head():
    q, k = torch.randn(2, 6, 4, 16), torch.randn(2, 6, 1, 16)
    cos, sin = rotary_table(6, 16, 100_000)
    for y in rotary_qk_norm_ref(q, k, cos, sin):
        rms = y.square().mean(dim=-1).sqrt()
        torch.testing.assert_close(rms, torch.full_like(rms, 1.2), rtol=1e-4, atol=0)


def test_norm_before_rotation_is_norm_after_it():
    q = torch.randn(2, 6, 4, 16, dtype=torch.float64)
    cos, sin = (table.double() for table in rotary_table(6, 16, 100_000))
    after = 1.2 * rms_norm_ref(rotary_ref(q, cos, sin))
    torch.testing.assert_close(rotary_qk_norm_ref(q, q, cos, sin)[0], after, rtol=0, atol=1e-6)


def test_dtype_is_kept_with_wider_tables():
    q = torch.randn(1, 3, 2, 8, dtype=torch.bfloat16)
    cos, sin = rotary_table(3, 8, 100_000)
    assert [y.dtype for y in rotary_qk_norm_ref(q, q, cos, sin)] == [torch.bfloat16] * 2


def test_value_gate():
    v, ve = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 4)
    gate = torch.randn(2, 3, 2)
    got = value_gate_ref(v, gate, ve)
    for b, t, h in ((0, 0, 0), (1, 2, 1)):
        scale = 3 / (1 + math.exp(-gate[b, t, h].item()))
        torch.testing.assert_close(got[b, t, h], v[b, t, h] + scale * ve[b, t, h])
