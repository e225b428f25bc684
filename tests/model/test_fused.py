"""The fused pass against the GPT that defines it: mean loss, losses of all positions, gradients."""

import re
from collections import Counter

import pytest
import torch

from nanofuse.bench.checks import ON_GPU
from nanofuse.kernels import residual_mix
from nanofuse.kernels.common import panel
from nanofuse.kernels.common.fp8 import E4M3, E5M2, FP8Operand
from nanofuse.model import fused as fused_module
from nanofuse.model.backends.torch_backends import SDPAttention
from nanofuse.model.config import GPTConfig
from nanofuse.model.fp8 import operands
from nanofuse.model.fp8 import precision as precision_module
from nanofuse.model.fp8.linear import ScaledMatmul, ScaledMatmulE4M3, set_fp8
from nanofuse.model.fp8.products import PlainGemm, TorchGemm
from nanofuse.model.fp8.scaling import CALIBRATED_STEPS
from nanofuse.model.fp8.shapes import product_shapes
from nanofuse.model.fused import FusedGPT
from nanofuse.model.gpt import GPT
from nanofuse.model.pieces import attention, embedding, head, mix, mlp
from nanofuse.model.providers import PRODUCTS, choices, find, in_fp8
from tests.helpers import random_model

DEVICE = "cuda" if ON_GPU else "cpu"
FEW = 2 if ON_GPU else 1  # rows of a batch where results are not compared; fewer in the interpreter
# ops that `describe` does not name
UNNAMED = ("bigram_rows", "sort_rows", "resid_lambda_grad", "weighted_rows")
FIELDS = {"sequence_len": 16, "vocab_size": 96, "window_pattern": "SL", "bigram_embed_factor": 3}
CASES = {
    "bigram": {},
    "dense": {"bigram_embed_factor": 0},
    "grouped": {"n_kv_head": 1},
    "one_layer": {"depth": 1},
    "two_layers": {"depth": 2},
    "six_layers": {"depth": 6},  # layers above the one after the middle
}


