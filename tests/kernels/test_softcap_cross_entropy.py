import math

import pytest
import torch

import nanofuse.kernels.softcap_cross_entropy as module
from nanofuse.bench.checks import DTYPES, ON_GPU, assert_accurate, assert_fp8, same_bits
from nanofuse.kernels.common.fp8 import E5M2, Scaling
from nanofuse.kernels.common.tuning import Tile
from nanofuse.kernels.softcap_cross_entropy import (
    LossTile,
    mean_grad_scale,
    softcap_cross_entropy,
    softcap_cross_entropy_fwd_bwd,
    softcap_cross_entropy_ref,
    softcap_ref,
)

VOCAB, PADDED = 13, 16


def case(seed=0, rows=9):
    generator = torch.Generator().manual_seed(seed)
    logits = 20 * torch.randn(rows, PADDED, dtype=torch.float64, generator=generator)
    targets = torch.randint(VOCAB, (rows,), generator=generator)
    return logits, targets


def losses_longhand(logits, targets):
    losses = []
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        if target == -1:
            losses.append(0.0)
            continue
        z = [15 * math.tanh(x / 15) for x in row[:VOCAB]]
        losses.append(math.log(sum(math.exp(x) for x in z)) - z[target])
    return losses


def test_losses_equal_longhand():
    logits, targets = case()
    targets[4] = -1
    expected = torch.tensor(losses_longhand(logits, targets), dtype=torch.float64)
    got = softcap_cross_entropy_ref(logits, targets, VOCAB, reduction="none")
    torch.testing.assert_close(got, expected)
    mean = softcap_cross_entropy_ref(logits, targets, VOCAB)
    torch.testing.assert_close(mean, expected.sum() / 8)  # the ignored row leaves the mean
    total = softcap_cross_entropy_ref(logits, targets, VOCAB, reduction="sum")
    torch.testing.assert_close(total, expected.sum())


def test_fp32_is_as_exact_as_torch():
    """Error against fp64 at most twice that of F.cross_entropy in fp32, also for extreme logits."""
    logits, targets = case(rows=200)
    logits[:50] *= 100  # softcap saturates
    logits[50:100] = -1e3  # every exponent at its smallest
    exact = softcap_cross_entropy_ref(logits, targets, VOCAB, reduction="none")
    ours = softcap_cross_entropy_ref(logits.float(), targets, VOCAB, reduction="none")
    z = softcap_ref(logits.float(), VOCAB)
    theirs = torch.nn.functional.cross_entropy(z, targets, reduction="none")
    error, allowed = ((x.double() - exact).abs().max() for x in (ours, theirs))
    print(f"ours {error:.2e}, torch {allowed:.2e}")
    assert error <= 2 * allowed


def test_unknown_reduction():
    with pytest.raises(ValueError, match="mean, sum, none"):
        softcap_cross_entropy_ref(*case(), VOCAB, reduction="max")


def test_padding_changes_nothing_and_gets_no_gradient():
    logits, targets = case()
    logits.requires_grad_()
    softcap_cross_entropy_ref(logits, targets, VOCAB).backward()
    assert (logits.grad[:, VOCAB:] == 0).all()
    other = logits.detach().clone()
    other[:, VOCAB:] = 1e4
    assert torch.equal(
        softcap_cross_entropy_ref(other, targets, VOCAB),
        softcap_cross_entropy_ref(logits, targets, VOCAB).detach(),
    )


