import math
from dataclasses import replace

import pytest
import torch

from nanofuse.bench.cases.tiles import CASES
from nanofuse.bench.checks import (
    DTYPES,
    ON_GPU,
    assert_accurate,
    assert_fp8,
    relative_error,
    same_bits,
)
from nanofuse.kernels.common.fp8 import E4M3, E5M2, Scaling
from nanofuse.kernels.common.tuning import forced
from nanofuse.kernels.linear_relu_squared import LinearTile, plain_name
from nanofuse.kernels.linear_softcap_cross_entropy import (
    OP,
    exponent_shift,
    linear_softcap_cross_entropy,
    linear_softcap_cross_entropy_dw,
    linear_softcap_cross_entropy_dx,
    linear_softcap_cross_entropy_fwd,
    linear_softcap_cross_entropy_ref,
    weighted_rows,
)
from nanofuse.kernels.quantize import quantize, quantize_ref
from nanofuse.kernels.softcap_cross_entropy import softcap_cross_entropy_ref, softcap_ref

ROWS, WIDTH, VOCAB, PADDED = 19, 24, 127, 128
# the interpreter's dot is slow; a GPU takes the tuner's sizes
SMALL = LinearTile(64, 64, 64, warps=8, stages=3)
FP8_SHAPES = [(16, 16, 16, 16), (48, 32, 80, 77), (80, 48, 144, 144)]  # N, C, V, vocabulary


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def small_tiles():
    if ON_GPU:
        yield
    else:
        with forced(OP, SMALL), forced(plain_name(OP, torch.bfloat16), SMALL):
            yield


def case(dtype, device, rows=ROWS, width=WIDTH, padded=PADDED, vocab=VOCAB):
    x = torch.randn(rows, width, device=device).to(dtype)
    weight = torch.randn(padded, width, device=device).to(dtype)
    targets = torch.randint(vocab, (rows,), device=device)
    targets[1::8] = -1
    return x, weight, targets


