"""Validation in bits per byte, comparable across tokenizers.

BPB = sum of nats / (ln 2 * sum of target bytes),   special tokens excluded from both sums
"""

import math

import torch

from nanofuse.train.data.loader import DeviceLoader, PackedLoader
from nanofuse.train.errors import UserError

IGNORED = -1  # a target that counts nothing
TOO_SMALL = (
    "the validation split holds less than one row with text; lower --max-seq-len, or add documents "
    "to what validates"
)


class Validation:
    """The validation rows of a run, batched for a device.

    Args:
        corpus, tokenizer: of the run.
        batch_size, seq_len: rows of a batch, and their length.
        device: where batches go.
    """

    def __init__(self, corpus, tokenizer, batch_size, seq_len, device):
        self.corpus, self.tokenizer, self.device = corpus, tokenizer, device
        self.batch_size, self.seq_len = batch_size, seq_len
        self.token_bytes = torch.from_numpy(tokenizer.token_bytes()).to(device)

    def _rows(self, batch_size):
        return PackedLoader(
            self.corpus, "val", self.tokenizer, batch_size, self.seq_len, epochs=1, fill=True
        )

    def check(self):
        """Refuse a validation split that does not fill a row.

        Raises:
            UserError: it does not, or cannot be read.
        """
        rows = self._rows(1)
        try:
            if next(rows, None) is None:
                raise UserError(TOO_SMALL)
        finally:
            rows.close()

    def bpb(self, model, max_rows, check_signals):
        """As evaluate_bpb.

        Args:
            check_signals: called before every batch; may raise.
        """
        batches = DeviceLoader(self._rows(self.batch_size), self.device)

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
