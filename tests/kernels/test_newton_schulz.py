import pytest
import torch

from kernels.newton_schulz import (
    POLAR_EXPRESS,
    equilibrate_ref,
    muon_plus_ref,
    newton_schulz_ref,
    polar_express_ref,
)

SHAPES = [(1, 1, 1), (3, 16, 16), (2, 33, 8), (2, 8, 33), (1, 127, 65), (2, 1, 9), (2, 9, 1)]


def random(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def polar_scalar(sigma):
    for a, b, c in POLAR_EXPRESS:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma


@pytest.mark.parametrize("shape", SHAPES)
def test_acts_on_singular_values_only(shape):
    """Against an SVD: same singular vectors, each singular value through the polynomials."""
    x = random(shape)
    u, sigma, vh = torch.linalg.svd(x, full_matrices=False)
    norm = x.square().sum(dim=(-2, -1), keepdim=True).sqrt()
    scaled = sigma / (1.01 * norm[..., 0] + 1e-6)
    expected = u @ torch.diag_embed(polar_scalar(scaled)) @ vh
    torch.testing.assert_close(polar_express_ref(x), expected, rtol=1e-9, atol=1e-9)


def test_scalar_polynomials_stay_in_polar_express_band():
    sigma = torch.logspace(-2.5, 0, 2000, dtype=torch.float64) / 1.01
    band = polar_scalar(sigma)
    assert 0.85 < band.min() and band.max() < 1.15


@pytest.mark.parametrize("shape", [(2, 64, 64), (2, 128, 32), (2, 32, 128)])
def test_singular_values_in_band(shape):
    sigma = torch.linalg.svdvals(polar_express_ref(random(shape)))
    assert (sigma > 0.3).float().mean() > 0.98 and sigma.max() < 1.15


@pytest.mark.parametrize("shape", SHAPES)
def test_transpose_commutes(shape):
    x = random(shape)
    torch.testing.assert_close(polar_express_ref(x.mT), polar_express_ref(x).mT)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["row", "col"])
def test_equilibration_levels_norms_and_keeps_the_whole(shape, mode):
    x = random(shape) * torch.logspace(-3, 3, shape[1], dtype=torch.float64)[:, None]
    y = equilibrate_ref(x, mode)
    norms = torch.linalg.vector_norm(y, dim=-1 if mode == "row" else -2)
    torch.testing.assert_close(norms, norms[:, :1].expand_as(norms))
    whole = torch.linalg.matrix_norm
    torch.testing.assert_close(whole(y), whole(x))


def test_equilibration_modes():
    x = random((1, 3, 4))
    assert equilibrate_ref(x, "none") is x
    with pytest.raises(ValueError, match="row, col, none"):
        equilibrate_ref(x, "both")


def test_a_zero_row_stays_zero():
    x = random((1, 4, 5))
    x[0, 2] = 0
    y = newton_schulz_ref(x)
    assert y.isfinite().all() and (y[0, 2] == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_plus_norm(shape):
    y = newton_schulz_ref(random(shape), muon_plus=True)
    norms = torch.linalg.matrix_norm(y)
    torch.testing.assert_close(norms, torch.full_like(norms, min(shape[1:]) ** 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_stay_zero(dtype):
    y = newton_schulz_ref(torch.zeros(2, 5, 7, dtype=dtype))
    assert torch.equal(y, torch.zeros(2, 5, 7, dtype=dtype))


def test_rank_one():
    x = random((1, 12, 1)) @ random((1, 1, 20), seed=1)
    u, _, vh = torch.linalg.svd(x)
    expected = 12**0.5 * u[:, :, :1] @ vh[:, :1]
    torch.testing.assert_close(newton_schulz_ref(x, "none"), expected)


def test_one_matrix_does_not_touch_another():
    x = random((3, 8, 12))
    whole = newton_schulz_ref(x)
    torch.testing.assert_close(newton_schulz_ref(x[1:2]), whole[1:2])
    x[0] = float("nan")
    assert newton_schulz_ref(x)[1:].isfinite().all()
    assert newton_schulz_ref(x)[0].isnan().all()


def test_muon_plus_of_bf16_is_fp32():
    assert muon_plus_ref(random((1, 4, 4)).bfloat16()).dtype == torch.float32