def make(depth=4, aspect=16, head_dim=32, **fields):
    """Config of width 64 and two heads at depth 4."""
    return GPTConfig.from_depth(depth, aspect * 4 // depth, head_dim, **{**FIELDS, **fields})


def pair(config, gemm, dtype=torch.float32, seed=0):
    """The same random weights in an fp32 GPT and, with activations of `dtype`, in a FusedGPT."""
    truth = random_model(config, torch.float32, seed, DEVICE).train()
    model = GPT(config, dtype, device=DEVICE)
    model.load_state_dict(truth.state_dict())
    return truth, FusedGPT(model, gemm).train()


def batch(config, rows=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, rows, config.sequence_len)
    tokens, targets = torch.randint(config.vocab_size, shape, generator=generator).to(DEVICE)
    targets[0, :5] = -1
    return tokens, targets


def change_weights(fused):
    """As an optimiser's kernels do: torch hears of it."""
    torch.autograd.graph.increment_version(list(fused.model.parameters()))


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("case", CASES)
def test_loss_and_every_gradient_in_fp32(case):
    config = make(**CASES[case])
    truth, fused = pair(config, PlainGemm())
    tokens, targets = batch(config)
    expected, named = truth(tokens, targets), dict(fused.model.named_parameters())
    (0.5 * expected).backward()
    for name, p in truth.named_parameters():
        named[name].grad.copy_(p.grad)  # gradients accumulate
        p.grad *= 2
    loss = fused(tokens, targets)
    (0.5 * loss).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, p in truth.named_parameters():
        if name == "backout_lambda" and config.n_layer < 3:
            continue  # x_mid is x: backout only scales the final norm's input, so the gradient is 0
        assert relative(named[name].grad, p.grad) < 5e-4, name


def resid_gradient(model, lambdas, tokens, targets):
    """Gradient of the resid_lambdas (L,) where they are `lambdas`."""
    weights = model.model if isinstance(model, FusedGPT) else model
    with torch.no_grad():
        weights.resid_lambdas.copy_(torch.tensor(lambdas))
    weights.zero_grad(set_to_none=False)
    model(tokens, targets).backward()
    return weights.resid_lambdas.grad.clone()


# of six layers: the first, the one above the middle, whose stream is kept, and others
SMALL_LAMBDAS = [[0.0, 1.0, 0.0, 1.0, 0.0, 1.0], [1.0, 1e-7, -0.5, -0.03, 1.0, -1e-30]]


@pytest.mark.parametrize("lambdas", SMALL_LAMBDAS, ids=str)
def test_the_gradient_of_a_resid_lambda_does_not_divide_by_it(lambdas):
    truth, fused = pair(make(depth=6), PlainGemm())
    got, exact = (resid_gradient(m, lambdas, *batch(truth.config, FEW)) for m in (fused, truth))
    print(got.tolist(), exact.tolist())
    torch.testing.assert_close(got, exact, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("provider", choices(PRODUCTS)[1:])
def test_both_ways_to_the_gradient_of_a_resid_lambda_agree(provider, monkeypatch):
    """The quotient, which holds for ordinary lambdas, and the sum, in the same backward pass."""
    try:
        gemm = find(PRODUCTS, provider).build()
    except ValueError as error:
        pytest.skip(str(error))
    config = make(depth=6, aspect=16, vocab_size=64)
    _, fused = pair(config, gemm, torch.bfloat16 if ON_GPU else torch.float32)
    summed, zero = [], torch.zeros(1, device=DEVICE)
    launch = mlp.resid_lambda_grad

    def both(*args):
        *tensors, resid_lambda, shares = args
        summed.append(launch(*tensors, zero, torch.zeros_like(shares)).sum())
        return launch(*tensors, resid_lambda, shares)

    monkeypatch.setattr(mlp, "resid_lambda_grad", both)
    quotient = resid_gradient(fused, [0.7, -0.8, 0.9, -1.1, 1.2, 0.5], *batch(config, FEW))
    assert len(summed) == 4
    assert relative(torch.stack(summed), quotient[[5, 3, 2, 1]]) < 0.02


@pytest.mark.parametrize("bad", [-100, 96, -2, 2**32 + 3])
def test_a_target_outside_of_the_vocabulary_is_nan_everywhere(bad):
    config = make(depth=1)
    truth, fused = pair(config, PlainGemm())
    tokens, targets = batch(config, FEW)
    targets[0, 7] = bad
    for model in (truth, fused):
        weight = (model if model is truth else fused.model).lm_head.weight
        losses = model.eval()(tokens, targets, reduction="none")
        assert torch.equal(losses.isnan(), torch.arange(len(losses), device=DEVICE) == 7)
        loss = model.train()(tokens, targets)
        loss.backward()
        assert loss.isnan() and weight.grad[: config.vocab_size].isnan().all()


@pytest.mark.parametrize("bad", [-1, 10**6, 2**32 + 3])
def test_a_token_outside_of_the_table_is_nan(bad):
    config = make(depth=1)
    _, fused = pair(config, PlainGemm())
    tokens, targets = batch(config, 2)
    tokens[0, 7] = bad
    losses = fused.eval()(tokens, targets, reduction="none")
    assert losses[7:16].isnan().all() and losses[16:].isfinite().all()
    loss = fused.train()(tokens, targets)
    loss.backward()
    assert loss.isnan() and fused.model.lm_head.weight.grad.isnan().any()


@pytest.mark.parametrize("gemm", [PlainGemm, TorchGemm])
def test_losses_without_gradients(gemm, monkeypatch):
    """Evaluation equals the GPT's, also in FP8 training: it uses the master weights."""
    monkeypatch.setattr(head, "EVALUATION_ROWS", 12)  # of 32: logits in three parts
    config = make()
    truth, fused = pair(config, gemm())
    tokens, targets = batch(config)
    fused.eval()
    losses = fused(tokens, targets, reduction="none")
    torch.testing.assert_close(losses, truth(tokens, targets, reduction="none").detach())
    assert losses.shape == (32,) and (losses[:5] == 0).all()
    torch.testing.assert_close(fused(tokens, targets), truth(tokens, targets).detach())


@pytest.mark.parametrize(
    ("provider", "gradients"),
    [*((name, E5M2) for name in choices(PRODUCTS)[1:]),
     *((name, E4M3) for name in choices(PRODUCTS)[1:] if in_fp8(name))],
)  # fmt: skip
def test_gradients_are_as_close_as_the_baseline_in_the_same_precision(provider, gradients):
    """Errors at most twice those of the eager model with the products of model/fp8/linear.py, which
    takes each FP8 scale from the tensor; bf16 on a GPU."""
    try:
        gemm = find(PRODUCTS, provider).build()
    except ValueError as error:
        pytest.skip(str(error))
    gemm.gradients = gradients
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    config = make(depth=2, aspect=32, vocab_size=128)
    truth, fused = pair(config, gemm, dtype)
    if gemm.fp8:
        formats = {name: s.dtype for name, s in fused.precision.scaling._scalings.items()}
        kinds = [name for name in formats if name.startswith("grad_")]
        assert len(kinds) == 8 and {formats.pop(name) for name in kinds} == {gradients}
        assert set(formats.values()) == {E4M3} and list(formats)[-1] == "activated.1"
    baseline = GPT(config, dtype, device=DEVICE).train()
    baseline.load_state_dict(truth.state_dict())
    product = ScaledMatmul if gradients == E5M2 else ScaledMatmulE4M3
    assert set_fp8(baseline, product if gemm.fp8 else None) == (13 if gemm.fp8 else 0)
    tokens, targets = batch(config)
    exact, theirs = (model(tokens, targets, reduction="none") for model in (truth, baseline))
    for losses in (exact, theirs):
        (losses.sum() / (targets >= 0).sum()).backward()
    ours, state = fused.losses(tokens, targets)
    fused.backward(state, torch.ones((), device=DEVICE))
    assert relative(ours, exact) < 2 * relative(theirs, exact) + 0.01
    ours, theirs = (dict(m.named_parameters()) for m in (fused.model, baseline))
    for name, p in truth.named_parameters():
        if p.numel() > 16:
            error, allowed = (relative(m[name].grad.float(), p.grad) for m in (ours, theirs))
            print(f"{name}: fused {error:.3f}, baseline {allowed:.3f}")
            assert error < 2 * allowed + 0.01, name
    # a single number's error is too random to compare: all lambdas together
    scalars = [name for name, p in truth.named_parameters() if p.numel() <= 16]
    ours, theirs, exact = (
        torch.cat([m[name].grad.float().flatten() for name in scalars])
        for m in (ours, theirs, dict(truth.named_parameters()))
    )
    error, allowed = relative(ours, exact), relative(theirs, exact)
    print(f"lambdas: fused {error:.3f}, baseline {allowed:.3f}")
    assert error < 2 * allowed + 0.01


def test_evaluation_leaves_the_scales_alone():
    config = make(depth=1, aspect=16, vocab_size=128)
    _, fused = pair(config, TorchGemm(), torch.bfloat16 if ON_GPU else torch.float32)
    fused(*batch(config, FEW)).backward()
    scaling = fused.precision.scaling
    before = [x.clone() for x in (scaling.scale, scaling.amax, scaling.history)]
    state = scaling.calibrating, fused.operands.steps
    fused.eval()(*batch(config, FEW, seed=2))
    after = scaling.scale, scaling.amax, scaling.history
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert (scaling.calibrating, fused.operands.steps) == state


@pytest.mark.parametrize("gemm", [PlainGemm, TorchGemm])
def test_graphs_are_recorded_after_a_pass_and_the_last_calibration(gemm, monkeypatch):
    """Also in a process that resumes a run and has not compiled any kernel yet."""
    monkeypatch.setattr(operands, "CALIBRATED_STEPS", 1)
    config = make(depth=1, aspect=8, vocab_size=128)
    events = []

    class Recorder:
        def __init__(self, fused, tokens, targets):
            events.append("record")
            self.loss, self.backward = fused.loss, fused.backward

    monkeypatch.setattr(fused_module, "GraphedPass", Recorder)

    def steps(fused, count):
        fused.graphs = True
        for _ in range(count):
            for _ in range(2):
                fused.operands.follow()
                calibrating = fused.precision.scaling.calibrating
                fused(*batch(config, FEW)).backward()
                events.append("calibrate" if calibrating else "pass")
            change_weights(fused)
        taken = events.copy()
        events.clear()
        return taken

    dtype = torch.bfloat16 if ON_GPU else torch.float32
    fused, again = (pair(config, gemm(), dtype)[1] for _ in range(2))
    first = ["calibrate", "pass"] if fused.precision.gemm.fp8 else ["pass"]
    taken = steps(fused, 2 if fused.precision.gemm.fp8 else 1)
    assert taken == [*first, "record", "pass"] + ["pass"] * fused.precision.gemm.fp8
    again.operands.load_state_dict(fused.operands.state_dict())
    assert steps(again, 1) == ["pass", "record", "pass"]


class CountingGemm:
    """A provider that counts its products and asserts that operands are FP8Operands, or not.
    `shapes` are (kind, N, n, k) of the products for weights (n, k)."""

    def __init__(self, gemm):
        self.gemm, self.fp8, self.keep = gemm, gemm.fp8, gemm.keep
        self.gradients = gemm.gradients
        self.gradients, self.calls, self.shapes = gemm.gradients, Counter(), set()

    def _count(self, kind, a, b):
        assert isinstance(a, FP8Operand) == isinstance(b, FP8Operand) == self.fp8
        self.calls[kind] += 1
        (rows, other), of_b = (x.transposed.t().shape if self.fp8 else x.shape for x in (a, b))
        of_weight = of_b if kind != "weight_grad" else (other, of_b[1])
        self.shapes.add((kind, rows, *of_weight))

    def forward(self, x, w):
        self._count("forward", x, w)
        return self.gemm.forward(x, w)

    def input_grad(self, g, w):
        self._count("input_grad", g, w)
        return self.gemm.input_grad(g, w)

    def weight_grad(self, g, x, out):
        self._count("weight_grad", g, x)
        self.gemm.weight_grad(g, x, out)


@pytest.mark.parametrize("provider", choices(PRODUCTS)[1:])
def test_every_kernel_and_every_product_runs(provider, monkeypatch):
    """No fast path is silently off: counts the launcher calls of one micro-step after calibration
    and of an evaluation; and `describe` names every op that runs."""
    try:
        gemm, calls = CountingGemm(find(PRODUCTS, provider).build()), Counter()
    except ValueError as error:
        pytest.skip(str(error))
    config = make(depth=2, aspect=32, vocab_size=128)
    _, fused = pair(config, gemm, torch.bfloat16 if ON_GPU else torch.float32)

    def counted(name, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    expected = {
        "embed_smear_fwd": 1, "embed_smear_bwd": 1,
        "residual_mix_fwd": 2 * 2 + 1, "residual_mix_bwd": 2 * 2 + 1,
        "rotary_qk_norm_fwd": 2, "rotary_qk_norm_bwd": 2,
        "gate_logits_fwd": 1, "gate_logits_bwd": 1,  # of the layers with a value embedding
        "quantize": 2 + 1,  # attention outputs, and the gradient where backout reads the stream
        "linear_relu_squared_fwd": 2, "linear_relu_squared_bwd": 2,
        "linear_softcap_cross_entropy_fwd": 1, "linear_softcap_cross_entropy_dx": 1,
        "linear_softcap_cross_entropy_dw": 1, "weighted_rows": 1,
        "residual_gradients": 2,  # of backout, and of all layers
        "resid_lambda_grad": 1,  # of every layer but the first and the one above the middle
        "embedding_grad": 3, "sort_rows": 2,  # of tokens and of bigram rows
        "bigram_rows": 1,
    }  # fmt: skip
    evaluated = {"softcap_cross_entropy_fwd": 1}
    for module in (fused_module, precision_module, attention, embedding, head, mix, mlp):
        for name in (expected | evaluated).keys() & vars(module).keys():
            monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    monkeypatch.setitem(mix.ROWS, "bigram", (mix.bigram_rows_ref, mix.bigram_rows))
    fused.precision.scaling.calibrate(False)
    fused(*batch(config, FEW)).backward()
    if not gemm.fp8:
        del expected["quantize"]
    assert dict(calls) == expected
    assert fused.describe(64).split("; off: ")[1] == ("none" if gemm.fp8 else "quantize (no FP8)")
    for name in {re.sub("_(fwd|bwd|dx|dw)$", "", name) for name in expected}:
        assert name in fused.describe(64).split("; off:")[0] or name in UNNAMED, name
    calls.clear()
    fused.eval()(*batch(config, FEW))
    del expected["linear_softcap_cross_entropy_fwd"]
    forward = [name for name in expected if name.endswith("_fwd")] + ["bigram_rows"]
    assert calls == evaluated | {name: expected[name] for name in forward}
    assert gemm.calls == {"forward": 3 * 2, "input_grad": 3 * 2 + 1, "weight_grad": 4 * 2 + 1}
    listed = product_shapes(config, FEW * config.sequence_len)
    assert gemm.shapes == {(x.kind, x.positions, x.n, x.k) for x in listed if x.by_provider}


@pytest.mark.parametrize("gemm", [TorchGemm, PlainGemm])
def test_the_log_names_kernels_that_contain_a_product(gemm, monkeypatch):
    """In FP8, of a micro-step's positions."""
    fused, asked = FusedGPT(GPT(make(depth=1), device=DEVICE), gemm()), []

    def one(shape, head_dim, device):
        asked.append((shape.positions, head_dim, device.type))
        return "linear_and_more" if (shape.weight, shape.kind) == ("qkv", "forward") else None

    monkeypatch.setattr(fused_module, "in_one", one)
    said = fused.describe(64)
    assert ("linear_and_more" in said.split("; off: ")[0]) == gemm.fp8
    assert set(asked) == ({(64, 32, DEVICE)} if gemm.fp8 else set())


def test_a_width_that_the_kernels_do_not_take_is_named():
    model = GPT(make(depth=1, aspect=10, head_dim=20), device=DEVICE)
    with pytest.raises(ValueError, match="width that is a multiple of 16, not 40; .*head_dim"):
        FusedGPT(model, PlainGemm())


def test_a_loss_is_differentiated_once():
    _, fused = pair(make(depth=1), PlainGemm())
    loss = fused(*batch(fused.model.config, FEW))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


@pytest.mark.cuda
@pytest.mark.parametrize("provider", choices(PRODUCTS)[1:])
def test_cuda_graphs_change_nothing(provider):
    """Losses and gradients of two batches, bit for bit (SDPA's math backend is deterministic)."""
    try:
        gemm = find(PRODUCTS, provider).build()
    except ValueError as error:
        pytest.skip(str(error))
    config = make(depth=4, aspect=64, vocab_size=128)
    results = []
    for graphs in (False, True):
        model = random_model(config, torch.bfloat16, device=DEVICE)
        model.attention = SDPAttention(deterministic=True)
        fused = FusedGPT(model, gemm, graphs).train()
        for _ in range(CALIBRATED_STEPS):
            fused(*batch(config)).backward()
            change_weights(fused)
        assert not fused.precision.scaling.calibrating
        for p in model.parameters():
            p.grad.zero_()
        losses = []
        for seed in (5, 6):
            losses.append(fused(*batch(config, seed=seed)))
            (0.5 * losses[-1]).backward()
        assert (fused.graphed is not None) == graphs
        results.append([*losses, *(p.grad for p in model.parameters())])
    for eager, graphed in zip(*results, strict=True):
        assert torch.equal(eager, graphed)


@pytest.mark.cuda
def test_a_graphed_loss_must_be_differentiated_before_the_next():
    fused = FusedGPT(random_model(make(), torch.bfloat16, device=DEVICE), PlainGemm(), True).train()
    data = batch(fused.model.config)
    fused(*data).backward()
    change_weights(fused)
    first = fused(*data)
    fused(*data).backward()
    with pytest.raises(RuntimeError, match="before the next"):
        first.backward()


@pytest.mark.cuda
def test_kernels_for_hopper_are_as_accurate_as_the_others(monkeypatch):
    """Of a pass in FP8 with heads of 128: errors of the loss and of every matrix's gradient."""
    config = make(aspect=64, head_dim=128, sequence_len=64)
    if not panel.takes("", torch.device(DEVICE), 128, config.n_embd, config.n_embd):
        pytest.skip("kernels for a Hopper GPU alone")
    calls, errors = [], []
    for name in ("linear_rotary_qk_norm_fwd", "linear_residual_norm_fwd"):

        def counted(*args, name=name, run=getattr(attention, name)):
            calls.append(name)
            return run(*args)

        monkeypatch.setattr(attention, name, counted)
    for hopper in (True, False):
        if not hopper:
            assert len(calls) == 2 * config.n_layer
            monkeypatch.setattr(attention, "takes", lambda *args: False)
            monkeypatch.setattr(attention, "takes_norm", lambda *args: False)
            monkeypatch.setattr(residual_mix, "takes", lambda *args: False)
        truth, fused = pair(config, TorchGemm(), torch.bfloat16)
        data = batch(config)
        losses = [model(*data) for model in (fused, truth)]
        for loss in losses:
            loss.backward()
        found = {"loss": relative(*(loss.detach().float() for loss in losses))}
        pairs = zip(fused.model.named_parameters(), truth.parameters(), strict=True)
        found |= {n: relative(p.grad.float(), q.grad) for (n, p), q in pairs if p.dim() == 2}
        errors.append(found)
    assert len(calls) == 2 * config.n_layer
    for name, error in errors[0].items():
        assert error <= 1.2 * errors[1][name] + 5e-3, name
