"""What the start of a run says of its data, and which share of it packing drops."""

import itertools

from nanofuse.train.data.packing import SLICE_DOCUMENTS, BestFitPacker, Slice
from nanofuse.train.errors import UserError

DOCUMENTS = 1000  # that are measured, at most
CHARS = 1_000_000  # of all of them, and of one
PACKED_DOCUMENTS = 10_000  # the measured ones, again and again
HIGH_SHARE = 0.2  # dropped: the start says what to do


def document_lengths(corpus, tokenizer):
    """Tokens of the first training documents, `<|bos|>` included: up to DOCUMENTS of them and
    about CHARS characters; the rest of a longer document is taken to be as its beginning."""
    texts, chars = [], 0
    for text in itertools.islice(corpus.head(), DOCUMENTS):
        texts.append(text)
        chars += len(text)
        if chars >= CHARS:
            break
    documents = tokenizer.encode_documents([text[:CHARS] for text in texts])
    factors = [max(len(text) / CHARS, 1) for text in texts]
    return [round(len(d) * factor) for d, factor in zip(documents, factors, strict=True)]


def dropped_share(lengths, row_len):
    """Share of the tokens that cropping drops from documents of these lengths, read again and
    again.

    Args:
        lengths: tokens of each document, at least one.
        row_len: tokens per row.
    """
    read = 0

    def slices():
        nonlocal read
        endless = itertools.cycle(lengths)
        zeros = [0] * SLICE_DOCUMENTS
        while True:
            read += SLICE_DOCUMENTS
            part = list(itertools.islice(endless, SLICE_DOCUMENTS))
            yield Slice(zeros, zeros, part, [(None, 0)] * SLICE_DOCUMENTS)

    packer, rows = BestFitPacker(slices(), row_len, 0), 0
    while read < PACKED_DOCUMENTS:  # what is in the buffer then is neither packed nor dropped
        packer.next_row()
        rows += 1
    return packer.dropped_tokens / (packer.dropped_tokens + rows * row_len)


def describe_data(packing):
    """Lines on a run's data: what it is, what validates, what is other than one may expect, and
    the share of tokens that packing drops, measured on the first documents.

    Args:
        packing: train.data.loader.Packing of the training split.
    """
    corpus, tokenizer, row_len = packing.corpus, packing.tokenizer, packing.seq_len + 1
    lines = [
        f"data: {corpus.name}; {corpus.validation}; tokenizer of {tokenizer.vocab_size:,} tokens",
        *(f"data: {hint}" for hint in corpus.hints),
    ]
    if packing.cache:
        lines.append(f"tokens: kept in {packing.cache.where(0)} (--cache off keeps none)")
    try:
        lengths = document_lengths(corpus, tokenizer)
    except UserError:  # the loader raises it again if training comes there
        lengths = []
    if any(length > 1 for length in lengths):
        longer = sum(length > row_len for length in lengths) / len(lengths)
        line = "packing: splits documents and drops none of the tokens"
        share = 0
        if packing.long_documents == "crop":
            share = dropped_share(lengths, row_len)
            line = f"packing: drops {100 * share:.1f} % of the tokens"
        line += (
            f" ({100 * longer:.0f} % of the first {len(lengths):,} documents are longer than a "
            f"row of {row_len})"
        )
        if share >= HIGH_SHARE:
            line += "; --long-documents split drops none"
        lines.append(line)
    if told := corpus.tell_replaced():
        lines.append(told)
    return lines
