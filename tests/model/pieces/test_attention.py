from dataclasses import replace

import pytest
import torch

from nanofuse.kernels.common.attention_sums import AttentionSums
from nanofuse.kernels.embedding_grad import sort_rows
from nanofuse.kernels.residual_mix import residual_mix_fwd
from nanofuse.kernels.rotary_qk_norm import rotary_qk_norm_fwd, rotary_table
from nanofuse.model.backends.torch_backends import SDPAttention
from nanofuse.model.config import GPTConfig
from nanofuse.model.pieces import attention as piece
from nanofuse.model.pieces.attention import Attention, FusedAttention
from nanofuse.model.pieces.stream import MicroStep, StreamGrad
from tests.model.pieces.harness import (
    DEVICE,
    PLAIN,
    ROWS,
    N,
    T,
    assert_close,
    assert_same_gradients,
    leaf,
    micro_step,
    module_and_truth,
    normalised,
    prepare,
    randn,
    small_config,
)

WINDOWS = 5, T  # of which only the second is the whole row


def test_the_window_is_that_of_the_layer():
    config = GPTConfig.from_depth(4, 8, 16, sequence_len=256, window_pattern="LSSL")
    assert config.windows == [256, 128, 128, 256]
    assert [Attention(config, layer).window for layer in range(4)] == config.windows


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("fields", [{}, {"n_kv_head": 1}], ids=str)
@pytest.mark.parametrize("layer", [0, 1])  # of two: the second has a value embedding
def test_forward_and_every_gradient(layer, fields, window):
    config = small_config(**fields)
    module, truth = module_and_truth(Attention(config, layer))
    module.window = truth.window = window
    table, values = None, None
    if layer in config.value_embed_layers:
        table = randn(config.padded_vocab_size, config.kv_dim, seed=5)
        values = leaf(table)
        table.grad = torch.zeros_like(table)
    angles = rotary_table(2 * T, config.head_dim, 1e4, DEVICE)
    fused = FusedAttention(module, table, angles, SDPAttention(), config)
    prepare(fused)
    step, stream = micro_step(config), normalised(randn(N, config.n_embd))
    normed, g, upstream = leaf(stream.normed), *(randn(N, config.n_embd, seed=s) for s in (1, 2))

    out, saved = fused.forward(step, stream)
    looked_up = None if values is None else values[step.tokens]
    rotary = [x[:T].double() for x in angles]
    branch = truth(normed.view(ROWS, T, -1), looked_up, rotary, SDPAttention()).view(N, -1)
    assert out.x is stream.x and out.grad_name == f"grad_attn.{layer}" and stream.normed is None
    assert_close("branch", out.branch, branch)

    branch.backward(upstream.double())
    grad = fused.backward(step, saved, StreamGrad(g, branch=upstream.clone()))
    assert grad.g is g and grad.factor is None and grad.branch is None
    assert_close("normed", grad.normed, normed.grad)
    assert_same_gradients(module, truth)
    if values is not None:
        assert_close("values", table.grad, values.grad)


