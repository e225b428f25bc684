"""The decoder against the plain path of the engine; in the interpreter without a GPU."""

from contextlib import contextmanager

import pytest
import torch

from nanofuse.model.config import GPTConfig
from nanofuse.model.decode import CAPACITY_MULTIPLE, Decoder
from nanofuse.model.engine import KVCache, Sampling, generate
from nanofuse.model.gpt import GPT
from tests.helpers import random_model, small_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GREEDY = Sampling(temperature=0)
SHAPES = {"bigram": {}, "dense": {"bigram_embed_factor": 0}, "grouped": {"n_kv_head": 1}}


def make(dtype=torch.float32, **fields):
    return random_model(small_config(**fields), dtype, device=DEVICE)


def prompt_of(length):
    return torch.randint(320, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def prefilled(model, prompt):
    cache = KVCache(model.config, 1, model.dtype, DEVICE)
    with torch.inference_mode():
        model(torch.tensor([prompt], device=DEVICE), cache=cache)
    return cache


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("length", "rows"), [(1, 1), (126, 3)])
def test_logits_are_those_of_the_model(shape, length, rows):
    """From 126 on the window of 128 is passed. Every row goes its own way."""
    model = make(**SHAPES[shape])
    prompt, decoder = prompt_of(length), Decoder(model, graphs=False)
    decoder.start(prefilled(model, prompt), rows, length + 3)
    more = torch.randint(320, (rows, 3), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    whole = torch.tensor([prompt], device=DEVICE).repeat(rows, 1)
    with torch.inference_mode():
        expected = model(torch.cat([whole, more], dim=1))[:, length:]
        found = torch.stack([decoder.step(tokens).clone() for tokens in more.T], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_greedy_tokens_are_those_of_the_plain_path():
    model = make()
    decoder = Decoder(model, graphs=DEVICE == "cuda")
    for length, count in ((3, 4), (250, 3)):
        plain = list(generate(model, prompt_of(length), 2, count, GREEDY))
        fused = list(generate(model, prompt_of(length), 2, count, GREEDY, decoder=decoder))
        assert fused == plain
    assert decoder.keys[0].size(2) == CAPACITY_MULTIPLE
    assert list(generate(model, prompt_of(255), 1, 3, GREEDY, decoder=decoder)) == list(
        generate(model, prompt_of(255), 1, 3, GREEDY)
    )
    assert decoder.keys[0].shape[::2] == (1, 2 * CAPACITY_MULTIPLE)


def test_draws_are_those_of_the_plain_path():
    model, sampling = make(), Sampling(1.0, 20, seed=3)
    decoder = Decoder(model, graphs=DEVICE == "cuda")
    plain = list(generate(model, [5, 6], 2, 3, sampling))
    assert list(generate(model, [5, 6], 2, 3, sampling, decoder=decoder)) == plain


class FakeGraph:
    """Counts replays."""

    replays = 0

    def replay(self):
        FakeGraph.replays += 1


def test_the_second_step_is_recorded_and_replayed(monkeypatch):
    """A fake graph records a step by running it, and replays nothing."""
    recorded = []

    @contextmanager
    def record(graph, pool, capture_error_mode):
        recorded.append(capture_error_mode)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(FakeGraph, "replays", 0)
    model = make(bigram_embed_factor=0)
    decoder = Decoder(model, graphs=True)
    decoder.start(prefilled(model, [1, 2, 3]), 1, 10)
    tokens = torch.tensor([4], device=DEVICE)
    decoder.step(tokens)
    assert not recorded and decoder.graph is None
    second = decoder.step(tokens)
    assert recorded == ["thread_local"] and FakeGraph.replays == 1
    assert decoder.step(tokens) is second and FakeGraph.replays == 2 and len(recorded) == 1
    decoder.start(prefilled(model, [1, 2]), 1, 10)  # the same buffers, and the same graph
    decoder.step(tokens)
    assert FakeGraph.replays == 3 and len(recorded) == 1
    decoder.start(prefilled(model, [1, 2]), 2, 10)
    assert decoder.graph is None


def test_what_does_not_fit_is_refused():
    odd = GPTConfig.from_depth(1, 24, 24, sequence_len=26, vocab_size=64)
    with pytest.raises(ValueError, match="multiple of 16"):
        Decoder(GPT(odd), graphs=False)
    model = make()
    with pytest.raises(ValueError, match="position 2561 is beyond"):
        Decoder(model, graphs=False).start(prefilled(model, [1]), 1, 2561)


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [1, 16])
def test_graphs_in_bf16_err_no_more_than_twice_the_plain_path(rows):
    config = small_config(vocab_size=1000)
    model = random_model(config, torch.bfloat16, device="cuda")
    truth = random_model(config, torch.float32, device="cuda")
    truth.load_state_dict(model.state_dict())
    prompt, decoder = prompt_of(100), Decoder(model, graphs=True)
    cache = prefilled(model, prompt)
    decoder.start(cache, rows, 160)
    wide = cache.expand(rows)
    exact = prefilled(truth, prompt).expand(rows)
    generator = torch.Generator("cuda").manual_seed(0)
    errors = [0.0, 0.0]
    with torch.inference_mode():
        for _ in range(60):
            tokens = torch.randint(1000, (rows,), generator=generator, device="cuda")
            true = truth(tokens[:, None], cache=exact)[:, -1]
            for i, logits in enumerate(
                (decoder.step(tokens), model(tokens[:, None], cache=wide)[:, -1])
            ):
                errors[i] += (logits - true).norm().item()
    assert decoder.graph is not None
    print(f"{rows} rows: error {errors[0]:.3f} fused, {errors[1]:.3f} plain")
    assert errors[0] <= 2 * errors[1]
