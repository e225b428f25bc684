import pytest
import torch

from nanofuse.bench.checks import DTYPES, assert_accurate, same_bits
from nanofuse.kernels.gate_logits import gate_logits_bwd, gate_logits_fwd, gate_logits_ref

# (positions, width, heads, channels): none, one, around a program's 128 positions, primes
SHAPES = [
    (0, 16, 2, 12),
    (1, 1, 1, 1),
    (127, 64, 2, 12),
    (128, 48, 3, 16),
    (129, 33, 1, 12),
    (397, 97, 5, 7),
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def inputs(shape, dtype, device):
    """y, rstd, weight, the logits' upstream gradient, and random tensors to accumulate into."""
    n, c, heads, channels = shape
    y, grad_normed = torch.randn(2, n, c, device=device).to(dtype)
    weight, grad_weight = torch.randn(2, heads, channels, device=device)
    rstd = torch.rand(n, device=device) + 0.5
    return y, rstd, weight, torch.randn(n, heads, device=device), grad_normed, grad_weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(shape, dtype, device):
    y, rstd, weight, h, grad_normed, grad_weight = inputs(shape, dtype, device)

    def gradients(dtype):
        """Logits, and what grad_normed and grad_weight become, computed in `dtype`."""
        channels = y[:, : weight.size(1)].to(dtype)
        w = weight.to(dtype, copy=True).requires_grad_()
        normed = (channels * rstd.to(dtype)[:, None]).requires_grad_()
        logits = normed @ w.t()
        grad_channels, grad_from_logits = torch.autograd.grad(logits, (normed, w), h.to(dtype))
        total = grad_normed.to(dtype, copy=True)
        total[:, : weight.size(1)] += grad_channels
        return logits.detach(), total, grad_weight.to(dtype) + grad_from_logits

    truth, theirs = gradients(torch.float64), gradients(torch.float32)
    logits = gate_logits_fwd(y, rstd, weight)
    torch.testing.assert_close(gate_logits_ref(y, rstd, weight), theirs[0])
    assert_accurate("logits", logits, theirs[0], truth[0])
    gate_logits_bwd(h, y, rstd, weight, grad_normed, grad_weight)
    assert_accurate("normed", grad_normed, theirs[1].to(dtype), truth[1])
    assert_accurate("weight", grad_weight, theirs[2], truth[2])


def test_the_other_columns_are_left_alone(device):
    y, rstd, weight, h, grad_normed, grad_weight = inputs((130, 40, 2, 12), DTYPES[1], device)
    before = grad_normed.clone()
    gate_logits_bwd(h, y, rstd, weight, grad_normed, grad_weight)
    assert torch.equal(grad_normed[:, 12:], before[:, 12:])
    assert not torch.equal(grad_normed[:, :12], before[:, :12])


def test_two_runs_give_the_same_bits_and_nan_shows(device):
    y, rstd, weight, h, *totals = inputs((300, 40, 2, 12), torch.bfloat16, device)
    h[17, 1] = torch.nan

    def run():
        grads = [x.clone() for x in totals]
        gate_logits_bwd(h, y, rstd, weight, *grads)
        return [gate_logits_fwd(y, rstd, weight), *grads]

    _, grad_normed, grad_weight = same_bits(run)
    assert grad_normed.isnan().sum() == 12 and grad_normed[17, :12].isnan().all()
    assert grad_weight.isnan().any(dim=1).tolist() == [False, True]


def test_what_does_not_fit_is_refused(device):
    y, rstd, weight, h, *totals = inputs((20, 40, 2, 12), torch.bfloat16, device)
    with pytest.raises(ValueError, match=r"y must be contiguous and \(20, 20\)"):
        gate_logits_fwd(y[:, ::2], rstd, weight)
    with pytest.raises(ValueError, match=r"rstd must be contiguous and \(20,\), got \(19,\)"):
        gate_logits_fwd(y, rstd[1:], weight)
    with pytest.raises(ValueError, match="12 channels of rows of 8"):
        gate_logits_fwd(y[:, :8].contiguous(), rstd, weight)
    with pytest.raises(ValueError, match="grad_logits must be contiguous"):
        gate_logits_bwd(h[:, :1], y, rstd, weight, *totals)


@pytest.mark.cuda
@pytest.mark.large
def test_more_than_two_to_the_31_elements(device):
    n, c, heads, channels = 65600, 32768, 2, 12
    y = torch.zeros(n, c, dtype=torch.bfloat16, device=device)
    y[-1, :channels] = 1.0
    rstd, weight = torch.full((n,), 2.0, device=device), torch.ones(heads, channels, device=device)
    assert gate_logits_fwd(y, rstd, weight)[-2:].tolist() == [[0.0, 0.0], [24.0, 24.0]]
    h = torch.zeros(n, heads, device=device)
    h[-1, 1] = 3.0
    grad_weight, grad_normed = torch.zeros_like(weight), y  # one buffer holds both
    gate_logits_bwd(h, y, rstd, weight, grad_normed, grad_weight)
    assert grad_normed[-1, : channels + 1].tolist() == [4.0] * channels + [0.0]
    assert grad_weight.tolist() == [[0.0] * channels, [6.0] * channels]
