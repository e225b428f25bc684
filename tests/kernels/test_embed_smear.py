import pytest
import torch

from nanofuse.bench.checks import DTYPES, assert_accurate, same_bits
from nanofuse.kernels.embed_smear import embed_smear, embed_smear_ref, smear_ref

VOCAB = 19
#         B, T, C, G
SHAPES = [(1, 1, 2, 1), (2, 3, 24, 24), (3, 5, 127, 24), (1, 13, 128, 7), (2, 9, 129, 24)]


def smear_longhand(x, gate, scale):
    y = x.clone()
    for t in range(1, x.size(1)):
        y[:, t] = x[:, t] + scale / (1 + (-gate[:, t]).exp()) * x[:, t - 1]
    return y


def test_smear_mixes_the_unsmeared_previous_position():
    x, gate = torch.randn(2, 7, 5), torch.randn(2, 7, 1)
    got = smear_ref(x, gate, torch.tensor([0.6]))
    torch.testing.assert_close(got, smear_longhand(x, gate, 0.6))
    assert torch.equal(got[:, 0], x[:, 0])


def test_smear_continues_from_a_previous_embedding():
    x, gate, scale = torch.randn(2, 9, 4), torch.randn(2, 9, 1), torch.tensor([0.6])
    whole = smear_ref(x, gate, scale)
    for cut in (1, 4, 8):
        rest = smear_ref(x[:, cut:], gate[:, cut:], scale, prev_embedding=x[:, cut - 1])
        torch.testing.assert_close(rest, whole[:, cut:])


def make(shape, dtype, device, seed=0):
    b, t, c, g = shape
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (b, t), generator=generator).to(device)
    table = torch.randn(VOCAB, c, generator=generator).to(device, dtype)
    gate_weight = torch.randn(1, g, generator=generator).to(device)
    upstream = torch.randn(b, t, c, generator=generator).to(device, dtype)
    return tokens, table, gate_weight, torch.tensor([0.7], device=device), upstream


def run(op, case, dtype=None):
    """Output and gradients of table, gate_weight and smear_lambda, computed in `dtype`."""
    tokens, *floats = case
    *leaves, upstream = (x if dtype is None else x.to(dtype) for x in floats)
    leaves = [x.detach().requires_grad_() for x in leaves]
    y = op(tokens, *leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, upstream)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(shape, dtype, device):
    case = make(shape, dtype, device)
    got, truth = run(embed_smear, case), run(embed_smear_ref, case, torch.float64)
    same = run(embed_smear_ref, case)
    floor = 2e-6 if dtype == torch.float32 else 4e-3
    for name, *tensors in zip(("y", "table", "gate", "lambda"), got, same, truth, strict=True):
        assert tensors[0].dtype == tensors[1].dtype
        assert_accurate(name, *tensors, floor)


def test_first_positions_take_nothing_from_the_row_before(device):
    tokens, table, gate_weight, scale, _ = make((3, 4, 24, 24), torch.float32, device)
    table[5] *= torch.nan
    tokens.fill_(1)
    tokens[0, -1] = 5  # the position before the second row's first
    y = embed_smear(tokens, table, gate_weight, scale)
    assert y[0, -1].isnan().all() and y[1:].isfinite().all()


def guarded(table):
    """A copy of the table with other values before and behind it in memory."""
    rows = len(table)
    memory = torch.full((3 * rows, table.size(1)), 7.0, dtype=table.dtype, device=table.device)
    memory[rows : 2 * rows] = table
    return memory[rows : 2 * rows]


@pytest.mark.parametrize("bad", [VOCAB, VOCAB + 3, -1, -VOCAB, 2**32 + 3, -(2**62)])
def test_a_token_outside_of_the_table_gives_nan_and_reads_nothing(bad, device):
    tokens, table, *rest = make((2, 5, 24, 24), torch.float32, device)
    clean = run(embed_smear, (tokens, table, *rest))
    tokens[0, 2] = bad
    y, grad_table, grad_gate, grad_lambda = run(embed_smear, (tokens, guarded(table), *rest))
    assert y[0, 2:4].isnan().all()  # its own row, and the part of it in the next one
    y[0, 2:4] = clean[0][0, 2:4]
    assert torch.equal(y, clean[0])
    assert grad_gate.isnan().any() and grad_lambda.isnan()
    seen = tokens[tokens != bad].unique()
    unseen = [row for row in range(VOCAB) if row not in seen.tolist()]
    assert (grad_table[unseen] == 0).all()


def test_two_runs_give_the_same_bits(device):
    case = make((2, 33, 40, 24), torch.float32, device)
    same_bits(lambda: run(embed_smear, case))


def test_what_does_not_fit_is_refused(device):
    tokens, table, gate_weight, scale, _ = make((2, 4, 8, 8), torch.float32, device)
    with pytest.raises(ValueError, match="contiguous table"):
        embed_smear(tokens, table.t(), gate_weight, scale)
    with pytest.raises(ValueError, match="reads 9 channels of 8"):
        embed_smear(tokens, table, torch.zeros(1, 9, device=device), scale)


@pytest.mark.cuda
@pytest.mark.parametrize("width", [256, 768, 1024])
def test_training_shapes(width, device):
    case = make((8, 2048, width, 24), torch.bfloat16, device)
    got, truth = run(embed_smear, case), run(embed_smear_ref, case, torch.float64)
    same = run(embed_smear_ref, case)
    for name, *tensors in zip(("y", "table", "gate", "lambda"), got, same, truth, strict=True):
        assert_accurate(name, *tensors, 4e-3)


@pytest.mark.cuda
@pytest.mark.large
def test_more_than_two_to_the_31_elements(device):
    b, t, c = 1025, 2048, 1024
    tokens = torch.zeros(b, t, dtype=torch.int32, device=device)
    tokens[-1, -1] = 1
    table = torch.stack([torch.ones(c), -torch.ones(c)]).to(device, torch.bfloat16)
    gate_weight, scale = torch.zeros(1, 24, device=device), torch.zeros(1, device=device)
    y = embed_smear(tokens, table, gate_weight, scale)
    assert (y[-1, -1] == -1).all() and (y[-1, -2] == 1).all()
