"""Tokens as text while they come."""

import codecs
import time


class TextStream:
    """Writes the text of tokens one by one; a character's bytes may come in several of them.

    What was written in the end is the tokenizer's own decoding of all tokens: bytes that are not
    UTF-8 become U+FFFD.

    Args:
        tokenizer: train.data.tokenizer.Tokenizer.
        write: called with each piece of text, which is not empty.
    """

    def __init__(self, tokenizer, write):
        self.bytes_of, self.write = tokenizer.encoding.decode_single_token_bytes, write
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token):
        self._show(self.decoder.decode(self.bytes_of(token)))

    def end(self):
        """Write what an unfinished character leaves."""
        self._show(self.decoder.decode(b"", final=True))

    def _show(self, text):
        if text:
            self.write(text)


class Pace:
    """Counts tokens and the seconds that they took; the first ones' are those of the prompt."""

    def __init__(self):
        self.start, self.first, self.last = time.perf_counter(), None, None
        self.tokens = self.first_tokens = 0

    def add(self, count):
        """Note `count` tokens, of a step of all rows."""
        self.last = time.perf_counter()
        self.tokens += count
        if self.first is None:
            self.first, self.first_tokens = self.last, count

    def line(self, how):
        """Words for it.

        Args:
            how: what computed them.
        """
        if self.first is None:
            return f"no tokens ({how})"
        after, seconds = self.tokens - self.first_tokens, self.last - self.first
        rate = f", then {after / seconds:,.0f} tokens/s" if after and seconds else ""
        return (
            f"{self.tokens:,} tokens: the first after {self.first - self.start:.3f} s{rate} ({how})"
        )
