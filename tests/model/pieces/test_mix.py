"""All mixes and norms of three layers in a row, with branches that do not depend on the stream."""

import pytest
import torch

from nanofuse.kernels.bigram_rows import bigram_rows, bigram_rows_ref
from nanofuse.kernels.common.rms_norm import rms_norm_ref
from nanofuse.model.config import GPTConfig
from nanofuse.model.pieces import mix as mix_module
from nanofuse.model.pieces.mix import (
    LOOKBACK,
    Backout,
    FusedBackout,
    FusedMiddle,
    FusedMix,
    FusedNorm,
    Mix,
    Tables,
)
from nanofuse.model.pieces.stream import Stream, StreamGrad
from tests.model.pieces.harness import (
    N,
    T,
    assert_close,
    assert_same_gradients,
    leaf,
    micro_step,
    module_and_truth,
    normalised,
    randn,
    small_config,
)


def test_a_norm_adds_the_branch():
    config = small_config()
    fused, step = FusedNorm(), micro_step(config)
    x, branch, upstream, g = (randn(N, config.n_embd, seed=s) for s in range(4))
    factor = torch.full((1,), 0.7, device=x.device)
    exact_x, exact_branch = leaf(x), leaf(branch)
    y = exact_x + exact_branch
    stream, saved = fused.forward(step, Stream(x, branch, "grad_attn.0"))
    expected = normalised(x + branch)
    assert stream.branch is None and stream.grad_name is None
    for name in ("x", "rstd", "normed"):
        assert_close(name, getattr(stream, name), getattr(expected, name).double())
    torch.autograd.backward([y, rms_norm_ref(y)], [0.7 * g.double(), upstream.double()])
    grad = fused.backward(step, saved, StreamGrad(g, factor, normed=upstream))
    assert grad.factor is None and grad.normed is None
    assert_close("x", grad.g, exact_x.grad)
    assert_close("branch", grad.branch, exact_branch.grad)


def test_a_norm_that_a_product_made_goes_on():
    """Forward there is nothing left to do; backward the norm does what it does for a branch."""
    config = small_config()
    fused, step = FusedNorm(), micro_step(config)
    x, branch, upstream, g = (randn(N, config.n_embd, seed=s) for s in range(4))
    apart = fused.forward(step, Stream(x, branch, "grad_attn.0"))
    given, _ = apart
    given = Stream(given.x, None, "grad_attn.0", given.rstd, given.normed)
    normed, together = given.normed, fused.forward(step, given)
    assert together[0].normed is normed and given.normed is None
    assert together[0].grad_name is None and together[0].x is apart[0].x
    grads = [
        fused.backward(step, saved, StreamGrad(g, normed=upstream))
        for _, saved in (apart, together)
    ]
    assert torch.equal(grads[0].g, grads[1].g) and torch.equal(grads[0].branch, grads[1].branch)


class Branch:
    """A piece that ends in a constant branch, and takes some of the norm for its gradient."""

    def __init__(self, branch, upstream, name):
        self.branch, self.upstream, self.name = branch, upstream, name

    def forward(self, step, stream):
        return Stream(stream.x, self.branch, self.name), None

    def backward(self, step, saved, grad):
        self.grad = grad.take_branch()
        return StreamGrad(grad.g, grad.factor, normed=self.upstream)


