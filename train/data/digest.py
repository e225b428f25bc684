"""Which data a run's figures are of: a digest of the documents' text and of the tokenizer.

Files may be compressed anew and read in other groups: the digest stays. It begins with the number
of documents, so that other data are mostly told apart without reading them.
"""

import hashlib

from nanofuse.train.data.shards import SPLITS

DIGITS = 16
NULL = 2**64 - 1  # in place of a document's length


def count_documents(corpus):
    """Documents of a corpus, as its footers have them; 0 of the standard library."""
    return sum(getattr(corpus, "documents", ()))


def data_digest(corpus, tokenizer):
    """Digest of a corpus and a tokenizer, "DOCUMENTS-HEXADECIMAL"; all text is read.

    Args:
        corpus: of train.data.corpus.
        tokenizer: a Tokenizer's fingerprint.

    Raises:
        UserError: a row group that cannot be read.
    """
    digest = hashlib.sha256(tokenizer.encode())
    for split in SPLITS:
        digest.update(split.encode())
        for shard, group, first, end in corpus.units[split]:
            [texts] = corpus.read_groups(shard, group, 1)
            for text in texts[first:end]:
                content = b"" if text is None else text.encode()
                length = NULL if text is None else len(content)
                digest.update(length.to_bytes(8, "little"))
                digest.update(content)
    return f"{count_documents(corpus)}-{digest.hexdigest()[:DIGITS]}"
