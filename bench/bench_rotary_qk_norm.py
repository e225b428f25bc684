"""rotary_qk_norm on a fused QKV buffer at depth 16, with and without a value embedding.

The backward kernel writes FP8 in both layouts. Its alternatives compute the same closed form of the
gradients, to be fair to the compiler, and quantise and transpose as the baseline does.
"""

from functools import partial

import pytest
import torch

from nanofuse.bench.cases.case import D16, ROWS, TINY, rows_of_tokens
from nanofuse.bench.cases.stream import (
    rotary_qk_norm_bwd_case,
    rotary_qk_norm_bwd_sums_case,
    rotary_qk_norm_case,
)
from nanofuse.bench.checks import assert_accurate, relative_error
from nanofuse.bench.harness import (
    CAST_ERROR,
    ON_GPU,
    compiled,
    measure_case,
    op_benchmark,
    quantize_both_layouts,
)
from nanofuse.kernels.common.fp8 import E5M2
from nanofuse.kernels.rotary_qk_norm import (
    QK_GAIN,
    VALUE_GATE_SCALE,
    rotary_qk_norm_bwd,
    rotary_qk_norm_ref,
    rotary_ref,
    value_gate_ref,
)

B, T = rows_of_tokens(ROWS)
H, D = (D16 if ON_GPU else TINY).heads, (D16 if ON_GPU else TINY).head_dim
BOUND = 20.0  # of the gradients, for their FP8 scale


def forward_ref(
    qkv,  # (B*T, 3*H*D)
    tokens,  # (B*T,), or None
    table,  # (R, H*D), or None
    gate,  # (B*T, H), or None
    cos,  # (T, D)
    sin,  # (T, D)
):
    """q, k and v, each (B, T, H, D)."""
    q, k, v = (x.view(B, T, H, D) for x in qkv.chunk(3, dim=1))
    if table is not None:
        v = value_gate_ref(v, gate.view(B, T, H), table[tokens].view(B, T, H, D))
    return *rotary_qk_norm_ref(q, k, cos, sin), v


def gradients_ref(
    grads,  # of q, k and v: (B*T, H*D) each
    qkv,  # (B*T, 3*H*D), as the forward kernel leaves it
    rstd,  # (2*H, B*T)
    tokens,  # (B*T,), or None
    table,  # (R, H*D), or None
    gate,  # (B*T, H), or None
    cos,  # (T, D)
    sin,  # (T, D)
):
    """Gradients of the QKV buffer, (B*T, 3*H*D) fp32, of gate, and of each position's value
    embedding."""
    g_q, g_k, g_v = (g.view(B, T, H, D).float() for g in grads)
    rows = []
    for g, y, r in zip((g_q, g_k), qkv.chunk(3, dim=1), rstd.chunk(2), strict=False):
        y = y.view(B, T, H, D).float()
        along = (y * g).mean(dim=-1, keepdim=True) / QK_GAIN
        u = r.t().reshape(B, T, H, 1) * (QK_GAIN * g - along * y)
        rows.append(rotary_ref(u, cos, -sin))
    g_qkv = torch.cat([x.reshape(B * T, H * D) for x in (*rows, g_v)], dim=1)
    if table is None:
        return g_qkv, None, None
    s = gate.float().sigmoid().view(B, T, H)
    g_values = (VALUE_GATE_SCALE * s[..., None] * g_v).to(table.dtype).view(B * T, H * D)
    along = (g_v * table[tokens].view(B, T, H, D)).sum(dim=-1)
    g_gate = (VALUE_GATE_SCALE * s * (1 - s) * along).to(gate.dtype).view(B * T, H)
    return g_qkv, g_gate, g_values


def backward_ref(*args):
    """The timed alternative: gradients_ref, with the QKV gradient quantised in both layouts."""
    g_qkv, g_gate, g_values = gradients_ref(*args)
    return quantize_both_layouts(g_qkv, E5M2), g_gate, g_values


@op_benchmark
@pytest.mark.parametrize("value", [False, True], ids=["plain", "value"])
def bench_rotary_qk_norm(benchmark, device, value):
    case = rotary_qk_norm_case(ROWS, device, value)
    buffer, *args, _ = case.args
    qkv = buffer.clone()
    reference = partial(forward_ref, qkv, *args)
    case.run()  # in place; timed again on its own result
    double = [x if x is None or not x.is_floating_point() else x.double() for x in args]
    results = [x.view(B, T, H, D) for x in buffer.chunk(3, dim=1)]
    truth = forward_ref(qkv.double(), *double)
    for name, *three in zip("qkv", results, reference(), truth, strict=True):
        assert_accurate(name, *three)
    del truth, double
    alternatives = {"eager": reference, "compile": lambda: compiled(forward_ref)(qkv, *args)}
    measure_case(benchmark, case, alternatives)


@op_benchmark
@pytest.mark.parametrize("value", [False, True], ids=["plain", "value"])
def bench_rotary_qk_norm_bwd(benchmark, device, value):
    case = rotary_qk_norm_bwd_case(ROWS, device, value, BOUND)
    *args, _, scaling = case.args
    exact, g_gate, g_values = gradients_ref(*args)
    assert exact.abs().max() < BOUND
    operand, *others = case.run()
    rounded = (exact * scaling.scale).to(E5M2).float() * scaling.inverse_scale
    error = relative_error(operand.dequantize(), exact)
    assert error < 1.01 * CAST_ERROR * relative_error(rounded, exact)
    if value:
        torch.testing.assert_close(others, [g_gate, g_values], rtol=1e-2, atol=1e-2)
    del exact, rounded, operand, others
    alternatives = {
        "eager": lambda: backward_ref(*args),
        "compile": lambda: compiled(backward_ref)(*args),
    }
    measure_case(benchmark, case, alternatives)


@op_benchmark
@pytest.mark.parametrize("value", [False, True], ids=["plain", "value"])
def bench_rotary_qk_norm_bwd_sums(benchmark, device, value):
    """Against the same kernel behind a conversion of the sums in torch, which has the same bits."""
    case = rotary_qk_norm_bwd_sums_case(ROWS, device, value, BOUND)
    (sums, *grads), *args, scaling = case.args

    def converted():
        rows = sums.rows().view(grads[0].shape)
        return rotary_qk_norm_bwd(rows, *grads, *args, scaling=scaling)

    for ours, other in zip(case.run(), converted(), strict=True):
        if ours is not None:
            pairs = [(ours, other)]
            if hasattr(ours, "transposed"):
                pairs = [(ours.data, other.data), (ours.transposed, other.transposed)]
            assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)
    measure_case(benchmark, case, {"eager": converted})
