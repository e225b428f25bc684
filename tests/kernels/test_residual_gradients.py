import pytest
import torch

from nanofuse.bench.checks import DTYPES, assert_accurate, same_bits
from nanofuse.kernels.bigram_rows import bigram_embedding_ref
from nanofuse.kernels.common.tuning import forced
from nanofuse.kernels.residual_gradients import Config, residual_gradients, residual_gradients_ref

ROWS_OF_TABLE = 23
SHAPES = [(1, 1, 1, 1), (2, 1, 3, 127), (4, 2, 4, 128), (5, 1, 9, 129), (3, 1, 13, 97)]
FLOORS = {torch.float32: 1e-6, torch.bfloat16: 1e-3}


def make(shape, dtype, device, seed=0):
    layers, b, t, c = shape
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(50, (b, t), generator=generator).to(device)
    sizes = [(layers, b * t, c), (b * t, c), (ROWS_OF_TABLE, c)]
    tensors = [torch.randn(s, generator=generator).to(device, dtype) for s in sizes]
    lambdas = [torch.randn(layers, generator=generator).to(device) for _ in range(2)]
    return tokens, *tensors, *lambdas


def reference(case, dtype, scalar):
    tokens, grads, x0, table, x0_lambdas, bigram_lambdas = case
    e = bigram_embedding_ref(tokens, table).view(x0.shape)
    return residual_gradients_ref(
        grads.to(dtype), x0.to(dtype), x0_lambdas.to(scalar), e.to(dtype), bigram_lambdas.to(scalar)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_four_gradients(shape, dtype, device):
    case = make(shape, dtype, device)
    tokens, grads, x0, table, x0_lambdas, bigram_lambdas = case
    got = residual_gradients(grads, x0, x0_lambdas, tokens, table, bigram_lambdas)
    truth, same = reference(case, torch.float64, torch.float64), reference(case, dtype, dtype)
    names = ("x0", "x0_lambdas", "e", "bigram_lambdas")
    for name, ours, theirs, exact in zip(names, got, same, truth, strict=True):
        assert_accurate(name, ours, theirs, exact, FLOORS[dtype])


def test_without_a_table(device):
    _, grads, x0, _, x0_lambdas, _ = make((3, 1, 9, 33), torch.float32, device)
    got = residual_gradients(grads, x0, x0_lambdas)
    expected = residual_gradients_ref(grads, x0, x0_lambdas)
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])
    assert got[2] is None and got[3] is None


def test_groups_of_layers_accumulate(device):
    """More layers than one launch takes (16) give what a single pass over all of them gives."""
    tokens, grads, x0, table, x0_lambdas, bigram_lambdas = make(
        (5, 1, 9, 33), torch.float32, device
    )
    args = grads, x0, x0_lambdas, tokens, table, bigram_lambdas
    whole = residual_gradients(*args)
    with forced("residual_gradients", Config(layers=2)):
        groups = residual_gradients(*args)
    for a, b in zip(groups, whole, strict=True):
        torch.testing.assert_close(a, b)


def test_layers_that_lie_apart(device):
    """Every other layer of a larger stack gives what a stack of those layers gives."""
    tokens, grads, x0, table, x0_lambdas, bigram_lambdas = make(
        (5, 2, 19, 33), torch.float32, device
    )
    lambdas = x0_lambdas[:3], tokens, table, bigram_lambdas[:3]
    apart = residual_gradients(grads[::2], x0, *lambdas)
    together = residual_gradients(grads[::2].contiguous(), x0, *lambdas)
    for a, b in zip(apart, together, strict=True):
        assert torch.equal(a, b)


def test_two_runs_give_the_same_bits_and_nan_shows(device):
    tokens, grads, x0, table, x0_lambdas, bigram_lambdas = make(
        (3, 1, 30, 40), torch.float32, device
    )
    grads[1, 17, 5] = torch.nan

    def run():
        return residual_gradients(grads, x0, x0_lambdas, tokens, table, bigram_lambdas)

    grad_x0, grad_x0_lambdas, grad_e, grad_bigram_lambdas = same_bits(run)
    assert grad_x0.isnan().sum() == 1 and grad_e[17, 5].isnan()
    assert (
        grad_x0_lambdas.isnan().tolist()
        == grad_bigram_lambdas.isnan().tolist()
        == [False, True, False]
    )


def test_what_does_not_fit_is_refused(device):
    tokens, grads, x0, table, x0_lambdas, bigram_lambdas = make(
        (3, 1, 30, 40), torch.float32, device
    )
    with pytest.raises(ValueError, match="x0_lambdas must be contiguous"):
        residual_gradients(grads, x0, x0_lambdas[:2])
    with pytest.raises(ValueError, match=r"grads\[0\] must be contiguous"):
        residual_gradients(grads[:, :, ::2], x0[:, ::2].contiguous(), x0_lambdas)
    with pytest.raises(ValueError, match="x0 must be contiguous"):
        residual_gradients(grads, x0[:5], x0_lambdas)
    for match, arguments in {
        "go together": (tokens, table),
        "30 contiguous tokens": (tokens[:, :5], table, bigram_lambdas),
        "a table of 2 rows": (tokens, table[:1], bigram_lambdas),
    }.items():
        with pytest.raises(ValueError, match=match):
            residual_gradients(grads, x0, x0_lambdas, *arguments)


@pytest.mark.cuda
def test_sixteen_layers_of_a_micro_step(device):
    case = make((16, 32, 2048, 1024), torch.bfloat16, device)
    tokens, grads, x0, table, x0_lambdas, bigram_lambdas = case
    got = residual_gradients(grads, x0, x0_lambdas, tokens, table, bigram_lambdas)
    rows = slice(-64, None)  # fp64 of all would be too much
    e = bigram_embedding_ref(tokens, table).view(x0.shape)[rows].double()
    truth = residual_gradients_ref(
        grads[:, rows].double(), x0[rows].double(), x0_lambdas.double(), e, bigram_lambdas.double()
    )
    for name, ours, exact in (("x0", got[0], truth[0]), ("e", got[2], truth[2])):
        assert_accurate(name, ours[rows], exact.bfloat16(), exact)
    grad_x0_lambdas = torch.stack([(g.float() * x0.float()).sum() for g in grads])
    torch.testing.assert_close(got[1], grad_x0_lambdas, rtol=1e-4, atol=5.0)


@pytest.mark.cuda
def test_more_than_two_to_the_31_elements(device):
    layers, n, c = 3, 800_000, 1024
    grads = torch.zeros(layers, n, c, dtype=torch.bfloat16, device=device)
    grads[-1, -1] = 1.0
    x0 = torch.ones(n, c, dtype=torch.bfloat16, device=device)
    lambdas = torch.tensor([2.0, 3.0, 4.0], device=device)
    grad_x0, grad_x0_lambdas, *_ = residual_gradients(grads, x0, lambdas)
    assert (grad_x0[-1] == 4).all() and (grad_x0[-2] == 0).all()
    assert grad_x0_lambdas.tolist() == [0.0, 0.0, 1024.0]
