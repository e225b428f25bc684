"""What the start of a run says of its data, and which share of it packing drops."""

import itertools

from nanofuse.train.data.packing import SLICE_DOCUMENTS, BestFitPacker, Slice
from nanofuse.train.errors import UserError

DOCUMENTS = 1000  # that are measured, at most
CHARS = 4_000_000  # of all of them, and of one
PACKED_ROWS, PACKED_DOCUMENTS = 20_000, 40_000  # of the measured ones again and again, at most
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


def dropped_share(lengths, row_len, rows):
    """Share of the tokens that cropping drops from documents of these lengths, read again and
    again. It grows with the rows where many documents are longer: they stay in the buffer, so that
    ever fewer short ones are there to choose from.

    Args:
        lengths: tokens of each document, at least one.
        row_len: tokens per row.
        rows: to pack; fewer where they take more than PACKED_DOCUMENTS.

    Returns:
        (share, rows that were packed)
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

    packer, packed = BestFitPacker(slices(), row_len, 0), 0
    while packed < rows and read < PACKED_DOCUMENTS:
        packer.next_row()
        packed += 1
    return packer.dropped_tokens / (packer.dropped_tokens + packed * row_len), packed


def describe_data(packing, rows):
    """Lines on a run's data: what it is, what validates, what is other than one may expect, and
    the share of tokens that packing drops, measured on the first documents.

    Args:
        packing: train.data.loader.Packing of the training split.
        rows: of the whole run.
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
        line, share = "packing: splits documents and drops no token", 0
        if packing.long_documents == "crop":
            share, packed = dropped_share(lengths, row_len, min(rows, PACKED_ROWS))
            line = f"packing: drops {100 * share:.1f} % of the tokens in {packed:,} rows"
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
