"""Which products a pass has, and who computes them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nanofuse.kernels.common import panel
from nanofuse.kernels.common.tuning import Gpu, aimed_at
from nanofuse.model.config import GPTConfig
from nanofuse.model.fp8.shapes import KINDS, in_one, product_shapes

HOPPER = Gpu("NVIDIA H200", (9, 0), 132)


def test_three_products_of_each_weight_of_which_three_are_in_kernels():
    config = GPTConfig.from_depth(4)
    shapes = product_shapes(config, 4096)
    assert len(shapes) == 5 * len(KINDS) and sum(shape.by_provider for shape in shapes) == 12
    per_kind = sum(shape.flops for shape in shapes if shape.kind == "forward")
    layers = sum(p.n * p.k for p in shapes if p.kind == "forward")
    assert per_kind == 2 * 4096 * layers
    assert all(shape.adds == (shape.kind == "weight_grad") for shape in shapes)


@pytest.mark.skipif(not panel.HAS_GLUON, reason="needs Triton")
@pytest.mark.parametrize(
    "gpu, config, taken",
    [
        (HOPPER, GPTConfig.from_depth(16), 2),
        (HOPPER, GPTConfig.from_depth(32), 2),
        (HOPPER, GPTConfig.from_depth(16, head_dim=64), 1),  # heads that rotation does not take
        (HOPPER, GPTConfig.from_depth(2), 0),  # too narrow
        (HOPPER, GPTConfig.from_depth(34), 0),  # too wide
        (replace(HOPPER, capability=(10, 0)), GPTConfig.from_depth(16), 0),
    ],
)
def test_products_that_go_on_in_one_kernel(gpu, config, taken, monkeypatch):
    """On Hopper alone: the forward products of qkv and of attention's last layer."""
    monkeypatch.setattr(panel, "INTERPRETED", SimpleNamespace(value=False))
    with aimed_at(gpu):
        found = {
            (x.weight, x.kind): op
            for x in product_shapes(config, 65536)
            if (op := in_one(x, config.head_dim, torch.device("meta")))
        }
    both = {
        ("attn_proj", "forward"): "linear_residual_norm",
        ("qkv", "forward"): "linear_rotary_qk_norm",
    }
    assert found == dict(list(both.items())[:taken])
