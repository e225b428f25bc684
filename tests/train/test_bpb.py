import math

import pytest
import torch

from nanofuse.train.bpb import evaluate_bpb
from nanofuse.train.errors import UserError


class ConstantModel(torch.nn.Module):
    """Gives every target its own number of nats, and notes the mode it is called in."""

    def forward(self, inputs, targets, reduction):
        assert reduction == "none" and not self.training
        return targets.reshape(-1).float() * 0.5


def batches(count):
    return iter([(None, torch.tensor([[1, 2, 0], [3, 1, 0]]))] * count)


TOKEN_BYTES = torch.tensor([0, 1, 4, 2])  # token 0 is special


def test_bits_per_byte_without_special_tokens():
    model = ConstantModel()
    nats, count = 0.5 * (1 + 2 + 3 + 1), 1 + 4 + 2 + 1
    bpb = evaluate_bpb(model, batches(5), TOKEN_BYTES, 3)
    assert bpb == pytest.approx(nats / (math.log(2) * count))
    assert model.training  # as it came in


def test_uses_at_most_max_batches():
    source = batches(5)
    evaluate_bpb(ConstantModel(), source, TOKEN_BYTES, 3)
    assert len(list(source)) == 2


def test_nothing_to_evaluate():
    with pytest.raises(UserError, match="--device-batch-size"):
        evaluate_bpb(ConstantModel(), batches(0), TOKEN_BYTES, 3)
