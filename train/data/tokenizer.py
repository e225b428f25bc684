"""BPE tokenizer: trained with rustbpe, run with tiktoken, saved as JSON.

    python -m train.data train-tokenizer --data DIR [--vocab-size 32768]

Split pattern: GPT-4's (https://github.com/openai/tiktoken) with numbers of one or two digits, as
nanochat's. Special tokens are `<|bos|>` and eight chat markers, numbered after the merges.
"""

import base64
import hashlib
import json
import math
import os
import re
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
import regex
import rustbpe
import tiktoken
from pydantic import BaseModel, ConfigDict, Field

from nanofuse.train.data.shards import without_text
from nanofuse.train.errors import UserError
from nanofuse.train.files import write_text_atomically
from nanofuse.train.schemas import read_validated

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
MAX_TRAINING_CHARS = 2_000_000_000  # of all documents, once each is cut at DOC_CAP
DOC_CAP = 10_000
TRAIN_HINT = "train one with python -m train.data train-tokenizer --data DIR"
MAX_VOCAB_SIZE = 2**20
MAX_PATTERN_CHARS = 10_000
MAX_REPEATS = 10_000  # of all counted repetitions of a pattern together, which are unrolled
# Beyond about a million blanks in a row the libraries' regular expressions run out of stack.
MAX_BLANKS = 2**19
BLANK_RUN = re.compile(rf"(?<!\s)\s{{{MAX_BLANKS},}}")
# What a pattern has to take whole: every ASCII character, other scripts, blanks of many kinds.
PROBE = "".join(map(chr, range(128))) + (
    " It's naïve, I'LL say 12345 日本語 🎉 e\u0301\u200b\ufffd!?"
    "\n\n  \t\r\n\u00a0\u3000\u2028 x \n "
)


def cut_blanks(text):
    """Pieces of a text that joined give it again, none with more than MAX_BLANKS blanks in a row.

    A text without such a run is one piece.
    """
    step = MAX_BLANKS // 2  # a run that is too long has one of these slices to itself
    starts = range(0, len(text) - step + 1, step)
    if len(text) <= MAX_BLANKS or not any(text[i : i + step].isspace() for i in starts):
        return [text]
    cuts = [0]
    for run in BLANK_RUN.finditer(text):
        cuts += range(run.start() + MAX_BLANKS, run.end(), MAX_BLANKS)
    return [text[i:j] for i, j in pairwise([*cuts, len(text)])]


@contextmanager
def naming_failures(what):
    """A ValueError or a panic (no Exception) of a native library becomes a UserError on `what`."""
    try:
        yield
    except BaseException as error:
        ours = isinstance(error, UserError)  # of the data that is read meanwhile
        known = isinstance(error, ValueError) or type(error).__module__ == "pyo3_runtime"
        if ours or not known:
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"the tokenizer's library failed on {what} ({reason})") from None


