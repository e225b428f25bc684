import numpy as np
import pytest
import torch

from kernels.muon_update import muon_update_ref, second_moment_shape
from kernels.newton_schulz import POLAR_EXPRESS


def step_in_numpy(p, g, m, s, lr, mu, wd, beta2, eq, plus):
    """One Muon step for one matrix in double precision, written out from recipe.md."""
    rows, cols = p.shape
    m = mu * m + (1 - mu) * g
    x = (1 - mu) * g + mu * m
    frobenius = np.sqrt((x**2).sum())
    if eq == "row":
        x = x * (frobenius / np.sqrt(rows)) / np.sqrt((x**2).sum(1, keepdims=True))
    elif eq == "col":
        x = x * (frobenius / np.sqrt(cols)) / np.sqrt((x**2).sum(0, keepdims=True))
    x = x / (1.01 * np.sqrt((x**2).sum()) + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    if plus:
        x = x * np.sqrt(min(rows, cols)) / np.sqrt((x**2).sum())
    norm = np.sqrt((x**2).sum())
    mean_square = (x**2).mean(1, keepdims=True) if rows >= cols else (x**2).mean(0, keepdims=True)
    s = beta2 * s + (1 - beta2) * mean_square
    u = x / np.sqrt(np.maximum(s, 1e-10))
    u = u * norm / np.sqrt((u**2).sum())
    lr = lr * np.sqrt(max(1, rows / cols))
    return p - lr * u - lr * wd * p * (u * p >= 0), m, s


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 17, 5), (2, 5, 17), (4, 2, 12)])
@pytest.mark.parametrize("eq", ["row", "col", "none"])
@pytest.mark.parametrize("plus", [True, False])
def test_three_steps_equal_double_precision_numpy(shape, eq, plus):
    generator = torch.Generator().manual_seed(0)

    def draw():
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    p, m = draw(), torch.zeros(shape, dtype=torch.float64)
    s = torch.zeros(second_moment_shape(shape), dtype=torch.float64)
    expected = [[x.numpy().copy() for x in (p[i], m[i], s[i])] for i in range(shape[0])]
    for mu, lr, wd in ((0.85, 0.02, 0.3), (0.9, 0.01, 0.0), (0.97, 0.1, 1.0)):
        g = draw()
        muon_update_ref(p, g, m, s, lr, mu, wd, 0.9, eq, plus)
        for i, (pi, mi, si) in enumerate(expected):
            expected[i] = step_in_numpy(pi, g[i].numpy(), mi, si, lr, mu, wd, 0.9, eq, plus)
    for i in range(shape[0]):
        for got, want in zip((p, m, s), expected[i], strict=True):
            np.testing.assert_allclose(got[i].numpy(), want, rtol=1e-8, atol=1e-10)


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
