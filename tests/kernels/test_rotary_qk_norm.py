import math

import pytest
import torch

from nanofuse.bench.checks import DTYPES, assert_accurate, assert_fp8, relative_error, same_bits
from nanofuse.kernels.common.attention_sums import AttentionSums
from nanofuse.kernels.common.fp8 import E5M2, Scaling
from nanofuse.kernels.common.rms_norm import rms_norm_ref
from nanofuse.kernels.common.tuning import forced
from nanofuse.kernels.rotary_qk_norm import (
    HeadTile,
    rotary_qk_norm,
    rotary_qk_norm_bwd,
    rotary_qk_norm_fwd,
    rotary_qk_norm_ref,
    rotary_ref,
    rotary_table,
    value_gate_ref,
)

VOCAB = 11
# B, T, H, K, D: single heads and rows, ragged tiles and groups, odd halves, a prime, GQA
SHAPES = [
    (1, 1, 1, 1, 32),
    (1, 63, 1, 1, 8),
    (2, 32, 2, 2, 16),
    (5, 13, 3, 1, 12),
    (1, 67, 2, 2, 6),
    (3, 11, 9, 3, 10),
]
OPERAND_SHAPES = [(1, 16, 1, 1, 64), (2, 40, 3, 1, 32), (1, 48, 2, 2, 32), (3, 16, 6, 2, 32)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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
    scores = y[30, 0] @ y[25, 1], y[12, 0] @ y[7, 1]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-4)  # the tables are fp32


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


class Case:
    """Random inputs of the fused op, and the op and its reference on them."""

    def __init__(self, shape, dtype, device, value=True):
        self.shape = shape
        B, T, H, K, D = shape
        self.sizes = [H * D, K * D, K * D]
        self.qkv = torch.randn(B * T, sum(self.sizes), device=device).to(dtype)
        self.cos, self.sin = rotary_table(T + 3, D, 100_000, device)
        self.tokens = self.table = self.gate = None
        if value:
            self.tokens = torch.randint(VOCAB, (B * T,), device=device)
            self.table = torch.randn(VOCAB, K * D, device=device).to(dtype)
            self.gate = torch.randn(B * T, K, device=device).to(dtype)
        self.grads = [
            torch.randn(B, T, h, D, device=device).to(dtype) * (1 + torch.rand((), device=device))
            for h in (H, K, K)
        ]

    def outputs(self, qkv, table, gate):
        B, T, H, K, _ = self.shape
        return rotary_qk_norm(
            1 * qkv, self.cos, self.sin, T, H, tokens=self.tokens, table=table, gate=gate
        )

    def reference(self, qkv, table, gate):
        B, T, H, K, D = self.shape
        q, k, v = (x.reshape(B, T, -1, D) for x in qkv.split(self.sizes, dim=1))
        cos, sin = (x[:T].to(torch.promote_types(x.dtype, qkv.dtype)) for x in (self.cos, self.sin))
        q, k = rotary_qk_norm_ref(q, k, cos, sin)
        if table is not None:
            v = value_gate_ref(v, gate.view(B, T, K), table[self.tokens].view(B, T, K, D))
        return q, k, v

    def run(self, op, dtype=None):
        """Results of op, and its gradients of qkv, table and gate, computed in dtype."""
        inputs = [
            None if x is None else x.to(dtype or x.dtype).requires_grad_()
            for x in (self.qkv.clone(), self.table, self.gate)
        ]
        outputs = op(*inputs)
        grads = [g.to(dtype or g.dtype) for g in self.grads]
        wanted = [x for x in inputs if x is not None]
        return outputs, torch.autograd.grad(outputs, wanted, grads)

    def forward(self):
        """The buffer after the forward launcher, and rstd."""
        qkv = self.qkv.clone()
        args = self.tokens, self.table, self.gate, self.cos, self.sin, *self.shape[1:3]
        return qkv, rotary_qk_norm_fwd(qkv, *args)

    def backward(self, qkv, rstd, scaling=None):
        """The three results of the backward launcher."""
        rows = [g if isinstance(g, AttentionSums) else g.reshape(len(qkv), -1) for g in self.grads]
        args = self.tokens, self.table, self.gate, self.cos, self.sin, self.shape[1]
        return rotary_qk_norm_bwd(*rows, qkv, rstd, *args, scaling)