class TokenizerFile(BaseModel):
    """What a tokenizer file holds; tokens are base64."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: Literal[FORMAT]
    pattern: str = Field(min_length=1, max_length=MAX_PATTERN_CHARS)
    special_tokens: list[str] = Field(max_length=MAX_VOCAB_SIZE)
    tokens: list[Annotated[str, Field(min_length=4)]] = Field(
        min_length=NUM_BYTES, max_length=MAX_VOCAB_SIZE
    )
    asked_vocab_size: int | None = Field(None, ge=MIN_VOCAB_SIZE, le=MAX_VOCAB_SIZE)


def check_pattern(pattern):
    """Refuse a pattern that does not split every text into pieces that are not empty.

    Raises:
        ValueError: what is wrong with it.
    """
    if not isinstance(pattern, str) or not 0 < len(pattern) <= MAX_PATTERN_CHARS:
        raise ValueError(f"its pattern is no text of 1 to {MAX_PATTERN_CHARS:,} characters")
    repeats = [int(number[:9]) for number in re.findall(r"\d+(?=[,}])", pattern)]
    if math.prod(max(number, 1) for number in repeats) > MAX_REPEATS:
        raise ValueError("its pattern repeats too much")
    try:
        compiled = regex.compile(pattern)
        empty = compiled.match("", timeout=1)
        pieces = [match[0] for match in compiled.finditer(PROBE, timeout=1)]
    except (regex.error, TimeoutError, RecursionError, MemoryError, OverflowError) as error:
        raise ValueError(f"its pattern: {error}") from None
    if empty or not all(pieces):
        raise ValueError("its pattern matches nothing at all")
    if "".join(pieces) != PROBE:
        raise ValueError("its pattern leaves parts of a text out")


def check_tokens(tokens):
    """Refuse tokens of which one comes twice, or that lack a byte.

    Raises:
        ValueError: which.
    """
    known = set()
    for token in tokens:
        if token in known:
            raise ValueError(f"the token {token[:20]!r} comes twice")
        known.add(token)
    missing = [byte for byte in range(NUM_BYTES) if bytes([byte]) not in known]
    if missing:
        raise ValueError(f"the byte {missing[0]:#04x} has no token")


class Tokenizer:
    """Byte-pair encoding given by its merges in rank order.

    Args:
        tokens: byte strings in rank order, the 256 single bytes among them.
        pattern: regular expression that splits text before merging.
        asked_vocab_size: what training was asked for where the text gave fewer.
    """

    def __init__(self, tokens, pattern=SPLIT_PATTERN, asked_vocab_size=None):
        self.tokens, self.pattern = list(tokens), pattern
        self.asked_vocab_size = asked_vocab_size
        specials = {name: len(self.tokens) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.encoding = tiktoken.Encoding(
            "nanofuse",
            pat_str=pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(self.tokens)},
            special_tokens=specials,
        )
        self.bos = specials[BOS]

    def __reduce__(self):
        return Tokenizer, (self.tokens, self.pattern, self.asked_vocab_size)

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn merges from an iterable of str; a small corpus may give fewer than asked.

        Raises:
            UserError: vocab_size leaves no room for 256 bytes and the special tokens, or is more
                than a file may hold.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise UserError(f"--vocab-size {vocab_size} is below the minimum of {MIN_VOCAB_SIZE}")
        if vocab_size > MAX_VOCAB_SIZE:
            raise UserError(f"--vocab-size {vocab_size} is above the maximum of {MAX_VOCAB_SIZE}")
        trainer = rustbpe.Tokenizer()
        pieces = (piece for text in texts for piece in cut_blanks(text))
        with naming_failures("the text to train on"):
            trainer.train_from_iterator(
                pieces, vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN
            )
        ranks = trainer.get_mergeable_ranks()  # [(bytes, rank)]
        tokenizer = cls(bytes(token) for token, _ in sorted(ranks, key=lambda pair: pair[1]))
        if tokenizer.vocab_size < vocab_size:
            tokenizer.asked_vocab_size = vocab_size
        return tokenizer

    @classmethod
    def load(cls, path, hint=TRAIN_HINT):
        """Read a tokenizer saved by `save`.

        Args:
            hint: the way out, for the message.

        Raises:
            UserError: the file is missing or is not one.
        """
        path = os.fspath(path)
        try:
            return cls._read(path)
        except FileNotFoundError:
            raise UserError(f"no tokenizer at {path}; {hint}") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); {hint}") from None
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{path} is not a tokenizer of nanofuse ({reason}); move it away and {hint}"
            ) from None

    @classmethod
    def _read(cls, path):
        """As load; ValueError says what is wrong with the file."""
        fields = read_validated(path, TokenizerFile)
        if fields.special_tokens != list(SPECIAL_TOKENS):
            raise ValueError("its special tokens are others")
        tokens = [base64.b64decode(token, validate=True) for token in fields.tokens]
        return cls.checked(tokens, fields.pattern, fields.asked_vocab_size)

    @classmethod
    def checked(cls, tokens, pattern, asked_vocab_size=None):
        """A tokenizer that takes every text; the arguments are those of the class.

        Raises:
            ValueError: what is wrong with them.
        """
        check_tokens(tokens)
        check_pattern(pattern)
        with naming_failures("its pattern"):
            tokenizer = cls(tokens, pattern, asked_vocab_size)
        if tokenizer.decode(tokenizer.encode(PROBE)) != PROBE:
            raise ValueError("its pattern leaves parts of a text out")
        return tokenizer

    def _fields(self):
        return {
            "format": FORMAT,
            "pattern": self.pattern,
            "special_tokens": list(SPECIAL_TOKENS),
            "tokens": [base64.b64encode(token).decode("ascii") for token in self.tokens],
        }

    def to_json(self):
        fields = self._fields()
        if self.asked_vocab_size is not None:
            fields["asked_vocab_size"] = self.asked_vocab_size
        return json.dumps(fields, indent=0)

    def save(self, path):
        """Write JSON, atomically."""
        write_text_atomically(path, self.to_json())

    @property
    def fingerprint(self):
        """SHA-256 of pattern and tokens as they are saved, hexadecimal."""
        return hashlib.sha256(json.dumps(self._fields(), indent=0).encode()).hexdigest()

    @property
    def vocab_size(self):
        return len(self.tokens) + len(SPECIAL_TOKENS)

    @property
    def dtype(self):
        """The smallest numpy dtype that holds every id: uint16 or uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    @property
    def shortfall(self):
        """Words for a vocabulary of fewer tokens than were asked for, or None."""
        if self.asked_vocab_size is None:
            return None
        return (
            f"{self.vocab_size:,} tokens are all that the text gave of the "
            f"{self.asked_vocab_size:,} of --vocab-size"
        )

    def encode(self, text):
        """Token ids of `text`; special tokens in it are ordinary text."""
        with naming_failures(f"a text of {len(text):,} characters"):
            return [i for piece in cut_blanks(text) for i in self.encoding.encode_ordinary(piece)]

    def encode_flat(self, texts):
        """Token ids of texts one after the other, `<|bos|>` before each.

        One call into tiktoken does them all, as it gives the interpreter's lock away, and whoever
        takes that back may have to wait.

        Args:
            texts: list of str; None stands for no document, without a token.

        Returns:
            (tokens (n,) in `dtype`, offsets (len(texts) + 1,) int64 of the documents in them)
        """
        there = [text for text in texts if text is not None]
        pieces = [cut_blanks(text) for text in there]
        encode = partial(self.encoding.encode_to_numpy, disallowed_special=())
        size = sum(map(len, there))
        with naming_failures(f"{len(there)} documents of {size:,} characters"):
            # rare: the text stays text, and would look like a start; or it is cut
            if any(BOS in text for text in there) or any(len(parts) > 1 for parts in pieces):
                ids = [np.concatenate([[self.bos], *map(encode, parts)]) for parts in pieces]
                starts = np.cumsum([0, *map(len, ids)])
                tokens = np.concatenate(ids) if ids else np.empty(0)
            else:
                tokens = encode("".join(BOS + text for text in there), allowed_special={BOS})
                starts = np.append(np.flatnonzero(tokens == self.bos), len(tokens))
        counts = np.cumsum([0, *(text is not None for text in texts)])
        return tokens.astype(self.dtype), starts.astype(np.int64)[counts]

    def encode_documents(self, texts):
        """Token ids of every text, `<|bos|>` first: a list of (n,) arrays in `dtype`."""
        tokens, offsets = self.encode_flat(texts)
        return [tokens[i:j] for i, j in pairwise(offsets.tolist())]

    def decode(self, ids):
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self.encoding.decode([int(i) for i in ids])

    def token_bytes(self):
        """Bytes of every token, (vocab_size,) int64 numpy; special tokens count 0."""
        return np.array([len(token) for token in self.tokens] + [0] * len(SPECIAL_TOKENS), np.int64)


def train_on_corpus(
    corpus, vocab_size, max_chars=MAX_TRAINING_CHARS, doc_cap=DOC_CAP, note=lambda characters: None
):
    """Tokenizer trained on a corpus's training documents in order, as nanochat does it.

    Args:
        max_chars: the document that takes the sum of characters beyond it is the last one.
        doc_cap: characters of a document that are read.
        note: called with the characters of each document, before it is read.

    Raises:
        UserError: they hold no text, or cannot be read.
    """

    def texts():
        total = 0
        for text in corpus.head():
            start = text[:doc_cap]
            total += len(start)
            note(len(start))
            yield start
            if total > max_chars:
                return
        if not total:
            raise without_text(corpus, "train")

    return Tokenizer.train(texts(), vocab_size)
