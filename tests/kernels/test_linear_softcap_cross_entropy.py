import pytest
import torch

import nanofuse.kernels.softcap_cross_entropy as module
from nanofuse.bench.checks import DTYPES, ON_GPU, assert_accurate, same_bits
from nanofuse.kernels.common.tuning import Tile
from nanofuse.kernels.linear_softcap_cross_entropy import (
    linear_softcap_cross_entropy,
    linear_softcap_cross_entropy_ref,
)
from nanofuse.kernels.softcap_cross_entropy import LossTile

ROWS, WIDTH, VOCAB, PADDED = 19, 24, 127, 128


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    if not ON_GPU:
        monkeypatch.setattr(module, "FORWARD_TILE", Tile(rows=1, cols=128, warps=8))
        monkeypatch.setattr(
            module, "BACKWARD_TILE", LossTile(rows=16, cols=128, blocks=2, stripe=16)
        )


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


@pytest.mark.cuda
@pytest.mark.parametrize("width", [256, 768, 1024])
def test_real_shapes(width, device):
    x, weight, targets = case(torch.bfloat16, device, 4099, width, 32768, 32749)
    check(x, weight / width**0.5, targets, 32749, chunk_rows=1024)