def run(config, tables=("bigram",)):
    """The fused mixes and autograd through their modules; compares everything."""
    layers, width = config.n_layer, config.n_embd
    mix, exact_mix = module_and_truth(Mix(config), seed=1)
    with torch.no_grad():  # the gradient of a small factor is the business of the piece below
        for module in (mix, exact_mix):
            module.resid_lambdas.add_(0.3 * module.resid_lambdas.sign())
    backout, exact_backout = module_and_truth(Backout(), seed=2)
    looked_up, exact_tables = module_and_truth(Tables(config), seed=3)
    assert tuple(name for name, _, _ in looked_up.all()) == tables
    x0, step = randn(N, width, seed=4), micro_step(config)
    constants = [randn(N, width, seed=10 + i) for i in range(2 * layers + 1)]
    branches = [Branch(constants[i], randn(N, width, seed=30 + i), "some") for i in range(layers)]
    pieces = []
    for i, branch in enumerate(branches):
        pieces += [FusedMix(mix, looked_up, i), branch]
        if i == config.middle_layer:
            pieces.append(FusedMiddle(mix, backout, i))
    pieces.append(FusedBackout(backout, config))

    step.x0, stream, saved = x0, Stream(x0), []
    for piece in pieces:
        stream, state = piece.forward(step, stream)
        saved.append(state)
    exact_x0, x, outputs, upstreams, leaves = leaf(x0), None, [], [], []
    x, terms = exact_x0, exact_tables(step.tokens)
    terms = [(e.view(N, -1), lambdas) for e, lambdas in terms]
    for i, branch in enumerate(branches):
        x = exact_mix(i, x, exact_x0, terms)
        outputs.append(rms_norm_ref(x))
        upstreams.append(branch.upstream.double())
        leaves.append(leaf(branch.branch))
        x = x + leaves[-1]
        if i == config.middle_layer:
            x_mid = x
    last = rms_norm_ref(exact_backout(x, x_mid))
    assert_close("normed", stream.normed, last)
    outputs.append(last)
    upstreams.append(randn(N, width, seed=50).double())
    torch.autograd.backward(outputs, upstreams)

    grad = StreamGrad(normed=upstreams[-1].float())
    for piece in reversed(pieces):
        # a factor's own gradient, where it is small, is the business of the piece below
        grad = piece.backward(step, saved.pop(), grad)
    assert_close("x0", grad.g, exact_x0.grad)
    for i, (branch, exact) in enumerate(zip(branches, leaves, strict=True)):
        assert_close(f"branch {i}", branch.grad, exact.grad)
    pairs = [(mix, exact_mix), (looked_up, exact_tables)]
    if config.middle_layer < layers - 1:  # else backout only scales the norm's input
        pairs.append((backout, exact_backout))
    for module, truth in pairs:
        assert_same_gradients(module, truth)


def layers_of(count, **fields):
    sizes = {"sequence_len": T, "vocab_size": 60, "bigram_embed_factor": 2, **fields}
    return GPTConfig.from_depth(count, 48 // count, 16, **sizes)


@pytest.mark.parametrize("layers", [1, 4])  # of one layer the middle is the last
def test_forward_and_every_gradient(layers):
    run(layers_of(layers))


def test_without_tables():
    run(layers_of(3, bigram_embed_factor=0), tables=())


@pytest.mark.parametrize("cut", [1, 2, T - 1])
def test_tables_go_on_from_the_tokens_before(cut):
    tables, _ = module_and_truth(Tables(small_config()))
    tokens = micro_step(small_config()).tokens
    whole, lambdas = tables(tokens)[0]
    for before in (tokens[:, :cut], tokens[:, max(0, cut - LOOKBACK) : cut]):
        [(rest, same)] = tables(tokens[:, cut:], before)
        assert torch.equal(rest, whole[:, cut:]) and same is lambdas


def test_another_table_is_a_name_and_its_rows(monkeypatch):
    """Pairs of every other token: what a table adds is an entry of ROWS and of the config."""

    class Config(GPTConfig):
        skip_lambda_init = 0.0

        @property
        def table_rows(self):
            return {**super().table_rows, "skip": 17}

    def rows_ref(tokens, count):
        return bigram_rows_ref(tokens[:, ::2].repeat_interleave(2, dim=1), count)

    def rows(tokens, count):
        return bigram_rows(tokens[:, ::2].repeat_interleave(2, dim=1).contiguous(), count)

    monkeypatch.setitem(mix_module.ROWS, "skip", (rows_ref, rows))
    run(Config(**layers_of(3).to_dict()), tables=("bigram", "skip"))
