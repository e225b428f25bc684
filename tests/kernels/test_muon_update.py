import numpy as np
import pytest
import torch

from nanofuse.bench.checks import DTYPES, ON_GPU, assert_accurate, assert_fp8, same_bits
from nanofuse.kernels.common.fp8 import E4M3, FP8Operand, Scaling
from nanofuse.kernels.muon_momentum import muon_momentum
from nanofuse.kernels.muon_update import (
    WeightCopies,
    muon_apply,
    muon_factors,
    muon_hyper,
    muon_update,
    muon_update_ref,
    reduce_variance_ref,
    second_moment_shape,
)
from nanofuse.kernels.newton_schulz import muon_plus_ref, newton_schulz_ref, orthogonalize
from tests.train.optim.reference import POLAR_EXPRESS

COMPUTE = torch.bfloat16 if ON_GPU else torch.float32  # of the reference's products
SHAPES = [(3, 40, 16), (2, 17, 50), (2, 32, 32), (4, 5, 12), (1, 1, 24), (2, 24, 1), (1, 67, 131)]
MODEL_SHAPES = [(2, r, c) for w in (256, 768, 1024) for r, c in ((w, w), (4 * w, w), (w, 4 * w))]
SCHEDULE = [(0.02, 0.85, 0.3), (0.01, 0.9, 0.0), (0.03, 0.97, 1.0)]  # lr, momentum, decay


ITERATION = "nanofuse.kernels.muon_update.orthogonalize"


@pytest.fixture(autouse=True)
def quick_iteration(monkeypatch):
    """In the interpreter, an fp32 reference replaces the iteration, which takes seconds there."""

    def iterate(z, sigma):
        x = z * sigma[:, None, None]
        for a, b, c in POLAR_EXPRESS:
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x, x.square().sum(-1 if x.size(1) >= x.size(2) else -2)

    if not ON_GPU:
        monkeypatch.setattr(ITERATION, iterate)
        monkeypatch.setattr("nanofuse.kernels.muon_update.newton_schulz", newton_schulz_ref)


class State:
    """Parameter, momentum and second moment of a stack; `draw` makes gradients."""

    def __init__(self, shape, device, dtype=torch.float32, size=1.0):
        self.generator = torch.Generator().manual_seed(0)
        self.shape, self.device, self.dtype, self.size = shape, device, dtype, size
        self.param = self.draw() * (0.02 / size)
        self.start = self.param.clone()
        self.momentum = torch.zeros_like(self.param)
        self.second = torch.zeros(second_moment_shape(shape), dtype=dtype, device=device)

    def draw(self):
        """Normal values whose rows differ in scale."""
        x = torch.randn(self.shape, generator=self.generator) * self.size
        x *= torch.logspace(-2, 2, self.shape[1])[:, None]
        return x.to(self.device, self.dtype)

    @property
    def tensors(self):
        return self.param, self.draw(), self.momentum, self.second

    @property
    def change(self):
        return self.param - self.start


def steps_of_three(shape, device, schedule=SCHEDULE, equilibration="row", muon_plus=True, size=1.0):
    """Three steps by the kernels, by the reference in the same dtype, and by the fp64 reference."""
    ours, torch_, truth = (State(shape, device, size=size) for _ in range(3))
    truth.dtype = torch.float64
    truth.param, truth.start, truth.momentum, truth.second = (
        x.double() for x in (truth.param, truth.start, truth.momentum, truth.second)
    )
    options = 0.9, equilibration, muon_plus
    for numbers in schedule:
        muon_update(*ours.tensors, muon_hyper(*numbers, device), *options)
        muon_update_ref(*torch_.tensors, *numbers, *options, COMPUTE)
        muon_update_ref(*truth.tensors, *numbers, *options, torch.float64)
    return ours, torch_, truth


def assert_same_steps(shape, *args):
    for name in ("change", "momentum", "second"):
        got, same_dtype, exact = (getattr(x, name) for x in steps_of_three(shape, *args))
        assert_accurate(f"{name} {shape}", got, same_dtype, exact)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_three_steps_are_those_of_the_reference(shape, device):
    assert_same_steps(shape, device)


@pytest.mark.parametrize("shape", [(1, 5, 12), (1, 7, 3)], ids=str)
def test_one_step_with_the_kernels_of_the_iteration(shape, device, monkeypatch):
    monkeypatch.setattr(ITERATION, orthogonalize)
    assert_same_steps(shape, device, SCHEDULE[:1])