def test_gradient_against_finite_differences():
    logits, targets = case(rows=3)
    targets[0] = -1
    upstream = torch.randn(3, dtype=torch.float64)

    def weighted(z):
        return (softcap_cross_entropy_ref(z, targets, VOCAB, reduction="none") * upstream).sum()

    assert torch.autograd.gradcheck(weighted, logits.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_softcap_is_fp32_and_bounded(dtype):
    z = softcap_ref(torch.tensor([[1e4, -1e4, 0.1, 7.0]], dtype=dtype), 3)
    assert z.dtype == torch.float32 and z.shape == (1, 3)
    assert z.abs().max() <= 15


def test_nan_shows():
    logits, targets = case()
    logits[2, 5] = math.nan
    assert softcap_cross_entropy_ref(logits, targets, VOCAB).isnan()


# (rows, vocab_size, padded columns): ragged last blocks, pieces and stripes
SHAPES = [
    (1, 1, 4),
    (9, 48, 48),
    (5, 300, 300),
    (9, 13, 16),
    (31, 127, 128),
    (37, 255, 256),
    (33, 257, 384),
    (17, 1000, 1024),
]
# exp2.approx and div.full are wrong by 2 units of the last place each, which cap = 15 multiplies
FLOOR = 5e-6 if ON_GPU else 1e-6


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Tiles so small that tests have many of them, in stripes of two tiles."""
    if not ON_GPU:
        monkeypatch.setattr(module, "FORWARD_TILE", Tile(rows=1, cols=256, warps=8))
        monkeypatch.setattr(
            module, "BACKWARD_TILE", LossTile(rows=16, cols=64, blocks=2, stripe=32)
        )


def kernel_case(rows, vocab, padded, dtype, device, spread=5.0):
    """Logits with NaN in the padding, targets with every eighth ignored, upstream gradients."""
    logits = (spread * torch.randn(rows, padded, device=device)).to(dtype)
    logits[:, vocab:] = math.nan
    targets = torch.randint(vocab, (rows,), device=device)
    targets[1::8] = -1
    return logits, targets, torch.randn(rows, device=device)


def losses_and_gradient(op, logits, targets, upstream, vocab):
    """Losses (N,) and the gradient (N, vocab) of one implementation."""
    logits = logits.clone().requires_grad_()
    losses = op(logits, targets, vocab, reduction="none")
    losses.backward(upstream.to(losses.dtype))
    return losses.detach(), logits.grad[:, :vocab], logits.grad[:, vocab:]


def check(logits, targets, upstream, vocab):
    exact = losses_and_gradient(
        softcap_cross_entropy_ref, logits.double(), targets, upstream, vocab
    )
    torch_ = losses_and_gradient(softcap_cross_entropy_ref, logits, targets, upstream, vocab)
    got = losses_and_gradient(softcap_cross_entropy, logits, targets, upstream, vocab)
    if vocab > 1:  # else both are zero but for rounding
        assert_accurate("loss", got[0], torch_[0], exact[0], FLOOR)
        assert_accurate("gradient", got[1], torch_[1], exact[1], FLOOR)
    torch.testing.assert_close(got[0].double(), exact[0], rtol=1e-5, atol=1e-5)
    atol = 1e-5 if logits.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got[1].double(), exact[1], rtol=1e-2, atol=atol)
    assert (got[2] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_losses_and_gradient(shape, dtype, device):
    check(*kernel_case(*shape, dtype, device), shape[1])


def run(logits, targets, upstream, vocab, inplace=False):
    """Losses, logsumexp, gradient, both FP8 layouts and the amax."""
    scaling = Scaling.from_bound(3.0, E5M2, logits.device)
    x = logits.clone()
    *_, operand = softcap_cross_entropy_fwd_bwd(x, targets, upstream, vocab, scaling)
    losses, lse, grad = softcap_cross_entropy_fwd_bwd(x, targets, upstream, vocab, inplace=inplace)
    assert (grad is x) == inplace
    return losses, lse, grad, operand.data, operand.transposed, scaling.amax


@pytest.mark.parametrize(
    ("shape", "dtype"), [((32, 127, 128), torch.bfloat16), ((48, 257, 320), torch.float32)], ids=str
)
def test_in_place_and_out_of_place_give_the_same_bits(shape, dtype, device):
    case = (*kernel_case(*shape, dtype, device), shape[1])
    outcomes = iter((run(*case), run(*case, inplace=True)))
    same_bits(lambda: next(outcomes))


@pytest.mark.parametrize(
    "shape", [(16, 13, 16), (16, 48, 48), (32, 127, 128), (48, 257, 320)], ids=str
)
def test_fp8_gradient_is_the_rounded_gradient(shape, device):
    logits, targets, upstream = kernel_case(*shape, torch.float32, device)
    scaling = Scaling.from_bound(3.0, E5M2, device)
    *_, operand = softcap_cross_entropy_fwd_bwd(logits, targets, upstream, shape[1], scaling)
    *_, grad = softcap_cross_entropy_fwd_bwd(logits, targets, upstream, shape[1])
    assert_fp8("gradient", operand, grad, scaling)


@pytest.mark.parametrize(("vocab", "columns"), [(13, 16), (48, 48)])
def test_columns_that_are_no_tokens_stay_out_of_the_maximum(vocab, columns, device):
    """Padding, and what a tile reads as 0 beyond the last column: both likelier than any token."""
    logits, targets, upstream = kernel_case(16, vocab, columns, torch.float32, device, 1.0)
    logits -= 40
    logits[:, vocab:] = 0
    scaling = Scaling.from_bound(3.0, E5M2, device)
    *_, operand = softcap_cross_entropy_fwd_bwd(logits, targets, upstream, vocab, scaling)
    *_, grad = softcap_cross_entropy_fwd_bwd(logits, targets, upstream, vocab)
    assert_fp8("gradient", operand, grad, scaling)


def test_two_runs_give_the_same_bits(device):
    case = (*kernel_case(32, 257, 320, torch.float32, device), 257)
    same_bits(lambda: run(*case))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions(reduction, dtype, device):
    logits, targets, _ = kernel_case(37, 127, 128, dtype, device)
    logits[:, 127:] = 0
    results = []
    for op in (softcap_cross_entropy, softcap_cross_entropy_ref):
        x = logits.clone().requires_grad_()
        loss = op(x, targets, 127, reduction=reduction)
        (-0.7 * loss).backward()
        results.append((loss.detach(), x.grad))
    torch.testing.assert_close(*[loss for loss, _ in results])
    torch.testing.assert_close(*[grad for _, grad in results])


def test_mean_scale_gives_the_gradient_of_the_mean(device):
    logits, targets, _ = kernel_case(37, 127, 128, torch.float32, device)
    x = logits.clone().requires_grad_()
    softcap_cross_entropy(x, targets, 127).backward()
    *_, grad = softcap_cross_entropy_fwd_bwd(logits, targets, mean_grad_scale(targets), 127)
    torch.testing.assert_close(grad, x.grad)


def test_all_ignored(device):
    logits, targets, _ = kernel_case(5, 13, 16, torch.float32, device)
    targets.fill_(-1)
    logits.requires_grad_()
    loss = softcap_cross_entropy(logits, targets, 13)
    loss.backward()
    assert loss.isnan() and (logits.grad == 0).all()
    assert softcap_cross_entropy(logits, targets, 13, reduction="sum") == 0


@pytest.mark.parametrize("value", [1e4, -1e4, math.inf, -math.inf, 3e38])
def test_saturated_logits(value, device):
    """A row of extreme values, and rows with a single one: softcap keeps both finite."""
    logits, targets, upstream = kernel_case(4, 127, 128, torch.float32, device)
    logits[0, :127] = value
    logits[2, 5], targets[2] = value, 5
    logits[3, 6] = value
    exact = logits.double().clamp(-1e4, 1e4)
    exact = losses_and_gradient(softcap_cross_entropy_ref, exact, targets, upstream, 127)
    got = losses_and_gradient(softcap_cross_entropy, logits, targets, upstream, 127)
    for a, b in zip(got[:2], exact[:2], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_nan_shows_in_its_row_alone(device):
    logits, targets, upstream = kernel_case(16, 127, 128, torch.float32, device)
    logits[4, 50] = math.nan
    scaling = Scaling.from_bound(3.0, E5M2, device)
    losses, _, operand = softcap_cross_entropy_fwd_bwd(logits, targets, upstream, 127, scaling)
    *_, grad = softcap_cross_entropy_fwd_bwd(logits, targets, upstream, 127)
    rows = torch.arange(16, device=device) == 4
    assert torch.equal(losses.isnan(), rows)
    for gradient in (grad, operand.dequantize()):
        assert gradient[4, :127].isnan().all() and gradient[~rows].isfinite().all()
    assert scaling.amax.isnan()


@pytest.mark.parametrize("columns", [13, 16])
@pytest.mark.parametrize("op", [softcap_cross_entropy, softcap_cross_entropy_ref])
def test_targets_that_are_no_tokens_give_nan(op, columns, device):
    """Beyond the vocabulary, in its padding, below -1, and equal to a token modulo 2^32."""
    logits, targets, upstream = kernel_case(9, 13, columns, torch.float32, device)
    clean = losses_and_gradient(op, logits, targets, upstream, 13)
    bad = torch.arange(9, device=device) % 2 == 1
    targets[bad] = torch.tensor([14, -7, -100, 2**32 + 3], device=device)
    upstream[3] = 0.0
    losses, grad, padding = losses_and_gradient(op, logits, targets, upstream, 13)
    assert torch.equal(losses.isnan(), bad)
    assert grad[bad].isnan().all() and (padding == 0).all()
    assert torch.equal(losses[~bad], clean[0][~bad]) and torch.equal(grad[~bad], clean[1][~bad])
    for reduction in ("mean", "sum"):
        assert op(logits, targets, 13, reduction=reduction).isnan()


def test_targets_that_are_no_tokens_give_nan_in_fp8(device):
    logits, targets, upstream = kernel_case(16, 13, 16, torch.float32, device)
    targets[4] = -100
    scaling = Scaling.from_bound(3.0, E5M2, device)
    *_, operand = softcap_cross_entropy_fwd_bwd(logits, targets, upstream, 13, scaling)
    rows = operand.dequantize()
    assert rows[4, :13].isnan().all() and rows[torch.arange(16) != 4].isfinite().all()
    assert scaling.amax.isnan()


def test_rows_of_a_wider_buffer_and_int32_targets(device):
    wide = 5 * torch.randn(37, 160, device=device)
    targets = torch.randint(127, (37,), device=device)
    expected = softcap_cross_entropy(wide[:, 16:144].contiguous(), targets, 127)
    assert torch.equal(softcap_cross_entropy(wide[:, 16:144], targets.int(), 127), expected)
    scale = torch.ones(1, device=device)
    *_, grad = softcap_cross_entropy_fwd_bwd(wide[:, 16:144], targets, scale, 127)
    before = wide.clone()
    softcap_cross_entropy_fwd_bwd(wide[:, 16:144], targets, scale, 127, inplace=True)
    assert torch.equal(wide[:, 16:144], grad)
    assert torch.equal(wide[:, :16], before[:, :16])
    assert torch.equal(wide[:, 144:], before[:, 144:])


def test_a_single_column_has_any_stride(device):
    logits = torch.randn(4, 3, device=device)
    targets = torch.zeros(4, dtype=torch.long, device=device)
    column = logits.as_strided((4, 1), (3, 7))
    torch.testing.assert_close(
        softcap_cross_entropy(column, targets, 1, reduction="none"), torch.zeros(4, device=device)
    )


def test_other_softcaps(device):
    logits, targets, _ = kernel_case(9, 127, 128, torch.float32, device)
    for softcap in (5.0, 30.0):
        expected = softcap_cross_entropy_ref(logits, targets, 127, softcap)
        torch.testing.assert_close(softcap_cross_entropy(logits, targets, 127, softcap), expected)


def test_without_gradient_losses_alone(device):
    logits, targets, _ = kernel_case(9, 13, 16, torch.float32, device)
    with torch.no_grad():
        losses = softcap_cross_entropy(logits.requires_grad_(), targets, 13, reduction="none")
    assert not losses.requires_grad
    expected = softcap_cross_entropy_ref(logits.detach(), targets, 13, reduction="none")
    torch.testing.assert_close(losses, expected)


def test_no_rows(device):
    targets = torch.zeros(0, dtype=torch.long, device=device)
    scale = torch.ones(1, device=device)
    losses, lse, grad = softcap_cross_entropy_fwd_bwd(
        torch.zeros(0, 16, device=device), targets, scale, 13
    )
    assert losses.shape == lse.shape == (0,) and grad.shape == (0, 16)


def test_what_does_not_fit_is_refused(device):
    logits, targets, upstream = kernel_case(6, 13, 16, torch.float32, device)
    for match, arguments in {
        "contiguous rows": (logits.t(), targets, 6),
        "targets must be": (logits, targets[:5], 13),
        "int64 or int32": (logits, targets.float(), 13),
        "does not fit": (logits, targets, 17),
    }.items():
        with pytest.raises(ValueError, match=match):
            softcap_cross_entropy(*arguments)
    with pytest.raises(ValueError, match="mean, sum, none"):
        softcap_cross_entropy(logits, targets, 13, reduction="max")
    for match, arguments in {
        "grad_scale must be": (upstream[:5], 13),
        "inplace or scaling": (upstream, 13, Scaling.from_bound(1.0, E5M2, device), True),
    }.items():
        with pytest.raises(ValueError, match=match):
            softcap_cross_entropy_fwd_bwd(logits, targets, *arguments)


@pytest.mark.parametrize(("width", "start"), [(145, 0), (160, 3)])
def test_unaligned_rows_are_refused_with_fp8_alone(width, start, device):
    logits = torch.randn(32, width, device=device)[:, start : start + 128]
    targets, scale = torch.zeros(32, dtype=torch.long, device=device), torch.ones(1, device=device)
    scaling = Scaling.from_bound(3.0, E5M2, device)
    softcap_cross_entropy_fwd_bwd(logits, targets, scale, 127)
    with pytest.raises(ValueError, match="logits must start at a multiple of 16 bytes"):
        softcap_cross_entropy_fwd_bwd(logits, targets, scale, 127, scaling)
    logits = torch.randn(32, 160, device=device)[:, 16:144]
    *_, operand = softcap_cross_entropy_fwd_bwd(logits, targets, scale, 127, scaling)
    *_, grad = softcap_cross_entropy_fwd_bwd(logits, targets, scale, 127)
    assert_fp8("strided", operand, grad, scaling)


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(8192, 32768, 32768), (4099, 32749, 32768)], ids=str)
def test_real_vocabulary(shape, device):
    logits, targets, upstream = kernel_case(*shape, torch.bfloat16, device)
    check(logits, targets, upstream, shape[1])


@pytest.mark.cuda
@pytest.mark.large
def test_more_than_two_to_the_31_elements(device):
    rows, vocab = 65552, 32768
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device=device)
    targets = torch.arange(rows, device=device) % vocab
    logits[-1, -1], targets[-1] = 20.0, vocab - 1
    scaling = Scaling.from_bound(1.0, E5M2, device)
    scale = torch.ones(1, device=device)
    losses, _, operand = softcap_cross_entropy_fwd_bwd(logits, targets, scale, vocab, scaling)
    *_, grad = softcap_cross_entropy_fwd_bwd(logits, targets, scale, vocab)
    expected = softcap_cross_entropy_ref(logits[-70:], targets[-70:], vocab, reduction="none")
    torch.testing.assert_close(losses[-70:], expected)
    uniform = 1 / vocab
    for view in (grad, operand.dequantize()):
        tail = view[-3:].float()
        torch.testing.assert_close(tail[0, targets[-3]].item(), uniform - 1, rtol=0.1, atol=0)
        torch.testing.assert_close(tail[1, 0].item(), uniform, rtol=0.15, atol=0)
        assert tail[2, -1] < 0 < tail[2, -2]
