"""Validation in bits per byte, comparable across tokenizers.

BPB = sum of nats / (ln 2 * sum of target bytes),   special tokens excluded from both sums
"""

import math

import torch

from nanofuse.train.errors import UserError

IGNORED = -1  # a target that counts nothing
TOO_SMALL = (
    "the validation split holds less than one row with text; lower --max-seq-len, or add documents "
    "to what validates"
)


@torch.no_grad()
def evaluate_bpb(model, batches, token_bytes, max_rows):
    """Bits per byte of `model` on the first max_rows rows, however they are batched.

    Args:
        model: called as model(inputs, targets, reduction="none") -> (B*T,) nats; put in
            evaluation mode (bf16 or fp32 products, never FP8) and back.
        batches: iterator of (inputs, targets), (B, T) int64 each; may end early.
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
        raise UserError(TOO_SMALL)
    return nats.item() / (math.log(2) * count.item())
