"""What the start of a run says of its data, and which share of it packing drops."""

import itertools
from operator import length_hint

import numpy as np

from nanofuse.train.data.packing import BestFitPacker
from nanofuse.train.errors import UserError

DOCUMENTS = 1000  # that are measured, at most
CHARS = 1_000_000  # of all of them, and of one
PACKED_DOCUMENTS = 10_000  # the measured ones, again and again
HIGH_SHARE = 0.5  # dropped: the start says what to do


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
    """Share of the tokens that packing drops from documents of these lengths, read again and again.

    Args:
        lengths: tokens of each document, at least one.
        row_len: tokens per row.
    """
    lengths = itertools.islice(itertools.cycle(lengths), PACKED_DOCUMENTS)
    documents = iter([np.broadcast_to(np.int32(0), length) for length in lengths])
    packer, rows = BestFitPacker(documents, row_len), 0
    while length_hint(documents):  # what is in the buffer then is neither packed nor dropped
        packer.next_row()
        rows += 1
    return packer.dropped_tokens / (packer.dropped_tokens + rows * row_len)


def describe_data(corpus, tokenizer, seq_len):
    """Lines on a run's data: what it is, what validates, what is other than one may expect, and
    the share of tokens that packing drops, measured on the first documents.

    Args:
        seq_len: T.
    """
    lines = [
        f"data: {corpus.name}; {corpus.validation}; tokenizer of {tokenizer.vocab_size:,} tokens",
        *(f"data: {hint}" for hint in corpus.hints),
    ]
    try:
        lengths = document_lengths(corpus, tokenizer)
    except UserError:  # the loader raises it again if training comes there
        lengths = []
    if lengths:
        share = dropped_share(lengths, seq_len + 1)
        longer = sum(length > seq_len + 1 for length in lengths) / len(lengths)
        line = (
            f"packing: drops {100 * share:.1f} % of the tokens ({100 * longer:.0f} % of the first "
            f"{len(lengths):,} documents are longer than a row of {seq_len + 1})"
        )
        if share >= HIGH_SHARE:
            line += "; raise --max-seq-len, or cut the documents into shorter ones"
        lines.append(line)
    if told := corpus.tell_replaced():
        lines.append(told)
    return lines
