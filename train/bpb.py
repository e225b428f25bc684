"""Validation in bits per byte, comparable across tokenizers.

BPB = sum of nats / (ln 2 * sum of target bytes),   special tokens excluded from both sums
"""

import math

import torch

from nanofuse.train.errors import UserError


@torch.no_grad()
def evaluate_bpb(model, batches, token_bytes, max_batches):
    """Bits per byte of `model` on up to max_batches batches.

    Args:
        model: called as model(inputs, targets, reduction="none") -> (B*T,) nats; put in
            evaluation mode (bf16 or fp32 products, never FP8) and back.
        batches: iterator of (inputs, targets), (B, T) int64 each; may end early.
        token_bytes: (V,) int64 on the model's device; 0 for special tokens.

    Raises:
        UserError: not a single batch.
    """
    was_training = model.training
    model.eval()
    nats = torch.zeros((), dtype=torch.float64, device=token_bytes.device)
    count = torch.zeros((), dtype=torch.int64, device=token_bytes.device)
    seen = 0
    for inputs, targets in batches:
        losses = model(inputs, targets, reduction="none")  # (B*T,)
        lengths = token_bytes[targets.reshape(-1)]  # (B*T,)
        nats += (losses.double() * (lengths > 0)).sum()
        count += lengths.sum()
        seen += 1
        if seen == max_batches:
            break
    model.train(was_training)
    if not seen:
        raise UserError(
            "the validation split holds less than one batch; lower --device-batch-size or "
            "--max-seq-len, or add documents to the last shard"
        )
    return nats.item() / (math.log(2) * count.item())