def assert_matches_the_reference(case):
    names = ["q", "k", "v", "g_qkv", "g_table", "g_gate"]
    results = [case.run(case.outputs), case.run(case.reference)]
    results.append(case.run(case.reference, torch.float64))
    for name, *three in zip(names, *([*y, *g] for y, g in results), strict=False):
        assert_accurate(name, *three)


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(shape, dtype, value, device):
    case = Case(shape, dtype, device, value)
    assert_matches_the_reference(case)


@pytest.mark.parametrize("tile", [HeadTile(16, 1, 4), HeadTile(32, 16, 4, stages=1)], ids=str)
def test_other_tiles_and_the_narrowest_head(tile, device):
    case = Case((2, 13, 3, 2, 2), torch.float32, device)
    with forced("rotary_qk_norm", tile), forced("rotary_qk_norm_bwd", tile):
        assert_matches_the_reference(case)


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("shape", OPERAND_SHAPES, ids=str)
def test_gradient_operand_in_both_layouts(shape, value, device):
    case = Case(shape, torch.float32, device, value)
    _, exact = case.run(case.reference, torch.float64)
    scaling = Scaling.from_bound(exact[0].abs().max().item(), E5M2, device)
    saved = case.forward()
    operand, g_gate, _ = case.backward(*saved, scaling)
    assert (g_gate is None) == (not value)
    assert_fp8("g_qkv", operand, exact[0], scaling)


