"""rotary_qk_norm on a fused QKV buffer at depth 16, with and without a value embedding.

The backward kernel writes FP8 in both layouts. Its alternatives compute the same closed form of the
gradients, to be fair to the compiler, and quantise and transpose as the baseline does.
"""

from functools import partial

import pytest
import torch

from nanofuse.bench.checks import assert_accurate, relative_error
from nanofuse.bench.harness import (
    CAST_ERROR,
    ON_GPU,
    compiled,
    measure,
    op_benchmark,
    quantize_both_layouts,
    zipf_tokens,
)
from nanofuse.kernels.common.fp8 import E5M2, Scaling
from nanofuse.kernels.rotary_qk_norm import (
    QK_GAIN,
    VALUE_GATE_SCALE,
    rotary_qk_norm_bwd,
    rotary_qk_norm_fwd,
    rotary_qk_norm_ref,
    rotary_ref,
    rotary_table,
    value_gate_ref,
)

B, T, H, D, VOCAB = (32, 2048, 8, 128, 32768) if ON_GPU else (1, 16, 2, 32, 5)


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


class Case:
    """Random inputs on a device; `value`: with a value embedding."""

    def __init__(self, device, value):
        randn = partial(torch.randn, device=device, dtype=torch.bfloat16)
        self.qkv = randn(B * T, 3 * H * D)
        self.grads = [randn(B * T, H * D) for _ in range(3)]
        self.args = [None, None, None, *rotary_table(T, D, 100_000, device)]
        if value:
            tokens = zipf_tokens((B * T,), VOCAB, device)
            self.args[:3] = tokens, randn(VOCAB, H * D), randn(B * T, H)
        self.distinct = self.args[0].unique().numel() if value else 0  # rows of the table


@op_benchmark
@pytest.mark.parametrize("value", [False, True], ids=["plain", "value"])
def bench_rotary_qk_norm(benchmark, device, value):
    case = Case(device, value)
    qkv = case.qkv.clone()
    reference = partial(forward_ref, case.qkv, *case.args)
    rotary_qk_norm_fwd(qkv, *case.args, T, H)
    double = [x if x is None or not x.is_floating_point() else x.double() for x in case.args]
    results = [x.view(B, T, H, D) for x in qkv.chunk(3, dim=1)]
    truth = forward_ref(case.qkv.double(), *double)
    for name, *three in zip("qkv", results, reference(), truth, strict=True):
        assert_accurate(name, *three)
    del truth, double
    measure(
        benchmark,
        partial(rotary_qk_norm_fwd, qkv, *case.args, T, H),  # again on its own result
        bytes_moved=2 * H * D * (B * T * (6 if value else 4) + case.distinct),
        alternatives={
            "eager": reference,
            "compile": lambda: compiled(forward_ref)(case.qkv, *case.args),
        },
        shape=(B * T, H, D),
    )


@op_benchmark
@pytest.mark.parametrize("value", [False, True], ids=["plain", "value"])
def bench_rotary_qk_norm_bwd(benchmark, device, value):
    case = Case(device, value)
    rstd = rotary_qk_norm_fwd(case.qkv, *case.args, T, H)
    args = (case.grads, case.qkv, rstd, *case.args)
    exact, g_gate, g_values = gradients_ref(*args)
    scaling = Scaling.from_bound(exact.abs().max().item(), E5M2, device)
    op = partial(rotary_qk_norm_bwd, *case.grads, *args[1:], T, scaling=scaling, want_plain=False)
    _, operand, *others = op()
    rounded = (exact * scaling.scale).to(E5M2).float() * scaling.inverse_scale
    error = relative_error(operand.dequantize(), exact)
    assert error < 1.01 * CAST_ERROR * relative_error(rounded, exact)
    if value:
        torch.testing.assert_close(others, [g_gate, g_values], rtol=1e-2, atol=1e-2)
    del exact, rounded, operand, others
    measure(
        benchmark,
        op,
        bytes_moved=2 * H * D * (B * T * (9 if value else 8) + case.distinct),
        alternatives={
            "eager": lambda: backward_ref(*args),
            "compile": lambda: compiled(backward_ref)(*args),
        },
        shape=(B * T, H, D),
    )
