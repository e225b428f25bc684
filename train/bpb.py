"""Validation in bits per byte, comparable across tokenizers.

BPB = sum of nats / (ln 2 * sum of target bytes),   special tokens excluded from both sums
"""

import contextlib
import math

import torch

from nanofuse.train.data.device_loader import DeviceLoader
from nanofuse.train.data.loader import packed_batches
from nanofuse.train.errors import UserError

IGNORED = -1  # a target that counts nothing
NO_BYTES = "no validation row has a byte to predict; add documents to what validates"


class Validation:
    """The validation rows of a run, from the start of the split each time; they begin anew where an
    evaluation asks for more than it holds.

    Args:
        packing: train.data.loader.Packing of the validation split.
        device: where batches go.
    """

    def __init__(self, packing, device):
        self.packing, self.device = packing, device
        self.token_bytes = torch.from_numpy(packing.tokenizer.token_bytes()).to(device)

    def check(self):
        """Refuse a validation split that holds no text.

        Raises:
            UserError: it does not, or cannot be read.
        """
        with contextlib.closing(packed_batches(self.packing)) as batches:
            next(batches)

    def bpb(self, model, max_rows, check_signals):
        """As evaluate_bpb.

        Args:
            check_signals: called before every batch; may raise.
        """
        batches = DeviceLoader(self.packing, self.device, thread=True)

        def watched():
            for batch in batches:
                check_signals()
                yield batch

        try:
            return evaluate_bpb(model, watched(), self.token_bytes, max_rows)
        finally:
            batches.close()


@torch.no_grad()
def evaluate_bpb(model, batches, token_bytes, max_rows):
    """Bits per byte of `model` on the first max_rows rows, however they are batched.

    Args:
        model: called as model(inputs, targets, reduction="none") -> (B*T,) nats; put in
            evaluation mode (bf16 or fp32 products, never FP8) and back.
        batches: iterator of (inputs, targets), (B, T) int64 each.
        token_bytes: (V,) int64 on the model's device; 0 for special tokens.

    Raises:
        UserError: not a single byte to predict.
    """
    was_training = model.training
    model.eval()
    nats = torch.zeros((), dtype=torch.float64, device=token_bytes.device)
    count = torch.zeros((), dtype=torch.int64, device=token_bytes.device)
    left = max_rows
    try:
        for inputs, targets in batches:
            rows = len(targets)
            if left < rows:  # every batch has the shape that graphs and compilers know
                targets = targets.clone()
                targets[left:] = IGNORED
            losses = model(inputs, targets, reduction="none")  # (B*T,)
            targets = targets.reshape(-1)
            lengths = token_bytes[targets.clamp(min=0)] * (targets != IGNORED)  # (B*T,)
            nats += (losses.double() * (lengths > 0)).sum()
            count += lengths.sum()
            left -= rows
            if left <= 0:
                break
    finally:
        model.train(was_training)
    if not count.item():
        raise UserError(NO_BYTES)
    return nats.item() / (math.log(2) * count.item())
