import pytest
import torch

from nanofuse.bench.checks import DTYPES, assert_accurate, assert_fp8, same_bits
from nanofuse.kernels.bigram_rows import bigram_rows, bigram_rows_ref
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

ROWS_OF_TABLES = 23, 9
LAMBDAS = {"resid_lambda": 1.1, "x0_lambda": 0.2}
TABLE_LAMBDAS = 0.4, -0.3
#            B, T, C: one element, 2^k - 1, 2^k, 2^k + 1, a prime, several blocks of rows
SHAPES = [(1, 1, 1), (1, 31, 127), (2, 16, 128), (3, 11, 129), (1, 67, 97), (2, 40, 260)]


class Case:
    """Random inputs in one dtype; `leaves` are those that require a gradient."""

    def __init__(self, shape, dtype, device, branch=True, tables=1, x0=True, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def randn(*size):
            return torch.randn(*size, generator=generator).to(device, dtype).requires_grad_()

        b, t, c = shape
        self.tokens = torch.randint(50, (b, t), generator=generator).to(device)
        self.rows = [bigram_rows(self.tokens, count) for count in ROWS_OF_TABLES[:tables]]
        self.leaves = {"x": randn(b, t, c)}
        if branch:
            self.leaves["branch"] = randn(b, t, c)
        if x0:
            self.leaves["x0"] = randn(b, t, c)
        for i in range(tables):
            self.leaves[f"table{i}"] = randn(ROWS_OF_TABLES[i], c)
        scalars = dict(LAMBDAS) if x0 else {}
        scalars |= {f"lambda{i}": TABLE_LAMBDAS[i] for i in range(tables)}
        for name, value in scalars.items():
            self.leaves[name] = torch.tensor(value, device=device).requires_grad_()
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
        looked_up = []
        for i in range(len(case.rows)):
            table = leaves[f"table{i}"]
            rows = bigram_rows_ref(case.tokens, table.size(0))
            looked_up.append((table[rows], leaves[f"lambda{i}"]))
        y = residual_mix_ref(
            x, leaves["x0"], leaves["resid_lambda"], leaves["x0_lambda"], looked_up
        )
    normed = rms_norm_ref(y)
    grads = torch.autograd.grad(
        [y, normed], list(leaves.values()), [u.to(dtype) for u in case.upstream]
    )
    return {"y": y, "normed": normed, **dict(zip(leaves, grads, strict=True))}


def mixed(case):
    """y and normed by the kernel."""
    leaves = dict(case.leaves)
    lookups = [
        (rows, leaves.pop(f"table{i}"), leaves.pop(f"lambda{i}"))
        for i, rows in enumerate(case.rows)
    ]
    return residual_mix(**leaves, lookups=lookups)


def kernel(case):
    y, normed = mixed(case)
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
def test_all_gradients_with_a_table(shape, dtype, device):
    compare(Case(shape, dtype, device), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_gradients_with_two_tables(dtype, device):
    compare(Case((2, 19, 130), dtype, device, tables=2), dtype)


@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("x0", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_table(dtype, x0, branch, device):
    compare(Case((2, 19, 130), dtype, device, branch=branch, tables=0, x0=x0), dtype)


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
        case.leaves["table0"][-1] = 1000.0
    y, _ = mixed(case)
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
        y, rstd, normed = residual_mix_fwd(x, branch)
        same, same_rstd, operand = residual_mix_fwd(x, branch, scaling=scaling)
    torch.testing.assert_close(y, x + branch)
    torch.testing.assert_close(normed, rms_norm_ref(x + branch))
    assert_fp8("normed", operand, normed, scaling)
    assert torch.equal(same, y)
    torch.testing.assert_close(same_rstd, rstd, rtol=1e-6, atol=0)  # of two kernels on a GPU


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


def test_the_sum_is_written_where_it_is_wanted(device):
    y, h, stream, *_ = operand_case(device, torch.bfloat16)
    rstd = y.float().square().mean(dim=-1).add(2.0**-23).rsqrt()
    sums = torch.full((3,), 7.0, device=device)
    _, wanted, _ = residual_mix_bwd(h, y, rstd, stream, x=y)
    _, found, _ = residual_mix_bwd(h, y, rstd, stream, x=y, sum_out=sums[1])
    assert found.data_ptr() == sums[1].data_ptr()
    assert sums.tolist() == [7.0, wanted.item(), 7.0]


def test_nan_stays_in_its_row_and_inf_shows(device):
    case = Case((1, 40, 24), torch.float32, device)
    with torch.no_grad():
        case.leaves["x"][0, 7, 3] = torch.nan
        case.leaves["x"][0, 33, 3] = torch.inf
    y, normed = mixed(case)
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
    scalar, ids = torch.ones((), device=device), torch.zeros(4, dtype=torch.int32, device=device)
    for match, lookup in {
        r"rows must have shape \(4,\)": (ids[:3], x, scalar),
        "rows must be torch.int32": (ids.long(), x, scalar),
        r"table must have shape \(4, 8\)": (ids, x.repeat(1, 2), scalar),
        "table must be contiguous": (ids, x.repeat(1, 2)[:, :8], scalar),
        "table_lambda must have one element": (ids, x, x),
    }.items():
        with pytest.raises(ValueError, match=match):
            residual_mix_fwd(x, None, x, (lookup,))
    for match, arguments in {
        "lookups need x0": {"lookups": ((ids[None], x, scalar),)},
        "x0 and x0_lambda": {"x0": x[None]},
        "branch must be contiguous": {"branch": x.t()[None]},
        "rows must be": {
            "x0": x[None], "x0_lambda": scalar, "lookups": ((ids.view(2, 2), x, scalar),),
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
@pytest.mark.large
def test_more_than_two_to_the_31_elements(device):
    n, c = (1 << 21) + 48, 1024
    x = torch.zeros(n, c, dtype=torch.bfloat16, device=device)
    x[-1], x[0] = 3.0, 2.0
    scaling = Scaling.from_bound(32.0, E4M3, device)
    y, rstd, operand = residual_mix_fwd(x, scaling=scaling)
    normed = residual_mix_fwd(x)[2]
    assert torch.equal(y[-1], x[-1]) and (normed[-1] == 1).all() and (normed[0] == 1).all()
    assert (operand.data[-1].float() == 14).all()
    assert (operand.transposed[:, -1].float() == 14).all()
    assert (operand.transposed[:, -2].float() == 0).all()
    grad, _, _ = residual_mix_bwd(x, y, rstd, x)
    torch.testing.assert_close(grad[-1], x[-1], rtol=0.01, atol=0)
    assert (grad[-2] == 0).all()
