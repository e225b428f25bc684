"""Which products a pass has, and who computes them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nanofuse.kernels.common import panel
from nanofuse.kernels.common.tuning import Gpu, aimed_at, forced
from nanofuse.model.config import GPTConfig
from nanofuse.model.fp8.shapes import KINDS, for_provider, in_one, product_shapes
from nanofuse.model.gpt import GPT

H200 = Gpu("NVIDIA H200", (9, 0), 132)
B200 = replace(H200, capability=(10, 0))
D16 = GPTConfig.from_depth(16)
GROUPED = replace(D16, n_kv_head=2)
QKV, NORM = ("qkv", "linear_rotary_qk_norm"), ("attn_proj", "linear_residual_norm")


@pytest.mark.parametrize("fields", [{}, {"n_kv_head": 1}])
def test_they_are_those_of_the_weights(fields):
    """Three kinds of each, of which kernels contain three in any case."""
    config = GPTConfig.from_depth(1, 64, 32, sequence_len=16, vocab_size=96, **fields)
    shapes, model = product_shapes(config, 48), GPT(config)
    attention, mlp = model.transformer.h[0].attn, model.transformer.h[0].mlp
    linears = {
        "qkv": [attention.c_q, attention.c_k, attention.c_v], "attn_proj": [attention.c_proj],
        "fc": [mlp.c_fc], "mlp_proj": [mlp.c_proj], "lm_head": [model.lm_head],
    }  # fmt: skip
    wanted = {
        (name, kind, *torch.cat([x.weight for x in parts]).shape)
        for name, parts in linears.items()
        for kind in KINDS
    }
    assert {(x.weight, x.kind, x.n, x.k) for x in shapes} == wanted
    assert len(shapes) == len(wanted)
    assert {x.positions for x in shapes} == {48}
    assert all(x.adds == (x.kind == "weight_grad") for x in shapes)
    assert {(x.weight, x.kind) for x in shapes if not x.by_provider} == {
        ("fc", "forward"), ("mlp_proj", "input_grad"), ("lm_head", "forward"),
    }  # fmt: skip


@pytest.mark.skipif(not panel.HAS_GLUON, reason="needs Triton")
@pytest.mark.parametrize(
    "gpu, config, positions, expected",
    [
        (H200, D16, 65536, {QKV, NORM}),
        (H200, GROUPED, 65536, {QKV, NORM}),
        (H200, D16, 1000 * 16, {QKV, NORM}),
        (H200, D16, 1000, set()),
        (H200, GPTConfig.from_depth(16, head_dim=64), 65536, {NORM}),
        (H200, GPTConfig.from_depth(26), 65536, {QKV, NORM}),
        (H200, GPTConfig.from_depth(32), 65536, {QKV}),
        (H200, GPTConfig.from_depth(2), 65536, set()),  # too narrow
        (H200, GPTConfig.from_depth(34), 65536, set()),  # too wide
        (B200, D16, 65536, set()),
    ],
)
def test_products_that_go_on_in_one_kernel(gpu, config, positions, expected, monkeypatch):
    """On Hopper alone: the forward products of qkv and of attention's last layer. All others stay
    with the provider, as without FP8 they do."""
    monkeypatch.setattr(panel, "INTERPRETED", SimpleNamespace(value=False))
    device, shapes = torch.device("meta"), product_shapes(config, positions)
    with aimed_at(gpu):
        ops = [(x, in_one(x, config.head_dim, device)) for x in shapes]
        assert {(x.weight, op) for x, op in ops if op} == expected
        assert {x.kind for x, op in ops if op} <= {"forward"}
        left = [x for x, op in ops if x.by_provider and not op]
        assert for_provider(config, positions, device, fp8=True) == left
        assert len(left) == 12 - len(expected)
        assert for_provider(config, positions, device, fp8=False) == [
            x for x in shapes if x.by_provider
        ]
        with forced("rotary_qk_norm", None), forced("residual_norm_fwd", None):
            assert not any(in_one(x, config.head_dim, device) for x in shapes)
