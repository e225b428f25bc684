import math

import pytest
import torch

from nanofuse.train.bpb import evaluate_bpb
from nanofuse.train.errors import UserError


class ConstantModel(torch.nn.Module):
    """Gives every target its own number of nats, and notes the mode it is called in."""

    def forward(self, inputs, targets, reduction):
        assert reduction == "none" and not self.training
        return 0.5 * (targets.reshape(-1).float() + 1)  # special tokens have nats, too


def batches(count):
    return iter([(None, torch.tensor([[1, 2, 0], [3, 1, 0]]))] * count)


TOKEN_BYTES = torch.tensor([0, 1, 4, 2])  # token 0 is special


def test_bits_per_byte_without_special_tokens():
    model = ConstantModel()
    nats, count = 0.5 * (2 + 3 + 4 + 2), 1 + 4 + 2 + 1
    bpb = evaluate_bpb(model, batches(5), TOKEN_BYTES, 6)
    assert bpb == pytest.approx(nats / (math.log(2) * count))
    assert model.training  # as it came in


def test_the_same_rows_whatever_the_batch():
    """Rows beyond the last one asked for count nothing, and no batch after it is read."""
    rows = torch.randint(4, (12, 3), generator=torch.Generator().manual_seed(0))
    rows[7:] = 3  # what must not be counted is unlike the rest

    def bpb(size):
        source = iter([(None, batch) for batch in rows.split(size)])
        found = evaluate_bpb(ConstantModel(), source, TOKEN_BYTES, 7)
        assert sum(len(targets) for _, targets in source) == 12 - size * -(-7 // size)
        return found

    assert bpb(1) == pytest.approx(bpb(2)) == pytest.approx(bpb(3)) == pytest.approx(bpb(12))
    other = rows.clone()
    other[7:] = 1
    assert torch.equal(rows[:7], other[:7])
    rows = other
    assert bpb(4) == pytest.approx(bpb(1))


def test_nothing_to_evaluate():
    for source in (batches(0), iter([(None, torch.zeros(2, 3, dtype=torch.int64))])):
        with pytest.raises(UserError, match="no validation row has a byte"):
            evaluate_bpb(ConstantModel(), source, TOKEN_BYTES, 3)