@pytest.mark.parametrize("equilibration", ["row", "col", "none"])
@pytest.mark.parametrize("shape", [(2, 20, 9), (2, 9, 20)], ids=str)
def test_equilibrations_without_muon_plus(shape, equilibration, device):
    assert_same_steps(shape, device, SCHEDULE, equilibration, False)


@pytest.mark.parametrize("shape", [(2, 20, 9), (2, 9, 20)], ids=str)
def test_column_equilibration_with_muon_plus(shape, device):
    assert_same_steps(shape, device, SCHEDULE, "col", True)


@pytest.mark.parametrize("size", [1e-7, 1e-12])
@pytest.mark.parametrize("equilibration", ["row", "col", "none"])
@pytest.mark.parametrize("muon_plus", [True, False])
def test_gradients_below_the_floors(size, equilibration, muon_plus, device):
    """Rows on both sides of the floor, and all below it."""
    for shape in ((2, 20, 9), (2, 9, 20)):
        assert_same_steps(shape, device, SCHEDULE, equilibration, muon_plus, size)


@pytest.mark.cuda
@pytest.mark.parametrize("shape", MODEL_SHAPES, ids=str)
def test_three_steps_at_model_shapes(shape, device):
    assert_same_steps(shape, device)


def unit_rows(g, m):
    """z, norms and new momentum by their formulas, in the dtype of g and m, with mu = 0.9."""
    m = m.lerp(g, 0.1)
    u = g.lerp(m, 0.9)
    norms = torch.linalg.vector_norm(u, dim=-1)
    return torch.nan_to_num(u / norms[..., None]), norms, m


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 31, 17), (3, 5, 129), (1, 2, 4097), (1, 257, 3)], ids=str)
def test_rows_before_the_iteration(shape, dtype, grad_dtype, device):
    state = State(shape, device)
    g, m = state.draw().to(grad_dtype), state.draw()
    zero = shape[1] // 2
    g[0, zero], m[0, zero] = 0, 0
    exact, same_dtype = (unit_rows(g.to(wide), m.to(wide)) for wide in (torch.float64, m.dtype))
    z, norms = muon_momentum(g, m, muon_hyper(0.0, 0.9, 0.0, device), dtype)
    assert z.dtype == dtype and not z[0, zero].any() and norms[0, zero] == 0
    assert_accurate("z", z, same_dtype[0].to(dtype), exact[0])
    assert_accurate("norms", norms, same_dtype[1], exact[1])
    assert_accurate("momentum", m, same_dtype[2], exact[2])


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_tiny_and_huge_gradients_give_unit_rows(scale, device):
    state = State((1, 20, 33), device)
    g = state.draw() * scale
    hyper = muon_hyper(0.0, 0.9, 0.0, device)
    z, _ = muon_momentum(g, torch.zeros_like(g), hyper, torch.float16)
    norms = torch.linalg.vector_norm(z.float(), dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-3, atol=0)


def test_the_factors_are_muon_plus_and_variance_reduction(device):
    for shape, size in (((2, 70, 30), 1), ((2, 30, 70), 1), ((1, 1, 1), 1), ((2, 7, 3), 1e-9)):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(shape, generator=generator).to(device) * size
        second = torch.rand(second_moment_shape(shape), generator=generator).to(device)
        for muon_plus in (True, False):
            moments = [second.clone(), second.clone(), second.double()]
            sums = x.square().sum(-1 if shape[1] >= shape[2] else -2)
            f = muon_factors(sums, moments[0], shape, 0.9, muon_plus)
            u = x * f.view(moments[0].shape)
            same_dtype, exact = (
                reduce_variance_ref(muon_plus_ref(y) if muon_plus else y, s, 0.9)
                for y, s in ((x, moments[1]), (x.double(), moments[2]))
            )
            assert_accurate("u", u, same_dtype, exact)
            assert_accurate("second moment", *moments)


@pytest.mark.parametrize("shape", [(2, 20, 12), (2, 12, 20)], ids=str)
def test_zero_gradients_only_decay(shape, device):
    state = State(shape, device)
    for _ in range(2):
        grad = torch.zeros_like(state.param)
        hyper = muon_hyper(0.1, 0.9, 0.5, device)
        muon_update(state.param, grad, state.momentum, state.second, hyper)
    lr = 0.1 * max(1.0, shape[1] / shape[2]) ** 0.5
    torch.testing.assert_close(state.param, state.start * (1 - 0.5 * lr) ** 2)
    assert not state.momentum.any() and not state.second.any()