@pytest.mark.parametrize("layer", [0, 1])
def test_one_kernel_or_two_pass_on_the_same(layer, monkeypatch):
    """Where linear_rotary_qk_norm takes the product, attention gets what it gives, and its backward
    pass reads it."""
    config, results, asked = small_config(), [], []

    def in_one(x, w, tokens, table, gate, angles, heads):
        asked.append(angles)
        cos, sin = angles.view(torch.float16).float().view(*angles.shape, 2).unbind(-1)
        cos, sin = torch.cat([cos, cos], dim=1), torch.cat([sin, -sin], dim=1)
        qkv = x @ w.t()
        return qkv, rotary_qk_norm_fwd(qkv, tokens, table, gate, cos, sin, len(angles), heads)

    for one in (False, True):
        monkeypatch.setattr(piece, "takes", lambda x, w, head_dim, one=one: one)
        monkeypatch.setattr(piece, "linear_rotary_qk_norm_fwd", in_one)
        module, _ = module_and_truth(Attention(config, layer))
        table = None
        if layer in config.value_embed_layers:
            table = randn(config.padded_vocab_size, config.kv_dim, seed=5)
            table.grad = torch.zeros_like(table)
        angles = (x.half().float() for x in rotary_table(2 * T, config.head_dim, 1e4, DEVICE))
        fused = FusedAttention(module, table, tuple(angles), SDPAttention(), config)
        prepare(fused)
        step, stream = micro_step(config), normalised(randn(N, config.n_embd))
        out, saved = fused.forward(step, stream)
        upstream, g = (randn(N, config.n_embd, seed=s) for s in (1, 2))
        grad = fused.backward(step, saved, StreamGrad(g, branch=upstream))
        results.append([out.branch, grad.normed, *(p.grad for p in module.parameters())])
        fused.forward(step, normalised(randn(N, config.n_embd)))
    assert len(asked) == 2 and asked[0].data_ptr() == asked[1].data_ptr()  # packed once
    assert len(asked[0]) == T
    for apart, together in zip(*results, strict=True):
        assert torch.equal(apart, together)


def test_its_last_product_may_add_and_normalise(monkeypatch):
    """Where linear_residual_norm takes the product, the stream has its norm, and backward nothing
    changes."""
    config, results, asked, scaling = small_config(), [], [], object()

    def in_one(a, w, x, scaling):
        asked.append(scaling)
        return residual_mix_fwd(x, a @ w.t())

    monkeypatch.setattr(piece, "linear_residual_norm_fwd", in_one)
    for one in (False, True):
        monkeypatch.setattr(piece, "takes_norm", lambda *args, one=one: one)
        module, _ = module_and_truth(Attention(config, 0))
        angles = rotary_table(2 * T, config.head_dim, 1e4, DEVICE)
        fused = FusedAttention(module, None, angles, SDPAttention(), config)
        prepare(fused)
        step, stream = micro_step(config), normalised(randn(N, config.n_embd))
        step.precision = replace(step.precision, norm_scaling=scaling)
        out, saved = fused.forward(step, stream)
        assert out.grad_name == "grad_attn.0" and (out.branch is None) == one
        upstream, g = (randn(N, config.n_embd, seed=s) for s in (1, 2))
        if one:
            made = out.x, out.rstd, out.normed
        else:
            made = residual_mix_fwd(out.x, out.branch)
        grad = fused.backward(step, saved, StreamGrad(g, branch=upstream))
        results.append([*made, grad.normed, *(p.grad for p in module.parameters())])
    assert asked == [scaling]
    for apart, together in zip(*results, strict=True):
        assert torch.equal(apart, together)


class LeavesSums(SDPAttention):
    """Gives grad_q as a library that has not converted it."""

    def backward(self, saved, grad_y):
        grad_q, *others = super().backward(saved, grad_y)
        return AttentionSums.of(grad_q), *others


def test_sums_of_attention_give_the_same_gradients():
    config = GPTConfig.from_depth(1, 128, 128, sequence_len=64, vocab_size=60)
    module, _ = module_and_truth(Attention(config, 0))
    tokens = torch.arange(64, device=DEVICE)[None] % 60
    angles = rotary_table(64, config.head_dim, 1e4, DEVICE)
    table = randn(config.padded_vocab_size, config.kv_dim, seed=5)
    found = []
    for attention in (SDPAttention(), LeavesSums()):
        table.grad = torch.zeros_like(table)
        fused = FusedAttention(module, table, angles, attention, config)
        prepare(fused)
        step = MicroStep(tokens, tokens.flatten(), PLAIN)
        step.order = sort_rows(tokens, config.padded_vocab_size)
        _, saved = fused.forward(step, normalised(randn(64, config.n_embd)))
        upstream = randn(64, config.n_embd, seed=1)
        grad = fused.backward(step, saved, StreamGrad(upstream, branch=upstream.clone()))
        found.append([grad.normed, table.grad, *(p.grad for p in module.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(x.any() for x in found[1])
