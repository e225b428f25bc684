"""rms_norm, relu_squared, smear and backout: short formulas, checked against longhand."""

import torch

from kernels.backout import backout_ref
from kernels.relu_squared import relu_squared_ref
from kernels.rms_norm import rms_norm_ref
from kernels.smear import smear_ref


def test_rms_norm():
    x = torch.randn(3, 5, dtype=torch.float64)
    expected = x / (x.pow(2).sum(-1, keepdim=True) / 5 + 2.0**-23).sqrt()
    torch.testing.assert_close(rms_norm_ref(x), expected)
    assert torch.equal(rms_norm_ref(torch.zeros(2, 4)), torch.zeros(2, 4))


def test_relu_squared_and_its_gradient():
    x = torch.tensor([-2.0, 0.0, 0.5, 3.0], requires_grad=True)
    y = relu_squared_ref(x)
    assert y.tolist() == [0.0, 0.0, 0.25, 9.0]
    y.backward(torch.tensor([7.0, 7.0, 2.0, -1.0]))
    assert x.grad.tolist() == [0.0, 0.0, 2.0, -6.0]


def smear_longhand(x, gate, scale):
    y = x.clone()
    for t in range(1, x.size(1)):
        y[:, t] += scale * torch.sigmoid(gate[:, t]) * x[:, t - 1]
    return y


def test_smear_mixes_the_unsmeared_previous_position():
    x, gate = torch.randn(2, 7, 4), torch.randn(2, 7, 1)
    got = smear_ref(x, gate, torch.tensor([0.6]))
    torch.testing.assert_close(got, smear_longhand(x, gate, 0.6))
    assert torch.equal(got[:, 0], x[:, 0])


def test_smear_continues_from_a_previous_embedding():
    x, gate, scale = torch.randn(2, 7, 4), torch.randn(2, 7, 1), torch.tensor([0.6])
    whole = smear_ref(x, gate, scale)
    for cut in (1, 3, 6):
        rest = smear_ref(x[:, cut:], gate[:, cut:], scale, prev_embedding=x[:, cut - 1])
        torch.testing.assert_close(rest, whole[:, cut:])


def test_backout():
    x, mid = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(backout_ref(x, mid, torch.tensor([0.2])), x - 0.2 * mid)