def copies(shape, device):
    """WeightCopies whose scales differ between the matrices."""
    n = shape[0]
    scale = torch.arange(1, n + 1, dtype=torch.float32, device=device) * 8
    scaling = Scaling(E4M3, scale, 1 / scale, torch.zeros(n, device=device))
    return WeightCopies.empty(shape, device, bf16=True, scaling=scaling)


@pytest.mark.parametrize("shape", [(3, 80, 144), (2, 144, 48), (2, 16, 32)], ids=str)
def test_copies_are_the_new_weights_rounded(shape, device):
    state, weights = State(shape, device), copies(shape, device)
    hyper = muon_hyper(*SCHEDULE[0], device)
    muon_update(*state.tensors, hyper, weights=weights)
    assert torch.equal(weights.bf16, state.param.bfloat16())
    for n in range(shape[0]):
        parts = [x[n : n + 1] for x in (weights.scaling.scale, weights.scaling.inverse_scale)]
        scaling = Scaling(E4M3, *parts, weights.scaling.amax[n : n + 1])
        operand = FP8Operand(weights.fp8.data[n], weights.fp8.transposed[n], parts[1])
        assert_fp8(f"matrix {n}", operand, state.param[n], scaling)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(3, 32, 16), (3, 16, 32)], ids=str)
