import pytest
import torch

from nanofuse.bench.checks import ON_GPU, assert_accurate, same_bits
from nanofuse.kernels.newton_schulz import (
    _plain_scale,
    compute_dtype,
    equilibrate_ref,
    initial_scale,
    muon_plus_ref,
    newton_schulz,
    newton_schulz_ref,
    orthogonalize,
    polar_express_ref,
    rescale,
    unit_rows,
)
from nanofuse.kernels.symmetric_matmul import MatmulTile
from tests.train.optim.reference import POLAR_EXPRESS

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
    """Against an SVD: singular vectors stay, each singular value passes through the polynomials."""
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


@pytest.mark.parametrize("mode", ["row", "col"])
def test_equilibration_shrinks_below_its_floor(mode):
    """Norms of 1e-8, 1e-6 and 1 come out as 0.01, 1 and 1 of the root-mean-square norm."""
    x = random((1, 3, 50))
    x *= (
        torch.tensor([1e-8, 1e-6, 1.0])[:, None].double()
        / torch.linalg.vector_norm(x, dim=-1)[..., None]
    )
    whole = torch.linalg.matrix_norm(x)
    y = equilibrate_ref(x, "row") if mode == "row" else equilibrate_ref(x.mT, "col").mT
    norms = torch.linalg.vector_norm(y[0], dim=-1) / (whole / 3**0.5)
    torch.testing.assert_close(norms, torch.tensor([0.01, 1.0, 1.0]).double())


def test_muon_plus_has_a_floor():
    x = random((1, 4, 9))
    for norm, expected in ((1e-8, 0.02), (1e-6, 2.0), (1e-3, 2.0)):
        y = muon_plus_ref(x * norm / torch.linalg.matrix_norm(x))
        assert torch.linalg.matrix_norm(y).item() == pytest.approx(expected)


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


