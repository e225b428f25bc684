from nanofuse.model.pieces.embedding import Embedding, FusedEmbedding
from nanofuse.model.pieces.stream import StreamGrad
from tests.model.pieces.harness import (
    N,
    assert_close,
    assert_same_gradients,
    micro_step,
    module_and_truth,
    randn,
    small_config,
)


def test_forward_and_every_gradient():
    config = small_config()
    module, truth = module_and_truth(Embedding(config))
    fused, step, upstream = FusedEmbedding(module), micro_step(config), randn(N, config.n_embd)
    stream, saved = fused.forward(step, None)
    x0, _ = truth(step.tokens)
    assert stream.branch is None and step.x0 is stream.x
    assert_close("x0", stream.x, x0.view(N, -1))
    (x0.view(N, -1) * upstream).sum().backward()
    fused.backward(step, saved, StreamGrad(upstream))
    assert_same_gradients(module, truth)
