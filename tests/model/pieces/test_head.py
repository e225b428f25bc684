import torch

from nanofuse.model.pieces import head
from nanofuse.model.pieces.head import FusedHead, Head
from tests.model.pieces.harness import (
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


def test_forward_and_every_gradient(monkeypatch):
    config = small_config()
    module, truth = module_and_truth(Head(config))
    fused = FusedHead(module)
    prepare(fused)
    step, stream = micro_step(config), normalised(randn(N, config.n_embd))
    normed, targets = leaf(stream.normed), step.targets.view(ROWS, T)
    exact = truth(normed.view(ROWS, T, -1), targets, reduction="none")
    monkeypatch.setattr(head, "EVALUATION_ROWS", 13)
    assert_close("evaluation", fused.losses(step, stream), exact)
    losses, saved = fused.forward(step, stream)
    assert_close("losses", losses, exact)
    log_sums = truth(normed.view(ROWS, T, -1)).logsumexp(dim=-1)
    assert_close("range", fused.lse_range, torch.stack([log_sums.min(), log_sums.max()]))

    (0.5 * truth(normed.view(ROWS, T, -1), targets)).backward()
    grad = fused.backward(step, saved, torch.tensor(0.5, device=losses.device))
    assert grad.g is None and grad.branch is None
    assert_close("normed", grad.normed, normed.grad)
    assert_same_gradients(module, truth)
