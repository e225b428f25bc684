import pytest
import torch

from kernels.bigram_residual import bigram_embedding_ref, bigram_residual_ref, bigram_rows_ref


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


def test_previous_token_continues_a_row():
    tokens = torch.randint(320, (2, 30))
    whole = bigram_rows_ref(tokens, 961)
    for cut in (1, 2, 29):
        rest = bigram_rows_ref(tokens[:, cut:], 961, prev_token=tokens[:, cut - 1])
        assert torch.equal(rest, whole[:, cut:])


def test_a_table_of_one_row_is_refused():
    with pytest.raises(ValueError, match="at least 2 rows"):
        bigram_rows_ref(torch.zeros(1, 4, dtype=torch.int64), 1)


def test_embedding_reads_the_rows():
    table = torch.randn(961, 8)
    tokens = torch.randint(320, (2, 5))
    rows = bigram_rows_ref(tokens, 961)
    assert torch.equal(bigram_embedding_ref(tokens, table), table[rows])


def test_residual_mix_and_its_gradients():
    x, x0, e = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    scales = [torch.tensor(s, dtype=torch.float64, requires_grad=True) for s in (1.1, 0.2, 0.05)]
    y = bigram_residual_ref(x, x0, scales[0], scales[1], e, scales[2])
    torch.testing.assert_close(y, 1.1 * x + 0.2 * x0 + 0.05 * e)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    for tensor, scale in zip((x, x0, e), scales, strict=True):
        torch.testing.assert_close(tensor.grad, scale.detach() * upstream)
        torch.testing.assert_close(scale.grad, (tensor.detach() * upstream).sum())


def test_residual_mix_without_bigram():
    x, x0 = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    y = bigram_residual_ref(x, x0, torch.tensor(1.1), torch.tensor(0.2))
    torch.testing.assert_close(y, 1.1 * x + 0.2 * x0)
