"""rms_norm and relu_squared: short formulas, checked against longhand."""

import torch

from nanofuse.kernels.common.rms_norm import rms_norm_ref
from nanofuse.kernels.relu_squared import relu_squared_ref


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
