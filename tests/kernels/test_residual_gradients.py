import pytest
import torch

from nanofuse.bench.checks import DTYPES, assert_accurate, same_bits
from nanofuse.kernels.common.tuning import forced
from nanofuse.kernels.residual_gradients import (
    Config,
    _block_of,
    residual_gradients,
    residual_gradients_ref,
)

ROWS_OF_TABLES = 23, 9
SHAPES = [(1, 1, 1), (2, 3, 127), (4, 8, 128), (5, 9, 129), (3, 13, 97), (3, 5, 384), (2, 3, 768)]
FLOORS = {torch.float32: 1e-6, torch.bfloat16: 1e-3}


def make(shape, dtype, device, tables=1, seed=0):
    """Gradients (L, N, C), x0 (N, C), its lambdas (L,), and the lookups."""
    layers, n, c = shape
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=generator).to(device)

    grads, x0, lambdas = randn(layers, n, c).to(dtype), randn(n, c).to(dtype), randn(layers)
    lookups = []
    for count in ROWS_OF_TABLES[:tables]:
        rows = torch.randint(count, (n,), generator=generator).int().to(device)
        lookups.append((rows, randn(count, c).to(dtype), randn(layers)))
    return grads, x0, lambdas, tuple(lookups)


def reference(case, dtype, scalar):
    grads, x0, x0_lambdas, lookups = case
    looked_up = [
        (table[rows.long()].to(dtype), lambdas.to(scalar)) for rows, table, lambdas in lookups
    ]
    return residual_gradients_ref(grads.to(dtype), x0.to(dtype), x0_lambdas.to(scalar), looked_up)


def flat(gradients):
    """All tensors of what residual_gradients returns."""
    grad_x0, grad_x0_lambdas, of_tables = gradients
    return [grad_x0, grad_x0_lambdas, *(x for pair in of_tables for x in pair)]


@pytest.mark.parametrize("tables", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_gradients(shape, dtype, tables, device):
    case = make(shape, dtype, device, tables)
    got, truth = residual_gradients(*case), reference(case, torch.float64, torch.float64)
    same = reference(case, dtype, dtype)
    names = ["x0", "x0_lambdas", "e", "lambdas", "other e", "other lambdas"][: 2 + 2 * tables]
    for name, ours, theirs, exact in zip(names, flat(got), flat(same), flat(truth), strict=True):
        assert_accurate(name, ours, theirs, exact, FLOORS[dtype])


@pytest.mark.parametrize(
    "columns, block",
    [(1, 8), (100, 128), (256, 256), (384, 512), (640, 256), (768, 256), (1024, 1024),
     (1152, 256), (1280, 256), (1536, 512), (2048, 2048)],
)  # fmt: skip
def test_blocks_pad_little_and_fill_a_warp(columns, block):
    assert _block_of(columns) == block


@pytest.mark.parametrize("tables", [0, 2])
def test_groups_of_layers_accumulate(tables, device):
    """More layers than one launch takes (16) give what a single pass over all of them gives."""
    case = make((5, 9, 33), torch.float32, device, tables)
    whole = residual_gradients(*case)
    with forced("residual_gradients", Config(layers=2)):
        groups = residual_gradients(*case)
    for a, b in zip(flat(groups), flat(whole), strict=True):
        torch.testing.assert_close(a, b)


def test_layers_that_lie_apart(device):
    """Every other layer of a larger stack gives what a stack of those layers gives."""
    grads, x0, x0_lambdas, [(rows, table, lambdas)] = make((5, 38, 33), torch.float32, device)
    others = x0, x0_lambdas[:3], ((rows, table, lambdas[:3]),)
    apart = residual_gradients(grads[::2], *others)
    together = residual_gradients(grads[::2].contiguous(), *others)
    for a, b in zip(flat(apart), flat(together), strict=True):
        assert torch.equal(a, b)


def test_two_runs_give_the_same_bits_and_nan_shows(device):
    case = make((3, 30, 40), torch.float32, device)
    case[0][1, 17, 5] = torch.nan
    grad_x0, grad_x0_lambdas, grad_e, grad_lambdas = same_bits(
        lambda: flat(residual_gradients(*case))
    )
    assert grad_x0.isnan().sum() == 1 and grad_e[17, 5].isnan()
    assert grad_x0_lambdas.isnan().tolist() == [False, True, False]
    assert grad_lambdas.isnan().tolist() == [False, True, False]


def test_what_does_not_fit_is_refused(device):
    grads, x0, x0_lambdas, [(rows, table, lambdas)] = make((3, 30, 40), torch.float32, device)
    with pytest.raises(ValueError, match="x0_lambdas must be contiguous"):
        residual_gradients(grads, x0, x0_lambdas[:2])
    with pytest.raises(ValueError, match=r"grads\[0\] must be contiguous"):
        residual_gradients(grads[:, :, ::2], x0[:, ::2].contiguous(), x0_lambdas)
    with pytest.raises(ValueError, match="x0 must be contiguous"):
        residual_gradients(grads, x0[:5], x0_lambdas)
    for match, lookup in {
        r"rows must have shape \(30,\)": (rows[:5], table, lambdas),
        "rows must be torch.int32": (rows.long(), table, lambdas),
        r"table must have shape \(23, 40\)": (rows, table[:, :39].contiguous(), lambdas),
        r"table_lambdas must have shape \(3,\)": (rows, table, lambdas[:2]),
    }.items():
        with pytest.raises(ValueError, match=match):
            residual_gradients(grads, x0, x0_lambdas, (lookup,))


@pytest.mark.cuda
def test_sixteen_layers_of_a_micro_step(device):
    case = make((16, 32 * 2048, 1024), torch.bfloat16, device)
    grads, x0, x0_lambdas, [(table_rows, table, lambdas)] = case
    got = residual_gradients(*case)
    last = slice(-64, None)  # fp64 of all would be too much
    e = table[table_rows[last].long()].double()
    truth = residual_gradients_ref(
        grads[:, last].double(), x0[last].double(), x0_lambdas.double(), [(e, lambdas.double())]
    )
    for name, ours, exact in (("x0", got[0], truth[0]), ("e", got[2][0][0], truth[2][0][0])):
        assert_accurate(name, ours[last], exact.bfloat16(), exact)
    grad_x0_lambdas = torch.stack([(g.float() * x0.float()).sum() for g in grads])
    torch.testing.assert_close(got[1], grad_x0_lambdas, rtol=1e-4, atol=5.0)


@pytest.mark.cuda
@pytest.mark.large
def test_more_than_two_to_the_31_elements(device):
    layers, n, c = 3, 800_000, 1024
    grads = torch.zeros(layers, n, c, dtype=torch.bfloat16, device=device)
    grads[-1, -1] = 1.0
    x0 = torch.ones(n, c, dtype=torch.bfloat16, device=device)
    lambdas = torch.tensor([2.0, 3.0, 4.0], device=device)
    grad_x0, grad_x0_lambdas, _ = residual_gradients(grads, x0, lambdas)
    assert (grad_x0[-1] == 4).all() and (grad_x0[-2] == 0).all()
    assert grad_x0_lambdas.tolist() == [0.0, 0.0, 1024.0]