@pytest.mark.parametrize("rows", [16, 32, 64])
def test_sums_of_attention_give_the_bits_of_their_rows(rows, device):
    """Plain and in FP8; two query heads a key head; two sequences, or one of two tiles."""
    shape = (1, 128, 2, 1, 128) if rows == 32 else (2, 64, 2, 1, 128)
    case = Case(shape, torch.float32, device, value=rows == 16)
    saved = case.forward()
    sums = AttentionSums.of(case.grads[0], 0.3)
    case.grads[0] = sums.rows()
    scalings = [Scaling.from_bound(10.0, E5M2, device) for _ in range(2)]
    tile = HeadTile(rows, 1, 4)
    with forced("rotary_qk_norm_bwd", tile), forced("rotary_qk_norm_bwd_sums", tile):
        expected = [case.backward(*saved)[0], case.backward(*saved, scalings[0])[0]]
        case.grads[0] = sums
        got = [case.backward(*saved)[0], case.backward(*saved, scalings[1])[0]]
    assert torch.equal(got[0], expected[0]) and torch.equal(scalings[0].amax, scalings[1].amax)
    for a, b in zip(vars(got[1]).values(), vars(expected[1]).values(), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_refused_sums(device):
    case = Case((1, 64, 1, 1, 128), torch.float32, device, value=False)
    saved, x = case.forward(), case.grads[0]
    for sums, match in (
        (AttentionSums.of(x, dtype=torch.bfloat16), "sums want torch.float32"),
        (AttentionSums.of(torch.cat([x, x])), "sums must have shape"),
        (AttentionSums(AttentionSums.of(x).sums.double(), 1.0, x.dtype), "sums must be"),
    ):
        case.grads[0] = sums
        with pytest.raises(ValueError, match=match):
            case.backward(*saved)
    case.grads[0] = AttentionSums.of(x)
    tile = HeadTile(128, 1, 4)
    with forced("rotary_qk_norm_bwd_sums", tile), pytest.raises(ValueError, match="and 128"):
        case.backward(*saved)
    half = Case((1, 32, 2, 2, 128), torch.float32, device, value=False)
    half.grads[0] = AttentionSums(torch.zeros(1, 2, 32 * 128, device=device), 1.0, torch.float32)
    with pytest.raises(ValueError, match="not 128 and 32"):
        half.backward(*half.forward())


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_the_maximum_is_that_of_all_three(part, device):
    """Wherever it lies: here in the last head of the last row."""
    case = Case((1, 16, 3, 2, 32), torch.float32, device)
    case.grads["qkv".index(part)][0, -1, -1] *= 100
    scaling = Scaling.from_bound(1.0, E5M2, device)
    saved = case.forward()
    exact = case.backward(*saved)[0].abs().max()
    case.backward(*saved, scaling)
    assert scaling.amax == exact


@pytest.mark.parametrize("bad", [VOCAB, -1, 2**32 + 3, -(2**62)])
def test_a_token_outside_of_the_table_gives_nan_and_reads_nothing(bad, device):
    case = Case((1, 37, 2, 2, 12), torch.float32, device)
    memory = torch.full((3 * VOCAB, 24), 7.0, device=device)
    memory[VOCAB : 2 * VOCAB] = case.table
    case.table = memory[VOCAB : 2 * VOCAB]
    clean_y, clean = case.run(case.outputs)
    clean_y = [y.clone() for y in clean_y]
    case.tokens[35] = bad
    (q, k, v), (_, g_table, g_gate) = case.run(case.outputs)
    assert torch.equal(q, clean_y[0]) and torch.equal(k, clean_y[1])
    row = torch.arange(37, device=device) == 35
    assert torch.equal(v[0].isnan().all(dim=(1, 2)), row) and v[0, ~row].isfinite().all()
    assert torch.equal(g_gate.isnan().all(dim=1), row)
    assert torch.equal(g_gate[~row], clean[2][~row]) and g_table.isfinite().all()


def test_v_without_an_embedding_is_untouched(device):
    case = Case((2, 9, 2, 2, 8), torch.float32, device, value=False)
    case.qkv[:, -16:] = float("nan")
    qkv, rstd = case.forward()
    assert qkv[:, -16:].isnan().all() and qkv[:, :-16].isfinite().all() and rstd.isfinite().all()


def test_the_buffer_is_overwritten_and_the_results_are_its_views(device):
    case = Case((2, 9, 3, 2, 8), torch.float32, device)
    buffer = 1 * case.qkv.requires_grad_()
    q, k, v = rotary_qk_norm(buffer, case.cos, case.sin, 9, 3)
    assert {x.untyped_storage().data_ptr() for x in (q, k, v)} == {
        buffer.untyped_storage().data_ptr()
    }
    assert [tuple(x.shape) for x in (q, k, v)] == [(2, 9, 3, 8), (2, 9, 2, 8), (2, 9, 2, 8)]


def test_a_producer_that_needs_its_result_is_caught(device):
    case = Case((1, 9, 2, 1, 8), torch.float32, device)
    q, _, _ = rotary_qk_norm(case.qkv.requires_grad_().exp(), case.cos, case.sin, 9, 2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        q.sum().backward()


def test_strided_gradients_and_a_strided_buffer(device):
    case = Case((2, 17, 3, 2, 8), torch.float32, device)
    expected_qkv, rstd = case.forward()
    expected = case.backward(expected_qkv, rstd)
    wide = torch.zeros(34, 80, device=device)
    wide[:, 16:72] = case.qkv
    case.qkv = wide[:, 16:72]
    args = case.tokens, case.table, case.gate, case.cos, case.sin
    rotary_qk_norm_fwd(case.qkv, *args, 17, 3)
    assert torch.equal(case.qkv, expected_qkv)
    assert (wide[:, :16] == 0).all() and (wide[:, 72:] == 0).all()
    fused = torch.cat([g.reshape(34, -1) for g in case.grads], dim=1)
    got = rotary_qk_norm_bwd(*fused.split([24, 16, 16], dim=1), case.qkv, rstd, *args, 17)
    for a, b in zip(got, expected, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_results_and_gradients_of_transposed_attention(device):
    case = Case((2, 7, 2, 2, 8), torch.float32, device)
    expected = case.run(case.outputs)[1]
    case.grads = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in case.grads]
    for a, b in zip(case.run(case.outputs)[1], expected, strict=True):
        assert torch.equal(a, b)


def test_zero_heads(device):
    case = Case((1, 5, 1, 1, 8), torch.float32, device)
    case.qkv.zero_()
    qkv, rstd = case.forward()
    assert (qkv[:, :16] == 0).all() and rstd.isfinite().all()
    _, exact = case.run(case.reference, torch.float64)
    torch.testing.assert_close(case.backward(qkv, rstd)[0].double(), exact[0], rtol=1e-5, atol=1e-3)


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's Inf * 0
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_show(bad, device):
    case = Case((1, 16, 2, 1, 32), torch.float32, device)
    case.qkv[4, 3] = bad  # head 0 of q
    case.qkv[5, 104] = bad  # v
    qkv, rstd = case.forward()
    assert not qkv[4, 3].isfinite() and not qkv[5, 104].isfinite()
    assert qkv[:4].isfinite().all() and qkv[4, 32:].isfinite().all() and qkv[6:].isfinite().all()
    scaling = Scaling.from_bound(5.0, E5M2, device)
    g_qkv, operand = case.backward(qkv, rstd)[0], case.backward(qkv, rstd, scaling)[0]
    assert not g_qkv[4, 3].isfinite() and operand.dequantize()[4, 3].isnan()
    assert not scaling.amax.isfinite()


def test_two_runs_give_the_same_bits(device):
    case = Case((2, 24, 4, 2, 32), torch.float32, device)

    def run():
        scaling = Scaling.from_bound(5.0, E5M2, device)
        qkv, rstd = case.forward()
        plain, (operand, *others) = case.backward(qkv, rstd)[0], case.backward(qkv, rstd, scaling)
        return [qkv, rstd, plain, operand.data, operand.transposed, *others, scaling.amax]

    same_bits(run)


def test_refused_inputs(device):
    case = Case((2, 4, 2, 1, 8), torch.float32, device)
    good = {"qkv": case.qkv, "cos": case.cos, "sin": case.sin, "seq_len": 4, "num_heads": 2}
    value = {"tokens": case.tokens, "table": case.table, "gate": case.gate}
    rotary_qk_norm(**good, **value)
    for change, match in (
        ({"qkv": torch.zeros(32, 8, device=device).t()}, "contiguous"),
        ({"qkv": torch.zeros(8, 32, device=device, requires_grad=True)}, "leaf"),
        ({"num_heads": 1}, "does not hold"),
        ({"num_heads": 4}, "does not hold"),
        ({"seq_len": 3}, "not sequences"),
        ({"seq_len": 8}, "too small"),
        ({"cos": case.cos.double()}, "fp32"),
        ({"tokens": case.tokens}, "go together"),
        ({**value, "gate": case.gate[:7]}, "do not fit"),
        ({**value, "table": case.table[:, :4]}, "do not fit"),
        ({**value, "table": case.table.t().contiguous().t()}, "must be contiguous"),
    ):
        with pytest.raises(ValueError, match=match):
            rotary_qk_norm(**{**good, **change})
    qkv, rstd = case.forward()
    g_q, g_k, g_v = (g.reshape(8, -1) for g in case.grads)
    more = qkv, rstd, case.tokens, case.table, case.gate, case.cos, case.sin, 4
    rotary_qk_norm_bwd(g_q, g_k, g_v, *more)
    for wrong in (g_k.bfloat16(), g_k[:7], g_k.t().contiguous().t()):
        with pytest.raises(ValueError, match="g_k must be"):
            rotary_qk_norm_bwd(g_q, wrong, g_v, *more)


@pytest.mark.parametrize(("width", "start"), [(129, 0), (144, 3)])
def test_unaligned_rows_are_refused_with_fp8_alone(width, start, device):
    case = Case((2, 8, 2, 1, 32), torch.float32, device)
    qkv, rstd = case.forward()
    expected, _, _ = case.backward(qkv, rstd)
    wide = torch.zeros(16, width, device=device)[:, start : start + 128]
    wide.copy_(qkv)
    assert torch.equal(case.backward(wide, rstd)[0], expected)
    scaling = Scaling.from_bound(5.0, E5M2, device)
    with pytest.raises(ValueError, match="qkv must start at a multiple of 16 bytes"):
        case.backward(wide, rstd, scaling)


@pytest.mark.cuda
@pytest.mark.parametrize("heads", [(2, 2), (6, 6), (8, 8), (8, 2)], ids=str)
@pytest.mark.parametrize("value", [False, True])
def test_model_shapes(heads, value, device):
    case = Case((32, 2048, *heads, 128), torch.bfloat16, device, value)
    assert_matches_the_reference(case)
    exact = case.run(case.reference, torch.float32)[1][0]
    scaling = Scaling.from_bound(exact.abs().max().item(), E5M2, device)
    qkv, rstd = case.forward()
    operand, _, _ = case.backward(qkv, rstd, scaling)
    assert torch.equal(operand.data.t().view(torch.uint8), operand.transposed.view(torch.uint8))
    # x_hat is recovered from bf16 results, so some values round to another FP8 value than `exact`'s
    error = (operand.dequantize() - exact).norm() / exact.norm()
    direct = (exact.to(E5M2).float() - exact).norm() / exact.norm()
    print(f"FP8 gradient: kernel {error:.2e}, exact rounding {direct:.2e}")
    assert error <= 1.1 * direct
    torch.testing.assert_close(scaling.amax[0], exact.abs().max(), rtol=2e-2, atol=0)
    sums = AttentionSums.of(case.grads[0], 0.3)
    case.grads[0] = sums.rows()
    expected = case.backward(qkv, rstd, scaling)
    case.grads[0] = sums
    for a, b in zip(case.backward(qkv, rstd, scaling), expected, strict=True):
        a, b = (x.transposed if hasattr(x, "transposed") else x for x in (a, b))
        assert a is b is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.cuda
@pytest.mark.large
def test_more_than_two_to_the_31_elements(device):
    B, T, H, K, D = 1030, 2048, 4, 2, 128  # 2.16e9 elements
    case = Case((1, T, H, K, D), torch.bfloat16, device)
    qkv, rstd = case.forward()
    expected = case.backward(qkv, rstd)
    big = Case((1, T, H, K, D), torch.bfloat16, device)
    big.shape = (B, T, H, K, D)
    big.qkv, big.tokens, big.gate = (
        x.repeat(B, *[1] * (x.dim() - 1)) for x in (case.qkv, case.tokens, case.gate)
    )
    big.table = case.table
    big.grads = [g.repeat(B, 1, 1, 1) for g in case.grads]
    args = big.tokens, big.table, big.gate, big.cos, big.sin
    big_rstd = rotary_qk_norm_fwd(big.qkv, *args, T, H)
    assert torch.equal(big.qkv[-T:], qkv) and torch.equal(big_rstd[:, -T:], rstd)
    scaling = Scaling.from_bound(16.0, E5M2, device)
    operand = big.backward(big.qkv, big_rstd, scaling)[0]
    for got, want in zip(big.backward(big.qkv, big_rstd), expected, strict=True):
        assert torch.equal(got[-T:], got[:T])
        assert relative_error(got[:T], want) < 1e-3  # compiled separately, without FP8
    rows = slice(-T, None)
    data = operand.data[rows].view(torch.uint8)
    assert torch.equal(data, operand.data[:T].view(torch.uint8))
    assert torch.equal(data.t(), operand.transposed[:, rows].view(torch.uint8))