# The kernels. The interpreter computes in fp32, where rounding errors grow by up to 1000 in the
# directions of small singular values and more in the Gram iteration; GPUs take bf16 inputs.
KERNEL_FLOOR = 5e-5
AWKWARD = [
    (1, 1, 1), (2, 1, 9), (2, 9, 1), (2, 5, 12), (1, 7, 8), (2, 13, 13), (1, 31, 33), (1, 32, 32),
    (1, 63, 37), (1, 33, 67), (2, 40, 24),
]  # fmt: skip
ADVERSARIAL = [
    "zeros", "rank 1", "low rank", "decay", "zero row", "huge", "tiny", "uneven rows", "floor",
    "below the floor",
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles per matrix at small sizes in the interpreter, whose dot is slow."""
    if not ON_GPU:
        tile = MatmulTile(rows=32, cols=32, depth=32, warps=4, stages=3)
        monkeypatch.setattr("nanofuse.kernels.symmetric_matmul.SYMMETRIC_TILE", tile)
        monkeypatch.setattr("nanofuse.kernels.symmetric_matmul.TILE", tile)


def working_dtype(device):
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def adversarial(name, shape):
    """(N, R, C) fp64 with an awkward spectrum or scale."""
    n, rows, cols = shape
    rank = min(rows, cols)
    x = random(shape)
    if name == "zeros":
        return torch.zeros_like(x)
    if name == "rank 1":
        return random((n, rows, 1), 1) @ random((n, 1, cols), 2)
    if name == "low rank":
        return random((n, rows, 2), 1) @ random((n, 2, cols), 2) + 0.01 * x
    if name == "decay":
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        return u * torch.logspace(0, -3, rank, dtype=torch.float64) @ vh
    if name == "zero row":
        x[:, rows // 2] = 0
    if name == "uneven rows":
        x *= torch.logspace(-6, 6, rows, dtype=torch.float64)[:, None]
    if name == "floor":  # rows on both sides of it
        x *= torch.logspace(-12, -2, rows, dtype=torch.float64)[:, None]
    return x * {"huge": 1e15, "tiny": 1e-15, "below the floor": 1e-9}.get(name, 1.0)


def assert_orthogonalised(name, x, equilibration="row", muon_plus=True, gram="auto"):
    truth = newton_schulz_ref(x.double(), equilibration, muon_plus)
    y = newton_schulz(x, equilibration, muon_plus, gram)
    assert y.dtype == torch.float32 and y.is_contiguous()
    torch_result = newton_schulz_ref(x, equilibration, muon_plus)
    assert_accurate(name, y, torch_result, truth, floor=KERNEL_FLOOR)
    return y


@pytest.mark.parametrize("shape", AWKWARD, ids=str)
def test_kernels_on_awkward_shapes(shape, device):
    assert_orthogonalised("awkward", random(shape).to(device, working_dtype(device)))


@pytest.mark.parametrize("shape", [(2, 24, 24), (1, 40, 16)], ids=str)
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_kernels_on_adversarial_spectra(name, shape, device):
    x = adversarial(name, shape).to(device, working_dtype(device))
    y = assert_orthogonalised(name, x)
    assert (y[x.abs().sum(dim=-1) == 0] == 0).all()  # rows of zeros stay zero


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("shape", [(1, 24, 56), (1, 56, 24), (1, 24, 24)], ids=str)
def test_gram_and_plain_iteration(shape, gram, device):
    assert_orthogonalised("gram", random(shape).to(device, working_dtype(device)), gram=gram)


@pytest.mark.parametrize("muon_plus", [False, True])
@pytest.mark.parametrize("equilibration", ["row", "col", "none"])
def test_kernels_in_all_modes(equilibration, muon_plus, device):
    """With matrices of which one is below every floor, and one whose columns are on both sides."""
    x = random((3, 24, 40)).to(device, working_dtype(device))
    x[1] *= 1e-13
    x[2] *= torch.logspace(-10, -4, 40, device=device)
    assert_orthogonalised(equilibration, x, equilibration, muon_plus)
    for i in range(3):  # alone: the norm of all would hide the small ones
        assert_orthogonalised(f"matrix {i}", x[i : i + 1], equilibration, muon_plus)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(5, 24, 40), (5, 67, 131)], ids=str)
def test_rows_below_the_floor_keep_their_precision(shape, dtype, device, monkeypatch):
    """sigma * z is X after steps 1 and 2, row by row, also where every row is tiny."""
    monkeypatch.setattr("nanofuse.kernels.newton_schulz.compute_dtype", lambda _: dtype)
    x = random(shape).to(device)
    sizes = [1.0, 1e-9, 1e-12, 0.0, 1.0]
    x *= torch.tensor(sizes, dtype=torch.float64, device=device)[:, None, None]
    x[4] *= torch.logspace(-8, 0, shape[1], dtype=torch.float64, device=device)[:, None]
    x[4, 3] = 0
    z, norms = unit_rows(x.float())
    whole = z.clone()
    sigma = initial_scale(z, norms)
    assert torch.equal(z[0], whole[0])  # no row to shrink: no bit moves
    longest = torch.linalg.vector_norm(z.double(), dim=-1).amax(dim=1)
    torch.testing.assert_close(
        longest, (norms.double().amax(dim=1) > 0).double(), rtol=1e-3, atol=0
    )
    expected = equilibrate_ref(x, "row")
    frobenius = torch.linalg.matrix_norm(expected)[:, None, None]
    expected = expected / (1.01 * frobenius + 1e-6)
    error = torch.linalg.vector_norm(sigma.double()[:, None, None] * z.double() - expected, dim=-1)
    relative = error / torch.linalg.vector_norm(expected, dim=-1).clamp_min(1e-300)
    assert relative[:4].max() < (1e-3 if dtype == torch.float16 else 1e-6)
    share = torch.linalg.vector_norm(z[4].double(), dim=-1)
    normal = share > 1e-2  # beside longer rows, shorter ones are subnormal in fp16
    assert normal.sum() > 5 and relative[4][normal].max() < (
        3e-3 if dtype == torch.float16 else 1e-6
    )
    assert not z[3].any() and not z[4, 3].any() and sigma.isfinite().all()


@pytest.mark.parametrize("size", [1e-25, 1e-12, 1.0, 1e12])
def test_the_scale_without_rows_holds_what_fp32_cannot_square(size, device, monkeypatch):
    monkeypatch.setattr("nanofuse.kernels.newton_schulz.compute_dtype", lambda _: torch.float16)
    x = random((1, 24, 40)).to(device) * size
    z, sigma = _plain_scale(x.float())
    norm = torch.linalg.matrix_norm(z.double()).item()
    assert norm == pytest.approx(24**0.5, rel=1e-3)
    expected = x / (1.01 * torch.linalg.matrix_norm(x)[:, None, None] + 1e-6)
    torch.testing.assert_close(sigma.double() * z.double(), expected, rtol=2e-3, atol=0.0)


def test_kernels_against_the_polar_factor(device):
    """Singular values lie in Polar Express's band; singular vectors are those of equilibrated x."""
    x = random((2, 32, 64)).to(device, working_dtype(device))
    y = newton_schulz(x, muon_plus=False).double()
    u, _, vh = torch.linalg.svd(equilibrate_ref(x.double(), "row"), full_matrices=False)
    core = u.mT @ y @ vh.mT  # diagonal, in the band
    sigma = core.diagonal(dim1=-2, dim2=-1)
    assert 0.85 < sigma.min() and sigma.max() < 1.15
    assert (core - torch.diag_embed(sigma)).norm() < 0.02 * core.norm()


@pytest.mark.parametrize("shape", [(2, 13, 40), (2, 40, 13), (1, 24, 24), (1, 3, 4100)], ids=str)
def test_the_parts(shape, device):
    x = random(shape).to(device, working_dtype(device))
    x[0, 1] = 0
    z, norms = unit_rows(x)
    assert z.dtype == compute_dtype(device)
    expected = torch.linalg.vector_norm(x.double(), dim=-1)
    torch.testing.assert_close(norms.double(), expected, rtol=1e-6, atol=0)
    rows = torch.linalg.vector_norm(z.double(), dim=-1)
    torch.testing.assert_close(rows, (expected > 0).double(), rtol=1e-3, atol=0)
    sigma = initial_scale(z, norms)
    whole = torch.linalg.matrix_norm(sigma.double()[:, None, None] * z.double())
    torch.testing.assert_close(whole, torch.full_like(whole, 1 / 1.01), rtol=1e-3, atol=0)
    y, sumsq = orthogonalize(z, sigma)
    assert y.dtype == working_dtype(device)
    squares = y.double().square().sum(dim=2 if shape[1] >= shape[2] else 1)
    torch.testing.assert_close(sumsq.double(), squares, rtol=1e-5, atol=1e-12)
    whole = torch.linalg.matrix_norm(rescale(y, sumsq).double())
    expected = torch.full_like(whole, min(shape[1:]) ** 0.5)
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(3, 12, 12), (3, 8, 20)], ids=str)
def test_nan_and_inf_show_in_their_matrix_only(shape, bad, device):
    x = random(shape).to(device, working_dtype(device))
    clean = newton_schulz(x)
    x[1, 2, 3] = bad
    y = newton_schulz(x)
    assert y[1].isnan().all() and torch.equal(y[::2], clean[::2])


