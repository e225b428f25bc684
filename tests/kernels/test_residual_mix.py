import pytest
import torch

from nanofuse.bench.checks import DTYPES, assert_accurate, assert_fp8, same_bits
from nanofuse.kernels.bigram_rows import bigram_embedding_ref
from nanofuse.kernels.common.fp8 import E4M3, E5M2, Scaling
from nanofuse.kernels.common.lanes import LANE
from nanofuse.kernels.common.rms_norm import rms_norm_ref
from nanofuse.kernels.common.tuning import forced
from nanofuse.kernels.residual_mix import (
    RowTile,
    _tile,
    residual_mix,
    residual_mix_bwd,
    residual_mix_fwd,
    residual_mix_ref,
)

ROWS_OF_TABLE = 23
LAMBDAS = {"resid_lambda": 1.1, "x0_lambda": 0.2, "bigram_lambda": 0.4}
#            B, T, C: one element, 2^k - 1, 2^k, 2^k + 1, a prime, several blocks of rows
SHAPES = [(1, 1, 1), (1, 31, 127), (2, 16, 128), (3, 11, 129), (1, 67, 97), (2, 40, 260)]


class Case:
    """Random inputs in one dtype; `leaves` are those that require a gradient."""

    def __init__(self, shape, dtype, device, branch=True, bigram=True, x0=True, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def randn(*size):
            return torch.randn(*size, generator=generator).to(device, dtype).requires_grad_()

        b, t, c = shape
        self.tokens = torch.randint(50, (b, t), generator=generator).to(device)
        self.leaves = {"x": randn(b, t, c)}
        if branch:
            self.leaves["branch"] = randn(b, t, c)
        if x0:
            self.leaves["x0"] = randn(b, t, c)
        if bigram:
            self.leaves["table"] = randn(ROWS_OF_TABLE, c)
        names = ["resid_lambda"] * x0 + ["x0_lambda"] * x0 + ["bigram_lambda"] * bigram
        for name in names:
            self.leaves[name] = torch.tensor(LAMBDAS[name], device=device).requires_grad_()
        self.upstream = [randn(b, t, c).detach() for _ in range(2)]


def reference(case, dtype):
    """y, normed and the gradients of all leaves through the references in `dtype`."""
    scalar = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {
        name: v.detach().to(dtype if v.dim() else scalar).requires_grad_()
        for name, v in case.leaves.items()
    }
    x = leaves["x"]
    if "branch" in leaves:
        x = x + leaves["branch"]
    y = x
    if "x0" in leaves:
        e = None
        if "table" in leaves:
            e = bigram_embedding_ref(case.tokens, leaves["table"])
        y = residual_mix_ref(
            x, leaves["x0"], leaves["resid_lambda"], leaves["x0_lambda"], e,
            leaves.get("bigram_lambda"),
        )  # fmt: skip
    normed = rms_norm_ref(y)
    grads = torch.autograd.grad(
        [y, normed], list(leaves.values()), [u.to(dtype) for u in case.upstream]
    )
    return {"y": y, "normed": normed, **dict(zip(leaves, grads, strict=True))}


def kernel(case):
    tokens = case.tokens if "table" in case.leaves else None
    y, normed = residual_mix(**case.leaves, tokens=tokens)
    grads = torch.autograd.grad([y, normed], list(case.leaves.values()), case.upstream)
    return {"y": y, "normed": normed, **dict(zip(case.leaves, grads, strict=True))}


def compare(case, dtype):
    truth, baseline, ours = reference(case, torch.float64), reference(case, dtype), kernel(case)
    # a lambda's gradient is a single number, in which the baseline's error may happen to be tiny;
    # so an error that is small against the summed terms passes too
    x = sum(v.detach().double().norm() for v in case.leaves.values() if v.dim() == 3)
    terms = truth["x"].norm() * x
    for name, value in ours.items():
        if value.dim():
            floor = 1e-6 if dtype == torch.float32 else 1e-3
            assert_accurate(name, value, baseline[name], truth[name], floor)
        else:
            limit = 1e-6 if dtype == torch.float32 else 2e-3
            ours_off, theirs_off = (
                (v.double() - truth[name]).abs() for v in (value, baseline[name])
            )
            assert ours_off <= max(limit * terms, 2 * theirs_off), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_gradients_with_bigram(shape, dtype, device):
    compare(Case(shape, dtype, device), dtype)


@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("x0", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_the_bigram_term(dtype, x0, branch, device):
    compare(Case((2, 19, 130), dtype, device, branch=branch, bigram=False, x0=x0), dtype)


@pytest.mark.parametrize(
    ("width", "cols", "warps"), [(1280, 512, 16), (512, 512, 16), (256, 256, 8), (1, 32, 1)]
)
def test_narrow_rows_take_narrow_tiles(width, cols, warps):
    tile, op = RowTile(32, 512, 16), "residual_norm_bwd"
    with forced(op, tile):
        narrow = _tile(op, tile, torch.empty(1, width, dtype=torch.bfloat16))
        wide = _tile(op, tile, torch.empty(1, 1280))
    assert (narrow.cols, narrow.warps) == (cols, warps)
    assert (wide.cols, wide.warps) == (256, 16)
    with forced(op, RowTile(64, 64, 8)):
        assert _tile(op, tile, torch.empty(1, 1)).cols == LANE.value


def test_reserved_row_serves_position_zero_only(device):
    case = Case((3, 5, 16), torch.float32, device)
    with torch.no_grad():
        case.leaves["table"][-1] = 1000.0
    y, _ = residual_mix(**case.leaves, tokens=case.tokens)
    big = y.abs().amax(dim=-1) > 100
    assert big[:, 0].all() and not big[:, 1:].any()


# fp32 tiles have half the columns: a row fits one block, or takes five
BLOCKS = pytest.mark.parametrize("tile", [RowTile(32, 512, 8), RowTile(32, 64, 4)], ids=str)


def operand_case(device, dtype=torch.float32):
    """48 x 144: ragged in rows and columns."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(48, 144, generator=generator).to(device, dtype) for _ in range(5)]


@BLOCKS
def test_fp8_forward_is_the_rounded_norm(tile, device):
    x, branch, *_ = operand_case(device)
    scaling = Scaling.from_bound(12.0, E4M3, device)
    with forced("residual_norm_fwd", tile):
        y, rstd, normed, operand = residual_mix_fwd(x, branch, scaling=scaling)
    torch.testing.assert_close(y, x + branch)
    torch.testing.assert_close(normed, rms_norm_ref(x + branch))
    assert_fp8("normed", operand, normed, scaling)
    with forced("residual_norm_fwd", tile):
        without = residual_mix_fwd(x, branch, scaling=scaling, want_normed=False)
    assert without[2] is None and torch.equal(without[0], y) and torch.equal(without[1], rstd)


@BLOCKS
@pytest.mark.parametrize("x_is_y", [False, True])
def test_fp8_backward_is_the_branch_gradient(x_is_y, tile, device, monkeypatch):
    y, h, stream, x, out = operand_case(device)
    x = y if x_is_y else x
    rstd = y.square().mean(dim=-1).add(2.0**-23).rsqrt()
    resid, stream_scale = (torch.tensor([v], device=device) for v in (1.3, 0.7))
    scaling = Scaling.from_bound(40.0, E5M2, device)
    monkeypatch.setattr(torch, "empty_like", None)  # no plain gradient is allocated
    with forced("residual_mix_bwd", tile):
        grad, grad_resid_lambda, operand = residual_mix_bwd(
            h, y, rstd, stream, stream_scale, x, resid, scaling, out
        )
    monkeypatch.undo()
    assert grad.data_ptr() == out.data_ptr()
    leaf = y.double().requires_grad_()
    (expected,) = torch.autograd.grad(rms_norm_ref(leaf), leaf, h.double())
    expected = expected + 0.7 * stream.double()
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-5)
    assert_fp8("branch gradient", operand, 1.3 * grad, scaling)
    torch.testing.assert_close(
        grad_resid_lambda.double(), (expected * x.double()).sum(), rtol=1e-4, atol=1e-2
    )


@BLOCKS
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_backward_is_the_branch_gradient(dtype, tile, device):
    y, h, stream, *_ = operand_case(device, dtype)
    rstd = y.float().square().mean(dim=-1).add(2.0**-23).rsqrt()
    resid = torch.tensor([1.3], device=device)
    with forced("residual_norm_bwd", tile):
        grad, _, branch = residual_mix_bwd(h, y, rstd, stream, resid_lambda=resid)
        same, _, without = residual_mix_bwd(h, y, rstd, stream)
    assert without is same and torch.equal(same, grad) and branch.dtype == dtype
    # grad and branch are both rounded from fp32, so they differ by half an ulp of each
    rtol = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(branch.double(), 1.3 * grad.double(), rtol=rtol, atol=1e-6)


def test_nan_stays_in_its_row_and_inf_shows(device):
    case = Case((1, 40, 24), torch.float32, device)
    with torch.no_grad():
        case.leaves["x"][0, 7, 3] = torch.nan
        case.leaves["x"][0, 33, 3] = torch.inf
    y, normed = residual_mix(**case.leaves, tokens=case.tokens)
    assert normed[0, 7].isnan().all() and y[0, 33, 3] == torch.inf and normed[0, 33].isnan().any()
    clean = torch.ones(40, dtype=torch.bool)
    clean[[7, 33]] = False
    assert normed[0, clean].isfinite().all()


def test_two_runs_give_the_same_bits(device):
    case = Case((2, 50, 70), torch.float32, device)
    same_bits(lambda: list(kernel(case).values()))


def test_what_does_not_fit_is_refused(device):
    x = torch.randn(4, 8, device=device)
    with pytest.raises(ValueError, match="branch must be contiguous and of shape"):
        residual_mix_fwd(x, x[:, :4])
    with pytest.raises(ValueError, match="x must be contiguous"):
        residual_mix_fwd(x.t())
    with pytest.raises(ValueError, match="tokens"):
        tokens = torch.zeros(1, 3, dtype=torch.int64, device=device)
        residual_mix_fwd(x, None, x, tokens, torch.zeros(9, 8, device=device))
    with pytest.raises(ValueError, match="at least 2 rows"):
        residual_mix_fwd(x, None, x, tokens.new_zeros(1, 4), x[:1])
    scalar, ids = torch.ones((), device=device), tokens.new_zeros(1, 4)
    for match, arguments in {
        "bigram_lambda and x0 go together": {"table": x, "tokens": ids, "bigram_lambda": scalar},
        "tokens, table, bigram_lambda": {"x0": x[None], "x0_lambda": scalar, "table": x},
        "x0 and x0_lambda": {"x0": x[None]},
        "branch must be contiguous": {"branch": x.t()[None]},
        "tokens must be": {
            "x0": x[None], "x0_lambda": scalar, "table": x, "tokens": ids.view(2, 2),
            "bigram_lambda": scalar,
        },
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=match):
            residual_mix(x[None], **arguments)
    scaling = Scaling.from_bound(12.0, E4M3, device)
    y, h = torch.randn(2, 16 * 32 + 1, device=device)[:, 1:].view(2, 16, 32)
    with pytest.raises(ValueError, match="x must start at a multiple of 16 bytes"):
        residual_mix_fwd(y, scaling=scaling)
    with pytest.raises(ValueError, match="grad_normed must start at a multiple of 16 bytes"):
        residual_mix_bwd(h, y.clone(), torch.ones(16, device=device), scaling=scaling)


@pytest.mark.cuda
@pytest.mark.parametrize("width", [256, 768, 1024, 1280])
def test_training_shapes(width, device):
    compare(Case((4, 2048, width), torch.bfloat16, device), torch.bfloat16)


@pytest.mark.cuda
def test_more_than_two_to_the_31_elements(device):
    n, c = (1 << 21) + 48, 1024
    x = torch.zeros(n, c, dtype=torch.bfloat16, device=device)
    x[-1], x[0] = 3.0, 2.0
    scaling = Scaling.from_bound(32.0, E4M3, device)
    y, rstd, normed, operand = residual_mix_fwd(x, scaling=scaling)
    assert torch.equal(y[-1], x[-1]) and (normed[-1] == 1).all() and (normed[0] == 1).all()
    assert (operand.data[-1].float() == 14).all()
    assert (operand.transposed[:, -1].float() == 14).all()
    assert (operand.transposed[:, -2].float() == 0).all()
    grad, _, _ = residual_mix_bwd(x, y, rstd, x)
    torch.testing.assert_close(grad[-1], x[-1], rtol=0.01, atol=0)
    assert (grad[-2] == 0).all()
