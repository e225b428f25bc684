from types import SimpleNamespace

import torch

from nanofuse.train import samples
from nanofuse.train.samples import SAMPLE_TOKENS, draw_sample


def test_prompt_and_sample_fill_the_rotary_table_and_no_more(tokenizer, monkeypatch):
    """The last token drawn needs no position: nothing follows it."""
    calls = []

    def generate(model, ids, rows, count, sampling, stop):
        calls.append((len(ids), count, sampling.seed))
        assert ids[0] == stop == tokenizer.bos and rows == 1
        return [[ids[-1]]] * count

    monkeypatch.setattr(samples, "generate", generate)
    prompt = "the cat sat on a mat while rain fell"
    ids = tokenizer.encode(prompt)
    for room in (1, 2, 9, 2 * len(ids), 1000):
        text = draw_sample(SimpleNamespace(cos=torch.zeros(room, 4)), tokenizer, prompt, 7)
        length, count, seed = calls.pop()
        assert length == min(len(ids) + 1, max(room // 2, 1)) and seed == 7
        assert count == min(SAMPLE_TOKENS, room - length + 1)
        kept = ids[: length - 1]
        assert text == tokenizer.decode([*kept, *[(kept or [tokenizer.bos])[-1]] * count])
