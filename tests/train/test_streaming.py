"""Text of tokens one by one, and the pace."""

import random

from nanofuse.train import streaming
from nanofuse.train.streaming import Pace, TextStream


def test_pieces_make_the_decoding_of_all_tokens(tokenizer):
    """Characters of several tokens, halves of them, and bytes that are no text."""
    draw = random.Random(0)
    texts = ["é", "日本語", "🎉🎉", "the cat", "<|bos|>", "\ufffd"]
    for _ in range(200):
        ids = [i for _ in range(4) for i in tokenizer.encode(draw.choice(texts))]
        for _ in range(draw.randrange(3)):
            ids[draw.randrange(len(ids))] = draw.randrange(tokenizer.vocab_size)
        del ids[draw.randrange(1, len(ids) + 1) :]
        pieces = []
        stream = TextStream(tokenizer, pieces.append)
        for token in ids:
            stream.add(token)
        stream.end()
        assert "".join(pieces) == tokenizer.decode(ids) and all(pieces)


def test_a_character_is_written_with_its_last_token(tokenizer):
    pieces = []
    stream = TextStream(tokenizer, pieces.append)
    for token in "🎉".encode():  # four tokens, a byte each
        assert pieces == []
        stream.add(tokenizer.encoding.encode_single_token(bytes([token])))
    assert pieces == ["🎉"]


def test_pace(monkeypatch):
    now = iter([10.0, 10.5, 10.75, 11.0])
    monkeypatch.setattr(streaming.time, "perf_counter", lambda: next(now))
    pace = Pace()
    assert pace.line("x") == "no tokens (x)"
    pace.add(4)
    assert pace.line("x") == "4 tokens: the first after 0.500 s (x)"
    pace.add(4)
    pace.add(2)
    assert pace.line("x") == "10 tokens: the first after 0.500 s, then 12 tokens/s (x)"
