"""Validation in bits per byte, comparable across tokenizers.

BPB = sum of nats / (ln 2 * sum of target bytes),   special tokens excluded from both sums

The sums of each batch are added in the order of the batches, so that the number has the same bits
whichever ranks evaluated them.
"""

import contextlib
import itertools
import math

import torch

from nanofuse.train.data.device_loader import DeviceLoader
from nanofuse.train.data.loader import packed_batches
from nanofuse.train.errors import UserError
from nanofuse.train.ranks import ALONE

IGNORED = -1  # a target that counts nothing
NO_BYTES = "no validation row has a byte to predict; add documents to what validates"


class Validation:
    """The validation rows of a run, from the start of the split each time; they begin anew where an
    evaluation asks for more than it holds.

    Args:
        packing: train.data.loader.Packing of the validation split.
        device: where batches go.
        ranks: those that share the rows.
    """

    def __init__(self, packing, device, ranks=ALONE):
        self.packing, self.device, self.ranks = packing, device, ranks
        self.token_bytes = torch.from_numpy(packing.tokenizer.token_bytes()).to(device)

    def check(self):
        """Refuse a validation split that holds no text.

        Raises:
            UserError: it does not, or cannot be read.
        """
        with contextlib.closing(packed_batches(self.packing)) as batches:
            next(batches)

    def bpb(self, model, max_rows, decide):
        """As evaluate_bpb."""
        batches = DeviceLoader(self.packing, self.device, thread=True)
        try:
            return evaluate_bpb(model, batches, self.token_bytes, max_rows, self.ranks, decide)
        finally:
            batches.close()


def raise_failure(failure):
    """What a rank alone decides."""
    if failure is not None:
        raise failure


@torch.no_grad()
def evaluate_bpb(model, batches, token_bytes, max_rows, ranks=ALONE, decide=raise_failure):
    """Bits per byte of `model` on the first max_rows rows, however they are batched.

    Args:
        model: called as model(inputs, targets, reduction="none") -> (B*T,) nats; put in
            evaluation mode (bf16 or fp32 products, never FP8) and back.
        batches: iterator of (inputs, targets), (B, T) int64 each, on every rank the same B: of
            each world * B rows rank r's are the r-th B.
        token_bytes: (V,) int64 on the model's device; 0 for special tokens.
        decide: called after every batch, on all ranks at once, with what went wrong with it or
            None; raises where something did, or the evaluation is to end.

    Raises:
        UserError: not a single byte to predict.
    """
    was_training = model.training
    model.eval()
    sums = []  # of each batch: nats, bytes
    left = max_rows
    try:
        while left > 0:
            failure = batch = None
            try:
                if (batch := next(batches, None)) is not None:
                    rows = len(batch[1])
                    own = left - ranks.rank * rows  # rows that count, from this batch's first on
                    if own > 0:
                        sums.append(_batch_sums(model, *batch, token_bytes, own))
                    left -= ranks.world * rows
            except BaseException as error:
                failure = error
            decide(failure)
            if batch is None:
                break
    finally:
        model.train(was_training)
    failure = own = None
    try:
        own = [(nats.item(), count.item()) for nats, count in sums]
    except BaseException as error:  # of the device, seen where it is waited for
        failure = error
    decide(failure)
    nats, count = 0.0, 0
    for row in itertools.zip_longest(*ranks.collect(own), fillvalue=(0.0, 0)):
        for batch_nats, batch_count in row:
            nats, count = nats + batch_nats, count + batch_count
    if not count:
        raise UserError(NO_BYTES)
    return nats / (math.log(2) * count)


def _batch_sums(model, inputs, targets, token_bytes, most):
    """Nats and bytes of the first `most` rows of a batch: fp64 and int64, () each."""
    if most < len(targets):  # every batch has the shape that graphs and compilers know
        targets = targets.clone()
        targets[most:] = IGNORED
    losses = model(inputs, targets, reduction="none")  # (B*T,)
    targets = targets.reshape(-1)
    lengths = token_bytes[targets.clamp(min=0)] * (targets != IGNORED)  # (B*T,)
    return (losses.double() * (lengths > 0)).sum(), lengths.sum()
