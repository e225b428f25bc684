"""The fused pass against the model that defines it: loss, losses and every gradient."""

import pytest
import torch

from model.config import GPTConfig
from model.fused import FusedGPT
from model.gemm import PlainGemm, TorchGemm
from model.gpt import GPT
from model.linear import set_fp8
from tests.helpers import random_model

FIELDS = {"sequence_len": 32, "vocab_size": 96, "window_pattern": "SL", "bigram_embed_factor": 3}
CASES = {
    "bigram": {},
    "dense": {"bigram_embed_factor": 0},
    "grouped": {"n_kv_head": 1},
    "one_layer": {"depth": 1},
    "two_layers": {"depth": 2},
}


def make(depth=4, aspect=16, head_dim=32, **fields):
    """Config of width 64 and two heads at depth 4."""
    return GPTConfig.from_depth(depth, aspect * 4 // depth, head_dim, **{**FIELDS, **fields})


def pair(config, gemm, seed=0):
    """The same random weights in a GPT and, of the same dtype, in a FusedGPT."""
    truth = random_model(config, torch.float32, seed).train()
    model = GPT(config, torch.float32)
    model.load_state_dict(truth.state_dict())
    fused = FusedGPT(model, gemm).train()
    fused.refresh()
    return truth, fused


def batch(config, rows=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, rows, config.sequence_len)
    tokens, targets = torch.randint(config.vocab_size, shape, generator=generator)
    targets[0, :5] = -1
    return tokens, targets


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("case", CASES)
def test_loss_and_every_gradient_in_fp32(case):
    config = make(**CASES[case])
    truth, fused = pair(config, PlainGemm())
    tokens, targets = batch(config)
    for _ in range(2):  # gradients accumulate
        expected, loss = truth(tokens, targets), fused(tokens, targets)
        (0.5 * expected).backward()
        (0.5 * loss).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    named = dict(fused.model.named_parameters())
    for name, p in truth.named_parameters():
        if name == "backout_lambda" and config.n_layer < 3:
            continue  # the middle layer is the last: only a factor of the norm's input, gradient 0
        assert relative(named[name].grad, p.grad) < 1e-3, name


def test_losses_without_gradients():
    config = make()
    truth, fused = pair(config, PlainGemm())
    tokens, targets = batch(config)
    fused.eval()
    losses = fused(tokens, targets, reduction="none")
    torch.testing.assert_close(losses, truth(tokens, targets, reduction="none").detach())
    assert losses.shape == (64,) and (losses[:5] == 0).all()
    torch.testing.assert_close(fused(tokens, targets), truth(tokens, targets).detach())


def test_fp8_is_as_close_as_the_baseline_in_fp8():
    """Errors at most twice those of model/linear.py, which takes each scale from the tensor."""
    config = make(depth=2, aspect=64, vocab_size=128)
    truth, fused = pair(config, TorchGemm())
    baseline, _ = pair(config, PlainGemm())
    assert set_fp8(baseline, "torch") == 13
    tokens, targets = batch(config)
    losses = [model(tokens, targets) for model in (truth, fused, baseline)]
    for loss in losses:
        loss.backward()
    assert abs(losses[1] - losses[0]) < max(2 * abs(losses[2] - losses[0]), 0.01)
    ours, theirs = (dict(m.named_parameters()) for m in (fused.model, baseline))
    for name, p in truth.named_parameters():
        if p.numel() > 16:
            error, allowed = relative(ours[name].grad, p.grad), relative(theirs[name].grad, p.grad)
            print(f"{name}: fused {error:.3f}, baseline {allowed:.3f}")
            assert error < 2 * allowed + 0.01, name
