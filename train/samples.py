"""A sample of what a model writes."""

from nanofuse.model.engine import Sampling, generate

SAMPLE_TOKENS = 64


def draw_sample(model, tokenizer, prompt, seed):
    """The prompt and its continuation, both as far as they fit the rotary table."""
    room = model.cos.size(0)
    ids = [tokenizer.bos, *tokenizer.encode(prompt)][: max(room // 2, 1)]
    count = min(SAMPLE_TOKENS, room - len(ids) + 1)
    sampling = Sampling(temperature=0.8, top_k=50, seed=seed)
    columns = generate(model, ids, 1, count, sampling, tokenizer.bos)
    return tokenizer.decode([*ids[1:], *(column[0] for column in columns)])
