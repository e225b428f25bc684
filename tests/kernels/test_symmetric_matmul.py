import pytest
import torch

from nanofuse.bench.checks import ON_GPU, assert_accurate, same_bits
from nanofuse.kernels.symmetric_matmul import (
    MatmulTile,
    batched_matmul,
    batched_matmul_ref,
    symmetric_matmul,
    symmetric_matmul_ref,
)

# the interpreter's tl.dot is right in fp32 only; GPUs test the 16-bit dtypes
DTYPES = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float32]
SIDE = 64 if ON_GPU else 32  # of test tiles; the interpreter's dot is slow
WIDE = MatmulTile(rows=SIDE, cols=2 * SIDE, depth=32, warps=4, stages=3)
TALL = MatmulTile(rows=2 * SIDE, cols=SIDE, depth=32, warps=4, stages=3)
PERSISTENT = MatmulTile(rows=SIDE, cols=2 * SIDE, depth=32, warps=4, stages=3, persistent=1)
SIZES = [8, 32, 40, 136] if not ON_GPU else [8, 64, 72, 200, 264]


def random(*shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def reference(function, *operands, **kwargs):
    """The result of `function` on the operands cast to fp64."""
    kwargs = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    return function(*(x.double() for x in operands), **kwargs)


def assert_symmetric(y):
    assert torch.equal(y, y.mT), "the mirrored halves differ"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [None, WIDE, PERSISTENT])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_gram_matrix(size, transpose, config, dtype, device):
    x = random(2, *((40, size) if transpose else (size, 40)), dtype=dtype, device=device)
    kwargs = {"transpose": transpose, "scale": torch.tensor([0.5, -3.0], device=device)}
    y = symmetric_matmul(x, **kwargs, config=config)
    truth = reference(symmetric_matmul_ref, x, **kwargs)
    assert_accurate("gram", y, symmetric_matmul_ref(x, **kwargs), truth)
    assert_symmetric(y)


def test_rows_are_multiplied_unless_asked_otherwise():
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(symmetric_matmul_ref(x), x @ x.mT)
    torch.testing.assert_close(symmetric_matmul_ref(x, transpose=True), x.mT @ x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [None, WIDE])
@pytest.mark.parametrize("size", [8, 104])
def test_polynomial_of_a_symmetric_matrix(size, config, dtype, device):
    gram = symmetric_matmul(random(3, size, 64, dtype=dtype, device=device) / size)
    kwargs = {"factor": 0.5, "addend": gram, "beta": -2.8, "diagonal": 4.0}
    y = symmetric_matmul(gram, **kwargs, config=config)
    truth = reference(symmetric_matmul_ref, gram, **kwargs)
    assert_accurate("polynomial", y, symmetric_matmul_ref(gram, **kwargs), truth)
    assert_symmetric(y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_product_of_commuting_matrices(dtype, device):
    gram = symmetric_matmul(random(2, 72, 40, dtype=dtype, device=device) / 10)
    square = symmetric_matmul(gram)
    y = symmetric_matmul(square, gram)
    truth = reference(symmetric_matmul_ref, square, gram)
    assert_accurate("product", y, symmetric_matmul_ref(square, gram), truth)
    assert_symmetric(y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [None, TALL, PERSISTENT])
@pytest.mark.parametrize("sums", [None, "row", "col"])
@pytest.mark.parametrize("shape", [(8, 8, 8), (72, 40, 136)], ids=str)
def test_batched_matmul_and_its_sums(shape, sums, config, dtype, device):
    rows, terms, cols = shape
    left = random(2, rows, terms, dtype=dtype, device=device)
    right = random(2, terms, cols, dtype=dtype, device=device, seed=1)
    scale = torch.tensor([0.5, -3.0], device=device)
    y = batched_matmul(left, right, scale=scale, sums=sums, config=config)
    if sums:
        y, partial = y
        expected = y.double().square().sum(dim=2 if sums == "row" else 1)
        torch.testing.assert_close(partial.sum(dim=1).double(), expected, rtol=1e-5, atol=0)
    truth = reference(batched_matmul_ref, left, right, scale=scale)
    assert_accurate("matmul", y, batched_matmul_ref(left, right, scale=scale), truth)


def test_a_nan_stays_in_its_matrix(device):
    x = random(3, 72, 40, dtype=DTYPES[0], device=device)
    x[1, 71, 39] = float("nan")
    y = symmetric_matmul(x)
    assert y[1, 71].isnan().all() and y[1, :, 71].isnan().all() and y[::2].isfinite().all()
    z = batched_matmul(y, x)
    assert z[1].isnan().any() and z[::2].isfinite().all()


def test_two_runs_give_the_same_bits(device):
    x = random(2, 136, 72, dtype=DTYPES[0], device=device)
    same_bits(lambda: (symmetric_matmul(x), *batched_matmul(x.mT.contiguous(), x, sums="col")))


def test_refused_operands(device):
    x = random(2, 16, 32, dtype=DTYPES[0], device=device)
    with pytest.raises(ValueError, match="contiguous"):
        symmetric_matmul(x.mT)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        symmetric_matmul(x[:, :, :30].contiguous())
    with pytest.raises(ValueError, match="disagree"):
        symmetric_matmul(x, x[:, :8])
    with pytest.raises(ValueError, match="disagree"):
        batched_matmul(x, x)
    with pytest.raises(ValueError, match="addend"):
        symmetric_matmul(x, diagonal=1.0)
    with pytest.raises(ValueError, match="sums"):
        batched_matmul(x, x.mT.contiguous(), sums="both")


@pytest.mark.cuda
@pytest.mark.large
def test_more_than_two_to_the_31_elements(device):
    x = torch.zeros(2100, 1024, 1024, dtype=torch.float16, device=device)
    x[-1, -1, -1], x[-1, 0, -1] = 2.0, 3.0
    y = symmetric_matmul(x)
    assert y[-1, -1, -1] == 4 and y[-1, -1, 0] == y[-1, 0, -1] == 6 and y[-1, 0, 0] == 9
    assert not y[:-1].any()
    del y
    z, sums = batched_matmul(x, x, sums="row")
    assert z[-1, 0, -1] == 6 and z[-1, -1, -1] == 4 and sums[-1].sum() == 52