def test_nan_in_one_matrix_stays_in_it(shape, bad, device):
    state, weights = State(shape, device), copies(shape, device)
    _, grad, momentum, second = state.tensors
    grad[1, 3, 4] = bad
    hyper = muon_hyper(*SCHEDULE[0], device)
    muon_update(state.param, grad, momentum, second, hyper, weights=weights)
    assert state.param[1].isnan().any() and weights.scaling.amax[1].isnan()
    for x in (state.param, momentum, second, weights.bf16, weights.scaling.amax):
        assert x[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clear", [True, False])
@pytest.mark.parametrize("shape", [(2, 20, 40), (1, 2, 4100)], ids=str)
def test_the_gradient_is_cleared_only_when_asked(shape, clear, dtype, device):
    state, twin = State(shape, device), State(shape, device)
    grad = state.draw().to(dtype)
    before = grad.clone()
    hyper = muon_hyper(*SCHEDULE[0], device)
    for target, clear_grad in ((twin, False), (state, clear)):
        z, _ = muon_momentum(grad, target.momentum, hyper, dtype, clear_grad=clear_grad)
        target.z = z
    assert torch.equal(grad, torch.zeros_like(grad) if clear else before)
    assert torch.equal(state.z, twin.z) and torch.equal(state.momentum, twin.momentum)


def test_a_step_may_be_left_out(device):
    """Where `take` is 0 nothing changes, whatever the gradient; else it is as without."""
    state, twin = State((2, 16, 32), device), State((2, 16, 32), device)
    hyper, grad = muon_hyper(*SCHEDULE[0], device), state.draw()
    muon_update(state.param, grad, state.momentum, state.second, hyper)
    take = torch.ones(1, device=device)
    muon_update(twin.param, grad, twin.momentum, twin.second, hyper, take=take)
    kept = [(state.param, twin.param), (state.momentum, twin.momentum), (state.second, twin.second)]
    assert state.change.any() and all(torch.equal(a, b) for a, b in kept)
    grad[0, 1, 2] = torch.nan
    muon_update(twin.param, grad, twin.momentum, twin.second, hyper, take=take.zero_())
    assert all(torch.equal(a, b) for a, b in kept)


def test_two_updates_give_the_same_bits(device):
    def run():
        state, weights = State((2, 64, 48), device), copies((2, 64, 48), device)
        for numbers in SCHEDULE[:2]:
            hyper = muon_hyper(*numbers, device)
            muon_update(*state.tensors, hyper, weights=weights)
        fp8 = weights.fp8.data, weights.fp8.transposed
        return state.param, state.momentum, state.second, weights.bf16, *fp8, weights.scaling.amax

    same_bits(run)


def test_numbers_are_read_from_the_device(device):
    first, second = State((1, 16, 16), device), State((1, 16, 16), device)
    hyper = muon_hyper(0.0, 0.0, 0.0, device)
    hyper.copy_(muon_hyper(*SCHEDULE[0], "cpu"))
    tensors = first.tensors
    before = tensors[1].clone()
    muon_update(*tensors, hyper)
    assert torch.equal(tensors[1], before)  # the gradient, unless asked otherwise
    muon_update(*second.tensors, muon_hyper(*SCHEDULE[0], device))
    assert torch.equal(first.param, second.param) and first.change.any()


def test_what_does_not_fit_is_refused(device):
    shape = (2, 32, 16)
    hyper = muon_hyper(*SCHEDULE[0], device)

    def refused(match, index=None, tensor=None, hyper=hyper, **kwargs):
        tensors = list(State(shape, device).tensors)
        if index is not None:
            tensors[index] = tensor
        with pytest.raises(ValueError, match=match):
            muon_update(*tensors, hyper, **kwargs)

    x = torch.zeros(shape, device=device)
    for index in range(3):
        refused("one shape", index, x[:1])
        refused("contiguous", index, torch.zeros(2, 16, 32, device=device).mT)
    refused("second_moment_shape", 3, torch.zeros(2, 1, 16, device=device))
    refused("must be fp32", 0, x.double())
    refused("fp32 or bf16", 1, x.double())
    refused("muon_hyper", hyper=hyper[:2])
    refused("unknown equilibration", equilibration="rows")
    refused("bf16 copy", weights=WeightCopies.empty((2, 32, 15), device, bf16=True))
    scaling = Scaling.from_bound(1.0, E4M3, device)
    refused("one scale and one amax", weights=WeightCopies.empty(shape, device, scaling=scaling))
    weights = copies(shape, device)
    unaligned = torch.zeros(x.numel() + 1, device=device)[1:].view(shape)
    refused("param must start at a multiple of 16 bytes", 0, unaligned, weights=weights)
    few = Scaling(E4M3, weights.scaling.scale, weights.scaling.inverse_scale, torch.zeros(1))
    refused("one amax per matrix", weights=WeightCopies(None, weights.fp8, few))
    other = copies((2, 16, 32), device)
    refused(r"\(N, C, R\)", weights=WeightCopies(None, other.fp8, other.scaling))
    shape = (2, 24, 16)
    refused("multiples of 16", weights=copies(shape, device))


@pytest.mark.cuda
@pytest.mark.large
def test_more_than_two_to_the_31_elements(device):
    shape = (2050, 1024, 1024)
    state = State((1, *shape[1:]), device)
    hyper = muon_hyper(*SCHEDULE[0], device)
    grad, momentum, param = (torch.zeros(shape, device=device) for _ in range(3))
    one = state.draw(), state.draw(), state.draw()
    for whole, last in zip((grad, momentum, param), one, strict=True):
        whole[-1:] = last
    z, norms = muon_momentum(grad, momentum, hyper, torch.bfloat16, clear_grad=True)
    z1, norms1 = muon_momentum(one[0], one[1], hyper, torch.bfloat16)
    assert torch.equal(z[-1:], z1) and torch.equal(norms[-1:], norms1)
    assert torch.equal(momentum[-1:], one[1]) and not grad[-1].any()
    assert not z[-2].any() and not momentum[-2].any()
    del grad, momentum
    weights, single = copies(shape, device), copies((1, *shape[1:]), device)
    weights.scaling.scale.fill_(8.0)
    muon_apply(param, z, torch.ones(shape[:2], device=device), hyper, weights)
    muon_apply(one[2], z1, torch.ones(1, 1024, device=device), hyper, single)
    assert torch.equal(param[-1:], one[2]) and torch.equal(weights.bf16[-1:], single.bf16)
    for name in ("data", "transposed"):
        whole, last = (getattr(x.fp8, name)[-1].view(torch.uint8) for x in (weights, single))
        assert torch.equal(whole, last)
    assert not param[-2].any() and weights.scaling.amax[-1] == single.scaling.amax[0]


@pytest.mark.cuda
def test_a_cuda_graph_follows_its_numbers(device):
    shape = (2, 256, 128)
    state, twin = State(shape, device), State(shape, device)
    hyper, grad = muon_hyper(*SCHEDULE[0], device), torch.zeros(shape, device=device)

    def update():
        muon_update(state.param, grad, state.momentum, state.second, hyper)

    hyper.zero_()
    update()  # compiles; zero gradients and lr leave the state alone
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update()
    for numbers in SCHEDULE:
        grad.copy_(state.draw())
        hyper.copy_(muon_hyper(*numbers, "cpu"))
        graph.replay()
        muon_update(*twin.tensors, muon_hyper(*numbers, device))
    assert torch.equal(state.param, twin.param) and state.change.any()


def step_in_numpy(p, g, m, s, lr, mu, wd, beta2, eq, plus):
    """One Muon step for one matrix in double precision, written out from docs/recipe.md."""
    rows, cols = p.shape
    m = mu * m + (1 - mu) * g
    x = (1 - mu) * g + mu * m
    frobenius = np.sqrt((x**2).sum())
    if eq == "row":
        norms = np.sqrt((x**2).sum(1, keepdims=True))
        x = x * (frobenius / np.sqrt(rows)) / np.maximum(norms, 1e-6)
    elif eq == "col":
        norms = np.sqrt((x**2).sum(0, keepdims=True))
        x = x * (frobenius / np.sqrt(cols)) / np.maximum(norms, 1e-6)
    x = x / (1.01 * np.sqrt((x**2).sum()) + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    if plus:
        x = x * np.sqrt(min(rows, cols)) / np.maximum(np.sqrt((x**2).sum()), 1e-6)
    norm = np.sqrt((x**2).sum())
    mean_square = (x**2).mean(1, keepdims=True) if rows >= cols else (x**2).mean(0, keepdims=True)
    s = beta2 * s + (1 - beta2) * mean_square
    u = x / np.sqrt(np.maximum(s, 1e-10))
    u = u * norm / np.maximum(np.sqrt((u**2).sum()), 1e-10)
    lr = lr * np.sqrt(max(1, rows / cols))
    return p - lr * u - lr * wd * p * (u * p >= 0), m, s


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 17, 5), (2, 5, 17), (4, 2, 12)])
@pytest.mark.parametrize("eq", ["row", "col", "none"])
@pytest.mark.parametrize("plus", [True, False])
@pytest.mark.parametrize("size", [1.0, 1e-7, 1e-12, 0.0])
def test_three_steps_equal_double_precision_numpy(shape, eq, plus, size):
    generator = torch.Generator().manual_seed(0)

    def draw():
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    p, m = draw(), torch.zeros(shape, dtype=torch.float64)
    s = torch.zeros(second_moment_shape(shape), dtype=torch.float64)
    expected = [[x.numpy().copy() for x in (p[i], m[i], s[i])] for i in range(shape[0])]
    for mu, lr, wd in ((0.85, 0.02, 0.3), (0.9, 0.01, 0.0), (0.97, 0.1, 1.0)):
        g = draw() * size
        muon_update_ref(p, g, m, s, lr, mu, wd, 0.9, eq, plus)
        for i, (pi, mi, si) in enumerate(expected):
            expected[i] = step_in_numpy(pi, g[i].numpy(), mi, si, lr, mu, wd, 0.9, eq, plus)
    for i in range(shape[0]):
        for got, want in zip((p, m, s), expected[i], strict=True):
            np.testing.assert_allclose(got[i].numpy(), want, rtol=1e-8, atol=1e-10 * size)