def test_two_runs_of_the_kernels_give_the_same_bits(device):
    x = random((2, 40, 16)).to(device, working_dtype(device))
    copy = x.clone()
    same_bits(lambda: (newton_schulz(x),))
    assert torch.equal(x, copy)


def test_refused_inputs(device):
    x = torch.zeros(2, 8, 16, device=device)
    for wrong in (x.mT, x[0], x.double(), x.half()):
        with pytest.raises(ValueError, match="contiguous"):
            newton_schulz(wrong)
    with pytest.raises(ValueError, match="row, col, none"):
        newton_schulz(x, "both")
    with pytest.raises(ValueError, match="gram"):
        newton_schulz(x, gram="maybe")
    sigma = torch.zeros(2, device=device)
    more = [torch.zeros(count, device=device) for count in (1, 3)]
    flat = x[0], torch.zeros(8, device=device)
    for wrong in (*((x, each) for each in more), flat, (x.mT, sigma)):
        with pytest.raises(ValueError, match="orthogonalize takes a contiguous z"):
            orthogonalize(*wrong)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("name", ["random", *ADVERSARIAL])
@pytest.mark.parametrize("shape", [(2, 128, 256), (1, 1024, 256)], ids=str)
def test_spectra_at_larger_sizes(shape, name, gram, dtype, device):
    """Against PyTorch in bf16 for fp32 and bf16 inputs: the iteration runs in fp16 for both."""
    x = adversarial(name, shape).to(device, dtype)
    y = newton_schulz(x, gram=gram)
    torch_result = newton_schulz_ref(x.bfloat16())
    assert_accurate(name, y, torch_result, newton_schulz_ref(x.double()))


@pytest.mark.cuda
@pytest.mark.parametrize(
    "shape",
    [
        (4, 256, 256), (4, 1024, 256), (4, 256, 1024),
        (4, 768, 768), (4, 3072, 768), (4, 768, 3072),
        (4, 1024, 1024), (4, 4096, 1024), (4, 1024, 4096),
    ],
    ids=str,
)  # fmt: skip
def test_model_shapes(shape, device):
    x = random(shape).to(device, torch.bfloat16)
    same_bits(lambda: (newton_schulz(x),))
    assert_orthogonalised("model", x)


@pytest.mark.cuda
@pytest.mark.large
def test_more_than_two_to_the_31_elements_in_newton_schulz(device):
    x = torch.zeros(2049, 1024, 1024, dtype=torch.bfloat16, device=device)
    x[-1] = random((1024, 1024)).to(device)
    z, norms = unit_rows(x)
    y, sumsq = orthogonalize(z, initial_scale(z, norms))
    del z, x
    last = rescale(y[-1:], sumsq[-1:])
    y = rescale(y[-2:], sumsq[-2:])
    assert (y[0] == 0).all() and torch.equal(y[1], last[0])
    torch.testing.assert_close(y[1].norm().item(), 32.0, rtol=1e-4, atol=0)
