import torch

from nanofuse.model.pieces.mlp import MLP, FusedMLP
from nanofuse.model.pieces.stream import StreamGrad
from tests.model.pieces.harness import (
    N,
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


def test_forward_and_every_gradient():
    config = small_config()
    module, truth = module_and_truth(MLP(config))
    fused = FusedMLP(module, 1)
    prepare(fused)
    step, stream = micro_step(config), normalised(randn(N, config.n_embd))
    normed = leaf(stream.normed)
    g, upstream = randn(N, config.n_embd), randn(N, config.n_embd, seed=1)
    shares = torch.zeros(4, device=g.device)
    factor = torch.full((1,), 0.01, device=g.device)  # small: its gradient is summed in the piece

    out, saved = fused.forward(step, stream)
    branch = truth(normed)
    assert out.x is stream.x and out.grad_name == "grad_mlp.1" and stream.normed is None
    assert_close("branch", out.branch, branch)
    value = (g.double() * (stream.x + branch)).sum()

    branch.backward(upstream.double())
    grad = fused.backward(step, saved, StreamGrad(g, factor, shares, branch=upstream.clone()))
    assert grad.g is g and grad.factor is factor and grad.branch is None
    assert_close("normed", grad.normed, normed.grad)
    assert_same_gradients(module, truth)
    assert_close("factor", shares.sum(), value.detach())
