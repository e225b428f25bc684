import pytest
import torch

import nanofuse.kernels.embedding_grad as module
from nanofuse.bench.checks import DTYPES, ON_GPU, assert_accurate, same_bits
from nanofuse.bench.harness import zipf_tokens
from nanofuse.kernels.bigram_rows import bigram_rows, bigram_rows_ref
from nanofuse.kernels.common.tuning import Tile
from nanofuse.kernels.embedding_grad import embedding_grad, embedding_grad_ref, sort_rows

NAN = float("nan")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 8 positions, 2 partial sums at a time, so that short inputs need many of both."""
    if not ON_GPU:
        monkeypatch.setattr(module, "TILE", Tile(rows=8, cols=128, warps=1))
        monkeypatch.setattr(module, "SPAN_TILE", Tile(rows=2, cols=128, warps=4))


def runs(num, length, device):
    """`num` look-ups in which every row occurs `length` times, shuffled."""
    rows = torch.arange(num, device=device) // length
    return rows[torch.randperm(num, device=device)]


PATTERNS = {
    "all equal": lambda num, device: torch.full((num,), 3, device=device),
    "never repeated": lambda num, device: torch.randperm(num + 3, device=device)[:num],
    "random": lambda num, device: torch.randint(num // 3 + 1, (num,), device=device),
    "zipf": lambda num, device: zipf_tokens((num,), 50, device),
    **{
        f"runs of {length}": lambda num, device, length=length: runs(num, length, device)
        for length in (2, 16, 64)
    },
}


def case(pattern, num, cols, dtype, table_dtype, device):
    """Gradient rows, look-ups, a gradient table, and a mask of the rows that are not looked up."""
    indices = PATTERNS[pattern](num, device)
    table_rows = max(int(indices.max()) + 2, 4)
    grad_rows = torch.randn(num, cols, device=device).to(dtype)
    table = torch.randn(table_rows, cols, device=device).to(table_dtype)
    absent = torch.ones(table_rows, dtype=torch.bool, device=device)
    absent[indices] = False
    return grad_rows, indices, table, absent


def check(name, grad_rows, indices, table, absent):
    """Kernel against fp64. Table rows that are not looked up hold NaN, and must keep it."""
    exact = embedding_grad_ref(grad_rows.double(), indices, table.double())
    same_dtype = embedding_grad_ref(grad_rows, indices, table)
    got = table.clone()
    got[absent] = NAN
    embedding_grad(grad_rows, sort_rows(indices, table.size(0)), got)
    assert got[absent].isnan().all()
    assert_accurate(name, got[~absent], same_dtype[~absent], exact[~absent])


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("num", [1, 31, 32, 33, 127])
def test_patterns(pattern, num, device):
    check(pattern, *case(pattern, num, 24, torch.float32, torch.float32, device))


@pytest.mark.parametrize("num", [9, 16] if not ON_GPU else [65, 128])
def test_a_row_that_spans_two_blocks(num, device):
    check("two blocks", *case("all equal", num, 24, torch.float32, torch.float32, device))


@pytest.mark.parametrize("cols", [1, 127, 128, 129])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table_dtype", DTYPES)
def test_widths_and_dtypes(cols, dtype, table_dtype, device):
    check("random", *case("random", 33, cols, dtype, table_dtype, device))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn], ids=str)
def test_factors_of_the_rows(dtype, device):
    """Also of FP8 rows; what is skipped may have a factor that is no number."""
    grad_rows, indices, table, _ = case("zipf", 67, 24, torch.float32, torch.float32, device)
    grad_rows, factors = grad_rows.to(dtype), torch.randn(67, device=device)
    exact = embedding_grad_ref(grad_rows.double(), indices, table.double(), factors.double())
    factors = torch.cat([factors, factors.new_full((3,), NAN)])
    grad_rows = torch.cat([grad_rows.float(), grad_rows[:3].float()]).to(dtype)
    indices = torch.cat([indices, torch.tensor([-1, -1, table.size(0)], device=device)])
    got = embedding_grad(grad_rows, sort_rows(indices, table.size(0)), table, factors)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_table_of_one_row(device):
    grad_rows = torch.randn(65, 8, device=device)
    table = torch.zeros(1, 8, device=device)
    indices = torch.zeros(65, dtype=torch.long, device=device)
    embedding_grad(grad_rows, sort_rows(indices, 1), table)
    torch.testing.assert_close(table[0], grad_rows.sum(0))


def test_calls_accumulate(device):
    grad_rows, indices, table, _ = case("zipf", 33, 24, torch.float32, torch.float32, device)
    expected = embedding_grad_ref(2 * grad_rows.double(), indices, table.double())
    sorted_rows = sort_rows(indices, table.size(0))
    for _ in range(2):
        assert embedding_grad(grad_rows, sorted_rows, table) is table
    torch.testing.assert_close(table.double(), expected, rtol=1e-5, atol=1e-5)


def test_bf16_sums_are_rounded_once(device):
    """257 ones: a running bf16 sum would stop at 256."""
    grad_rows = torch.ones(258, 8, dtype=torch.bfloat16, device=device)
    table = torch.zeros(1, 8, dtype=torch.bfloat16, device=device)
    embedding_grad(
        grad_rows, sort_rows(torch.zeros(258, dtype=torch.long, device=device), 1), table
    )
    assert (table == 258).all()


def test_two_runs_give_the_same_bits(device):
    grad_rows, indices, table, _ = case("zipf", 127, 24, torch.float32, torch.float32, device)
    same_bits(lambda: [embedding_grad(grad_rows, sort_rows(indices, table.size(0)), table.clone())])


def test_columns_of_a_wider_buffer_are_accepted_and_transposes_refused(device):
    wide = torch.randn(33, 64, device=device)
    indices = torch.randint(5, (33,), device=device)
    sorted_rows = sort_rows(indices, 5)
    table = torch.full((5, 32), NAN, device=device)
    inner = table[:, 4:20].zero_()
    embedding_grad(wide[:, 16:32], sorted_rows, inner)
    torch.testing.assert_close(inner, torch.zeros(5, 16, device=device).index_add(
        0, indices, wide[:, 16:32]))  # fmt: skip
    assert table[:, :4].isnan().all() and table[:, 20:].isnan().all()
    with pytest.raises(ValueError, match="contiguous rows"):
        embedding_grad(wide[:, :33].t(), sort_rows(indices, 5), torch.zeros(5, 33, device=device))


def test_what_does_not_fit_is_refused(device):
    indices = torch.randint(5, (6,), device=device)
    x, table = torch.ones(6, 4, device=device), torch.ones(5, 4, device=device)
    sorted_rows = sort_rows(indices, 5)
    with pytest.raises(ValueError, match="grad_rows must have shape"):
        embedding_grad(x[:5], sorted_rows, table)
    with pytest.raises(ValueError, match="table_grad must have shape"):
        embedding_grad(x, sorted_rows, table[:4])
    with pytest.raises(ValueError, match="table_grad must have shape"):
        embedding_grad(x, sorted_rows, table[:, :3])
    with pytest.raises(ValueError, match="integers"):
        sort_rows(indices.float(), 5)
    for count in (-1, 0, 2**31):
        with pytest.raises(ValueError, match="1 to 2"):
            sort_rows(indices, count)
    assert sort_rows(indices, 2**31 - 1).num_rows == 2**31 - 1


def test_rows_outside_of_the_table_are_skipped(device):
    indices = torch.tensor([-1] * 9 + [0] * 9 + [2] + [4] * 16 + [2**32 + 1], device=device)
    grad_rows = torch.randn(len(indices), 8, device=device)
    buffer = torch.zeros(6, 8, device=device)
    embedding_grad(grad_rows, sort_rows(indices, 4), buffer[1:5])
    expected = torch.zeros(6, 8, device=device)
    expected[1], expected[3] = grad_rows[9:18].sum(0), grad_rows[18]
    torch.testing.assert_close(buffer, expected)


def test_no_positions_change_nothing(device):
    table = torch.full((3, 4), NAN, device=device)
    empty = torch.zeros(0, 4, device=device)
    embedding_grad(empty, sort_rows(torch.zeros(0, dtype=torch.long, device=device), 3), table)
    assert table.isnan().all()


@pytest.mark.parametrize("bad", [NAN, float("inf")])
@pytest.mark.parametrize("pattern", ["runs of 2", "runs of 64"])
def test_nan_and_inf_show_in_their_row_alone(bad, pattern, device):
    grad_rows, indices, table, _ = case(pattern, 127, 24, torch.float32, torch.float32, device)
    grad_rows[50, 7] = bad
    embedding_grad(grad_rows, sort_rows(indices, table.size(0)), table)
    bad_places = (~table.isfinite()).nonzero().tolist()
    assert bad_places == [[int(indices[50]), 7]]


def test_sorted_rows_name_their_sources(device):
    tokens = torch.randint(7, (3, 11), device=device)
    result = sort_rows(tokens, 7)
    assert result.rows.dtype == result.order.dtype == torch.int32 and result.num_rows == 7
    assert torch.equal(result.rows, tokens.flatten()[result.order.long()].int())
    keys = result.rows.long() * 33 + result.order
    assert (keys.diff() > 0).all()  # rows ascend, and equal rows keep their order


def test_bigram_gradient_includes_the_reserved_row(device):
    tokens = torch.randint(5, (3, 17), device=device)
    grad_rows = torch.randn(51, 24, device=device)
    table = torch.randn(11, 24, device=device)
    rows = bigram_rows_ref(tokens, 11)
    expected = embedding_grad_ref(grad_rows, rows, table)
    assert (rows == 10).sum() == 3
    order = sort_rows(bigram_rows(tokens, 11), 11)
    assert embedding_grad(grad_rows, order, table) is table
    torch.testing.assert_close(table, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("cols", [256, 768, 1024])
@pytest.mark.parametrize("pattern", ["all equal", "never repeated", "zipf", "runs of 64"])
def test_real_shapes(pattern, cols, device):
    for dtype in DTYPES:
        check(pattern, *case(pattern, 65536, cols, torch.bfloat16, dtype, device))


@pytest.mark.cuda
def test_real_shapes_give_the_same_bits(device):
    indices = zipf_tokens((65536,), 32768, device)
    grad_rows = torch.randn(65536, 1024, device=device).bfloat16()
    sorted_rows = sort_rows(indices, 32768)
    same_bits(
        lambda: [embedding_grad(grad_rows, sorted_rows, torch.zeros(32768, 1024, device=device))]
    )


@pytest.mark.cuda
@pytest.mark.large
def test_a_table_and_gradients_of_more_than_two_to_the_31_elements(device):
    rows, cols = 2**21 + 70, 1024
    table = torch.zeros(rows, cols, dtype=torch.bfloat16, device=device)
    grad_rows = torch.ones(rows, cols, dtype=torch.bfloat16, device=device)
    indices = torch.arange(rows, device=device)
    indices[-200:] = rows - 1  # the last rows of both, spanning blocks
    embedding_grad(grad_rows, sort_rows(indices, rows), table)
    for row, count in ((0, 1), (rows - 201, 1), (rows - 2, 0), (rows - 1, 200)):
        assert (table[row] == count).all()
