import math

import pytest
import torch

from kernels.softcap_cross_entropy import softcap_cross_entropy_ref, softcap_ref

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
    """Error against fp64 at most twice that of F.cross_entropy in fp32, extremes included."""
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