def run(op, x, weight, *arguments, **options):
    """Loss and both gradients, for an upstream gradient of -0.7."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = op(x, weight, *arguments, **options)
    (-0.7 * loss).backward()
    return loss.detach(), x.grad, weight.grad


def check(x, weight, targets, vocab, **options):
    reference = linear_softcap_cross_entropy_ref
    reduction = options.get("reduction", "mean")
    exact = run(reference, x.double(), weight.double(), targets, vocab, reduction=reduction)
    torch_ = run(reference, x, weight, targets, vocab, reduction=reduction)
    got = run(linear_softcap_cross_entropy, x, weight, targets, vocab, **options)
    floor = 5e-6 if ON_GPU else 1e-6  # see test_softcap_cross_entropy
    for name, *tensors in zip(("loss", "dx", "dw"), got, torch_, exact, strict=True):
        assert_accurate(name, *tensors, floor if x.dtype == torch.float32 else 1e-4)


@pytest.mark.parametrize("chunk_rows", [1, 8, 18, 19, 32])
def test_chunks(chunk_rows, device):
    check(
        *case(torch.float32, device, rows=ROWS if chunk_rows > 1 else 3),
        VOCAB,
        chunk_rows=chunk_rows,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions_and_dtypes(reduction, dtype, device):
    check(*case(dtype, device), VOCAB, chunk_rows=8, reduction=reduction)


def test_two_runs_give_the_same_bits(device):
    inputs = case(torch.float32, device)
    same_bits(lambda: run(linear_softcap_cross_entropy, *inputs, VOCAB, chunk_rows=8))


def test_without_gradient_the_loss_is_the_same(device):
    x, weight, targets = case(torch.float32, device)
    loss, *_ = run(linear_softcap_cross_entropy, x, weight, targets, VOCAB, chunk_rows=8)
    with torch.no_grad():
        again = linear_softcap_cross_entropy(x.requires_grad_(), weight, targets, VOCAB, 8)
    assert torch.equal(loss, again) and not again.requires_grad


def test_all_ignored(device):
    x, weight, targets = case(torch.float32, device)
    loss, dx, dw = run(linear_softcap_cross_entropy, x, weight, targets.fill_(-1), VOCAB)
    assert loss.isnan() and (dx == 0).all() and (dw == 0).all()


@pytest.mark.parametrize("op", [linear_softcap_cross_entropy, linear_softcap_cross_entropy_ref])
def test_a_target_that_is_no_token_gives_nan(op, device):
    x, weight, targets = case(torch.float32, device)
    targets[2] = -100
    loss, dx, dw = run(op, x, weight, targets, VOCAB)
    assert loss.isnan() and dx[2].isnan().all() and dw[:VOCAB].isnan().all()
    with torch.no_grad():
        assert op(x, weight, targets, VOCAB).isnan()


def test_what_does_not_fit_is_refused(device):
    x, weight, targets = case(torch.float32, device)
    for match, arguments, options in (
        ("mean, sum", (x, weight), {"reduction": "none"}),
        ("do not fit", (x[:, 1:], weight), {}),
        ("float32 and weight", (x, weight.bfloat16()), {}),
        ("positive", (x, weight), {"chunk_rows": 0}),
        ("targets", (x[1:], weight), {}),
    ):
        with pytest.raises(ValueError, match=match):
            linear_softcap_cross_entropy(*arguments, targets, VOCAB, **options)


class FP8Case:
    """Operands x (N, C) and w (V, C), normalised as in a model, and targets, some ignored."""

    def __init__(self, shape, device, spread=1.0):
        rows, width, padded, self.vocab = shape
        self.device = device
        x = torch.randn(rows, width, device=device)
        x *= spread ** torch.linspace(0, 1, rows, device=device)[:, None]
        self.x = quantize(x, Scaling.from_bound(6.0 * spread, E4M3, device))
        w = torch.randn(padded, width, device=device) * (3 / width**0.5)
        self.w = quantize(w, Scaling.from_bound(18 / width**0.5, E4M3, device))
        self.targets = torch.randint(self.vocab, (rows,), device=device)
        self.targets[1::8] = -1

    def forward(self, **options):
        return linear_softcap_cross_entropy_fwd(self.x, self.w, self.targets, self.vocab, **options)

    def gradients(self, grad, scale):
        """dx and dw in fp64 and fp32, with exact products of the operands."""
        u, weighted = grad.u.dequantize().double(), weighted_rows(self.x, grad, scale)
        x = weighted.transposed.double().t() * weighted.inverse_scale
        dw = (u.t() @ x).float()
        linear_softcap_cross_entropy_dw(self.x, grad, scale, dw)
        product = (u @ self.w.dequantize().double()).float()
        return linear_softcap_cross_entropy_dx(product, self.w, grad, scale), dw

    def exact(self, scale, logits_dtype=torch.float64, quantized=False):
        """Losses, dx and dw of the same operands; of logits in a dtype, and of a gradient of theirs
        in FP8, as without this op."""
        x, w = self.x.dequantize().double(), self.w.dequantize().double()
        logits = (x @ w.t()).to(logits_dtype).requires_grad_()
        losses = softcap_cross_entropy_ref(logits, self.targets, self.vocab, reduction="none")
        losses.backward(scale.expand_as(losses).to(losses.dtype))
        grad = logits.grad
        if quantized:
            q, inverse = quantize_ref(grad.float(), E5M2)
            grad = q.float() * inverse
        grad = grad.double()
        return losses.detach(), grad @ w, grad.t() @ x


@pytest.mark.parametrize("shape", FP8_SHAPES, ids=str)
def test_fp8_gradients(shape, device):
    """Errors at most those of logits in bf16 whose gradient is rounded to FP8."""
    case = FP8Case(shape, device)
    scale = torch.tensor([0.37 / shape[0]], device=device)
    losses, lse, grad = case.forward()
    exact = case.exact(scale)
    unfused = case.exact(scale, torch.bfloat16, quantized=True)
    for name, *tensors in zip(("loss", "dx", "dw"), (losses, *case.gradients(grad, scale)),
                              unfused, exact, strict=True):  # fmt: skip
        assert_accurate(name, *tensors)
    z = softcap_ref(case.x.dequantize().double() @ case.w.dequantize().double().t(), case.vocab)
    torch.testing.assert_close(lse.double(), z.logsumexp(dim=1), rtol=0, atol=2e-3)


@pytest.mark.parametrize("shape", FP8_SHAPES, ids=str)
def test_u_in_fp8(shape, device):
    """Both layouts, 0 at targets and in the padding, elsewhere the rounded e f."""
    case = FP8Case(shape, device)
    *_, grad = case.forward()
    z = softcap_ref(case.x.dequantize().double() @ case.w.dequantize().double().t(), shape[2])
    u = (z - 15).exp() * (1 - (z / 15).square()) * 2.0 ** exponent_shift(15)
    u[:, case.vocab :] = 0
    counted = case.targets >= 0
    u[counted, case.targets[counted]] = 0
    scaling = Scaling.from_bound(torch.finfo(E5M2).max, E5M2, device)
    scaling.amax[0] = u.max()
    if ON_GPU:  # products of tensor cores, and a tanh of 11 bits
        assert relative_error(grad.u.data.float(), u) < 0.08
        assert torch.equal(grad.u.data.t().view(torch.uint8), grad.u.transposed.view(torch.uint8))
        assert not grad.u.data[u == 0].float().any()
    else:
        assert_fp8("u", grad.u, u, scaling, through=torch.bfloat16)


@pytest.mark.parametrize("softcap", [1.0, 5.0, 15.0, 30.0])
def test_u_never_clips_and_uses_the_range(softcap):
    z = softcap * torch.linspace(-1, 1, 100001, dtype=torch.float64)
    u = (z - softcap).exp() * (1 - (z / softcap).square()) * 2.0 ** exponent_shift(softcap)
    largest = torch.finfo(E5M2).max
    assert 0.4 * largest < u.max() < 0.96 * largest


def test_rows_whose_logsumexp_differs(device):
    """Rows of x up to 3 times as long: their logsumexp spans nats, and dw keeps its accuracy."""
    case = FP8Case((96, 48, 80, 77), device, spread=3.0)
    scale = torch.tensor([0.01], device=device)
    _, lse, grad = case.forward()
    print(f"logsumexp from {lse.min():.1f} to {lse.max():.1f}")
    assert lse.max() - lse.min() > 4
    unfused = case.exact(scale, torch.bfloat16, quantized=True)
    for name, *tensors in zip(("dx", "dw"), case.gradients(grad, scale), unfused[1:],
                              case.exact(scale)[1:], strict=True):  # fmt: skip
        assert_accurate(name, *tensors)


def test_ignored_and_unknown_targets_in_fp8(device):
    case = FP8Case((32, 32, 48, 41), device)
    scale = torch.ones(1, device=device)
    case.targets[5] = -1
    case.targets[9] = 43  # in the padding
    case.targets[11] = 2**32 + 3
    losses, lse, grad = case.forward()
    dx, dw = case.gradients(grad, scale)
    row = torch.arange(32, device=device)
    bad = (row == 9) | (row == 11)
    assert torch.equal(losses.isnan(), bad) and torch.equal(dx.isnan().all(dim=1), bad)
    assert dx[~bad].isfinite().all() and dw.isnan().all() and lse.isfinite().all()
    ignored = case.targets == -1
    assert (losses[ignored] == 0).all() and (dx[ignored] == 0).all()
    case.targets.fill_(-1)
    *_, grad = case.forward()
    dx, dw = case.gradients(grad, torch.full((1,), math.inf, device=device))
    assert (dx == 0).all() and (dw == 0).all()


@pytest.mark.parametrize("value", [1e3, -1e3])
def test_saturated_logits(value, device):
    """softcap keeps the losses finite, and the gradients are 0 where it is flat."""
    x, w = torch.full((16, 16), value / 16, device=device), torch.ones(48, 16, device=device)
    targets = torch.arange(16, device=device)
    losses, lse, grad = linear_softcap_cross_entropy_fwd(x, w, targets, 45)
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(45)))
    torch.testing.assert_close(lse, losses + math.copysign(15, value))
    assert (grad.u == 0).all() and (grad.at_target == 0).all()


def test_a_certain_target_keeps_a_small_gradient(device):
    """Where the target has nearly all of the sum its gradient is that of the rest, not of 1 - p."""
    x, w = torch.eye(16, device=device), torch.zeros(48, 16, device=device)
    w[range(16), range(16)] = 20.0
    targets = torch.arange(16, device=device)
    losses, _, grad = linear_softcap_cross_entropy_fwd(x, w, targets, 48)
    e = torch.tensor(15 * math.tanh(20 / 15), dtype=torch.float64).exp()
    expected = (47 / (47 + e)).item()
    floor = 5e-7 / expected
    assert abs(losses[0].item() / expected - 1) < floor + expected
    f = 1 - math.tanh(20 / 15) ** 2
    assert abs(-grad.at_target[0].item() / (f * expected) - 1) < floor + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, E4M3], ids=str)
def test_two_forward_passes_give_the_same_bits(dtype, device):
    case = FP8Case((48, 32, 80, 77), device)
    x, w = (case.x, case.w) if dtype == E4M3 else (case.x.dequantize(), case.w.dequantize())

    def run():
        losses, lse, grad = linear_softcap_cross_entropy_fwd(x, w, case.targets, case.vocab)
        u = [grad.u.data, grad.u.transposed] if dtype == E4M3 else [grad.u]
        return losses, lse, *u, grad.weights, grad.at_target, grad.largest

    same_bits(run)


def test_losses_alone(device):
    case = FP8Case((48, 32, 80, 77), device)
    losses, lse, grad = case.forward(train=False)
    assert grad is None
    for a, b in zip((losses, lse), case.forward(), strict=False):
        assert torch.equal(a, b)


def test_what_the_launchers_refuse(device):
    case = FP8Case((32, 32, 48, 41), device)
    x, w = case.x.dequantize(), case.w.dequantize()
    *_, grad = case.forward()
    one, forward = torch.ones(1, device=device), linear_softcap_cross_entropy_fwd
    for match, function, arguments in (
        ("both be FP8Operands", forward, (case.x, w, case.targets, 41)),
        ("both be FP8Operands", forward, (x.half(), w.half(), case.targets, 41)),
        ("x is torch.float32 and w is torch.bfloat16", forward,
         (x, w.bfloat16(), case.targets, 41)),
        ("do not fit", forward, (x[:, :16].contiguous(), w, case.targets, 41)),
        ("not empty", forward, (x[:0], w, case.targets, 41)),
        ("contiguous", forward, (x.t(), w, case.targets, 41)),
        ("multiples of 16", forward, (case.x, replace(case.w, data=case.w.data[:41]),
                                      case.targets, 41)),
        ("targets must have shape", forward, (x, w, case.targets[1:], 41)),
        ("int64 or int32", forward, (x, w, case.targets.float(), 41)),
        ("vocab_size 49", forward, (x, w, case.targets, 49)),
        ("scale must have one element", weighted_rows, (case.x, grad, one.expand(2))),
        ("scale must be torch.float32", weighted_rows, (case.x, grad, one.double())),
        ("x must have 32 rows", weighted_rows, (x[1:], grad, one)),
        ("product must have shape", linear_softcap_cross_entropy_dx, (x[1:], w, grad, one)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            function(*arguments)


def test_a_width_that_is_no_multiple_of_16(device):
    x, weight, targets = case(torch.float32, device, width=20)
    check(x, weight, targets, VOCAB)


@pytest.mark.cuda
@pytest.mark.parametrize("width", [256, 768, 1024])
def test_real_shapes(width, device):
    x, weight, targets = case(torch.bfloat16, device, 4099, width, 32768, 32749)
    check(x, weight / width**0.5, targets, 32749, chunk_rows=1024)


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(4096, 1024, 32768, 32768), (4112, 528, 32784, 32749)], ids=str)
@pytest.mark.parametrize("tile", CASES[OP][1], ids=str)
def test_every_candidate_in_fp8(tile, shape, device):
    fp8_case = FP8Case(shape, device)
    scale = torch.tensor([1 / shape[0]], device=device)
    with forced(OP, tile):
        losses, _, grad = fp8_case.forward()
    assert torch.equal(grad.u.data.t().view(torch.uint8), grad.u.transposed.view(torch.uint8))
    exact = fp8_case.exact(scale)
    unfused = fp8_case.exact(scale, torch.bfloat16, quantized=True)
    for name, *tensors in zip(("loss", "dx", "dw"), (losses, *fp8_case.gradients(grad, scale)),
                              unfused, exact, strict=True):  # fmt: skip
        assert_accurate(name, *tensors)


@pytest.mark.cuda
@pytest.mark.parametrize("tile", CASES[plain_name(OP, torch.bfloat16)][1], ids=str)
def test_every_candidate_in_bf16(tile, device):
    x, weight, targets = case(torch.bfloat16, device, 4099, 528, 32768, 32749)
    with forced(plain_name(OP, torch.bfloat16), tile):
        check(x, weight / 528**0.5, targets, 32749, chunk_rows=1024)


@pytest.mark.cuda
@pytest.mark.large
def test_more_than_two_to_the_31_elements(device):
    rows, padded = 65552, 32768
    x, w = torch.zeros(rows, 16, device=device), torch.zeros(padded, 16, device=device)
    x[-1, 0], w[-1, 0], w[-2, 0] = 1.0, 12.0, 6.0
    unit = Scaling.from_bound(448.0, E4M3, device)  # a scale of 1
    targets = torch.arange(rows, device=device) % padded
    targets[-1] = padded - 1
    losses, lse, grad = linear_softcap_cross_entropy_fwd(
        quantize(x, unit), quantize(w, unit), targets, padded
    )
    z = torch.zeros(padded, dtype=torch.float64)
    z[-1], z[-2] = 15 * math.tanh(12 / 15), 15 * math.tanh(6 / 15)
    assert abs(lse[-1].item() - z.logsumexp(0).item()) < 5e-3
    assert abs(losses[-1].item() - (z.logsumexp(0) - z[-1]).item()) < 5e-3
    assert abs(losses[-2].item() - math.log(padded)) < 1e-3
    u = (z - 15).exp() * (1 - (z / 15).square()) * 2.0 ** exponent_shift(15)
    for view in (grad.u.data, grad.u.transposed.t()):
        assert view[-1, -1] == 0 and view[-2, targets[-2]] == 0
        torch.testing.assert_close(view[-1, -2].double().cpu(), u[-2], rtol=0.13, atol=0)
        torch.testing.assert_close(view[-2, -1].double().cpu(), u[0], rtol=0.13, atol=0)
