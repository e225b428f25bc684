"""BPE tokenizer: trained with rustbpe, run with tiktoken, saved as JSON.

    python -m train.data train-tokenizer --data DIR [--vocab-size 32768]

Split pattern: GPT-4's (https://github.com/openai/tiktoken) with numbers of one or two digits, as
nanochat's. Special tokens are `<|bos|>` and eight chat markers, numbered after the merges.
"""

import base64
import hashlib
import json
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken
import torch

from nanofuse.train.errors import UserError
from nanofuse.train.files import write_text_atomically

SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
BOS = "<|bos|>"
SPECIAL_TOKENS = (
    BOS,
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
NUM_BYTES = 256
MIN_VOCAB_SIZE = NUM_BYTES + len(SPECIAL_TOKENS)
FORMAT = "nanofuse-bpe-1"
FILE_NAME = "tokenizer.json"
MAX_TRAINING_CHARS = 250_000_000


class Tokenizer:
    """Byte-pair encoding given by its merges in rank order.

    Args:
        tokens: byte strings in rank order, the 256 single bytes among them.
        pattern: regular expression that splits text before merging.
    """

    def __init__(self, tokens, pattern=SPLIT_PATTERN):
        self.tokens, self.pattern = list(tokens), pattern
        specials = {name: len(self.tokens) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.encoding = tiktoken.Encoding(
            "nanofuse",
            pat_str=pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(self.tokens)},
            special_tokens=specials,
        )
        self.bos = specials[BOS]

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn merges from an iterable of str; a small corpus may give fewer than asked.

        Raises:
            UserError: vocab_size leaves no room for 256 bytes and the special tokens.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise UserError(f"--vocab-size {vocab_size} is below the minimum of {MIN_VOCAB_SIZE}")
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(texts, vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        ranks = trainer.get_mergeable_ranks()  # [(bytes, rank)]
        return cls(bytes(token) for token, _ in sorted(ranks, key=lambda pair: pair[1]))

    @classmethod
    def load(cls, path):
        """Read a tokenizer saved by `save`.

        Raises:
            UserError: the file is missing or is not one.
        """
        hint = "train one with python -m train.data train-tokenizer --data DIR"
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
            if fields["format"] != FORMAT or fields["special_tokens"] != list(SPECIAL_TOKENS):
                raise ValueError
            return cls([base64.b64decode(t) for t in fields["tokens"]], fields["pattern"])
        except FileNotFoundError:
            raise UserError(f"no tokenizer at {path}; {hint}") from None
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{path} is not a tokenizer of nanofuse; {hint}") from None

    def to_json(self):
        fields = {
            "format": FORMAT,
            "pattern": self.pattern,
            "special_tokens": list(SPECIAL_TOKENS),
            "tokens": [base64.b64encode(token).decode("ascii") for token in self.tokens],
        }
        return json.dumps(fields, indent=0)

    def save(self, path):
        """Write JSON, atomically."""
        write_text_atomically(path, self.to_json())

    @property
    def fingerprint(self):
        """SHA-256 of the saved form, hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def vocab_size(self):
        return len(self.tokens) + len(SPECIAL_TOKENS)

    def encode(self, text):
        """Token ids of `text`; special tokens in it are ordinary text."""
        return self.encoding.encode_ordinary(text)

    def encode_documents(self, texts):
        """Token ids of every text, `<|bos|>` first, as (n,) int32 numpy arrays, read-only.

        One call into tiktoken does them all, as it gives the interpreter's lock away: whoever takes
        that back may have to wait for the thread that trains. NumPy gives it away for long copies,
        bytes do not.
        """
        encode = partial(self.encoding.encode_to_numpy, disallowed_special=())
        if any(BOS in text for text in texts):  # rare; it stays text, and would look like a start
            return [np.append(self.bos, encode(text)).astype(np.int32) for text in texts]
        ids = encode("".join(BOS + text for text in texts), allowed_special={BOS})  # uint32
        ends = [*(ids.itemsize * np.flatnonzero(ids == self.bos)).tolist(), ids.nbytes]
        raw = ids.tobytes()
        return [np.frombuffer(raw[i:j], np.int32) for i, j in pairwise(ends)]

    def decode(self, ids):
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self.encoding.decode([int(i) for i in ids])

    def token_bytes(self):
        """UTF-8 bytes of every token, (vocab_size,) int64; special tokens count 0."""
        lengths = [len(token) for token in self.tokens] + [0] * len(SPECIAL_TOKENS)
        return torch.tensor(lengths, dtype=torch.int64)


def train_on_corpus(corpus, vocab_size, max_chars=MAX_TRAINING_CHARS):
    """Tokenizer trained on the first max_chars characters of a corpus's training documents."""

    def texts():
        budget = max_chars
        for unit in range(corpus.num_units("train")):
            for text in corpus.read("train", unit):
                yield text[:budget]
                budget -= len(text)
                if budget <= 0:
                    return

    return Tokenizer.train(texts(), vocab_size)
