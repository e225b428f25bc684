import pytest
import torch

from nanofuse.kernels.bigram_rows import bigram_embedding_ref, bigram_rows, bigram_rows_ref


def hash_in_python(tokens, rows):
    expected = [rows - 1]
    for previous, current in zip(tokens, tokens[1:], strict=False):
        expected.append(((36313 * current) ^ (27191 * previous)) % (rows - 1))
    return expected


@pytest.mark.parametrize("length", [1, 2, 3, 17, 64])
@pytest.mark.parametrize("rows", [2, 3, 1601, 163840])
def test_rows_equal_the_hash_in_python_integers(length, rows):
    tokens = torch.randint(32768, (3, length), generator=torch.Generator().manual_seed(length))
    got = bigram_rows_ref(tokens, rows)
    assert got.tolist() == [hash_in_python(row, rows) for row in tokens.tolist()]
    assert (got[:, 0] == rows - 1).all()
    assert rows == 2 or (got[:, 1:] < rows - 1).all()  # nothing else hashes to the reserved row


def test_int32_tokens_do_not_overflow():
    tokens = torch.tensor([[65535, 65535, 65534]], dtype=torch.int32)
    assert bigram_rows_ref(tokens, 1601).tolist() == [hash_in_python(tokens[0].tolist(), 1601)]


@pytest.mark.parametrize("rows_of", [bigram_rows, bigram_rows_ref])
def test_a_table_of_one_row_is_refused(rows_of):
    with pytest.raises(ValueError, match="at least 2 rows"):
        rows_of(torch.zeros(1, 4, dtype=torch.int64), 1)


def test_embedding_reads_the_rows():
    table = torch.randn(961, 8)
    tokens = torch.randint(320, (2, 5))
    rows = bigram_rows_ref(tokens, 961)
    assert torch.equal(bigram_embedding_ref(tokens, table), table[rows])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 1023), (2, 512), (5, 205), (1, 1031)])
@pytest.mark.parametrize("rows", [2, 1601, 163840])
def test_kernel_equals_the_reference(shape, rows, dtype, device):
    tokens = torch.randint(65536, shape, device=device).to(dtype)
    got = bigram_rows(tokens, rows)
    assert got.dtype == torch.int32
    assert torch.equal(got.long(), bigram_rows_ref(tokens, rows))


@pytest.mark.parametrize("rows", [2, 1601])
def test_rows_of_any_token_are_rows_of_the_table(rows, device):
    tokens = torch.tensor([[5, -1, 3, -100, -100, 2**40, 2**62, -(2**62), 2**31]], device=device)
    got = bigram_rows(tokens, rows)
    assert torch.equal(got.long(), bigram_rows_ref(tokens, rows))
    assert (got >= 0).all() and (got < rows).all()


def test_kernel_refuses_a_slice(device):
    with pytest.raises(ValueError, match="contiguous"):
        bigram_rows(torch.zeros(4, 8, dtype=torch.int64, device=device)[:, :4], 9)