def test_update_norm_is_muon_plus_times_lr():
    p = torch.randn(2, 12, 20)
    before, moment = p.clone(), torch.zeros(2, 1, 20)
    muon_update_ref(p, torch.randn(2, 12, 20), torch.zeros(2, 12, 20), moment, 0.5, 0.9, 0.0)
    norms = torch.linalg.matrix_norm(before - p)
    torch.testing.assert_close(norms, torch.full_like(norms, 0.5 * 12**0.5))


def test_decay_only_where_update_and_weight_agree():
    torch.manual_seed(0)
    p, g = torch.randn(1, 6, 6), torch.randn(1, 6, 6)
    plain, decayed = p.clone(), p.clone()
    for target, wd in ((plain, 0.0), (decayed, 0.5)):
        muon_update_ref(target, g, torch.zeros_like(p), torch.zeros(1, 6, 1), 0.1, 0.9, wd)
    agree = (p - plain) * p >= 0
    assert agree.any() and not agree.all()
    torch.testing.assert_close((plain - decayed)[agree], 0.1 * 0.5 * p[agree])
    assert torch.equal(plain[~agree], decayed[~agree])


def test_gradient_is_left_alone():
    g = torch.randn(1, 4, 4)
    before = g.clone()
    muon_update_ref(
        torch.randn(1, 4, 4), g, torch.zeros(1, 4, 4), torch.zeros(1, 4, 1), 0.1, 0.9, 0.1
    )
    assert torch.equal(g, before)
