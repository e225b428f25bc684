import math

import pytest
import torch

from nanofuse.model.config import GPTConfig
from nanofuse.model.engine import KVCache, Sampling, generate, row_generators, sample_next
from tests.helpers import random_model, small_config

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def model():
    return random_model(small_config())


@torch.no_grad()
def greedy_without_cache(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    return tokens[len(prompt) :]


def prompt_of(length):
    return torch.randint(320, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 100, 129, 257])  # 129 = window + 1, 257 = T + 1
def test_greedy_with_cache_equals_without(model, length, samples):
    """40 tokens more cross the window of 128 from 100, and that of 256 from 257's prompt."""
    prompt = prompt_of(length)
    expected = greedy_without_cache(model, prompt, 40)
    columns = list(generate(model, prompt, samples, 40, GREEDY))
    for sample in range(samples):
        assert [column[sample] for column in columns] == expected


@pytest.mark.parametrize("fields", [{"bigram_embed_factor": 0}, {"n_kv_head": 1}])
def test_dense_and_grouped_models_decode_alike(fields):
    model = random_model(small_config(**fields))
    expected = greedy_without_cache(model, prompt_of(5), 20)
    assert [c[0] for c in generate(model, prompt_of(5), 1, 20, GREEDY)] == expected


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(1,), (1, 2), (64, 129), (130, 131, 200)])
def test_prefill_in_pieces_gives_the_same_logits(model, cuts):
    tokens = torch.tensor([prompt_of(210), prompt_of(210)[::-1]])
    whole = model(tokens)
    cache = KVCache(model.config, 2, model.dtype, "cpu", capacity=1)
    pieces = [model(piece, cache=cache) for piece in tokens.tensor_split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_previous_token_survives_expansion_and_growth(model):
    cache = KVCache(model.config, 1, model.dtype, "cpu", capacity=2)
    model(torch.tensor([[5, 6, 7]]), cache=cache)
    assert cache.capacity == 4
    wide = cache.expand(3)
    assert wide.prev_tokens.tolist() == [[7], [7], [7]]
    torch.testing.assert_close(wide.prev_embedding, cache.prev_embedding.expand(3, -1))
    step = model(torch.tensor([[8], [8], [9]]), cache=wide)
    expected = model(torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]]))[:, -1]
    torch.testing.assert_close(step[0, 0], expected[0])
    torch.testing.assert_close(step[2, 0], expected[1])
    assert cache.length == 3 and cache.prev_tokens.tolist() == [[7]]  # the original is untouched
    with pytest.raises(ValueError, match="one-row"):
        wide.expand(2)


def test_previous_state_matters(model):
    """Dropping the cache's previous token or embedding changes the logits, so the tests above would
    notice."""
    tokens = torch.tensor([prompt_of(6)])
    expected = model(tokens)[0, -1]
    for name in ("prev_tokens", "prev_embedding"):
        cache = KVCache(model.config, 1, model.dtype, "cpu")
        model(tokens[:, :5], cache=cache)
        setattr(cache, name, torch.zeros_like(getattr(cache, name)))
        assert (model(tokens[:, 5:], cache=cache)[0, -1] - expected).abs().max() > 1e-3


def test_seed_decides_the_samples(model):
    def draw(seed, top_k=0):
        return list(generate(model, [1, 2], 2, 12, Sampling(1.0, top_k, seed)))

    assert draw(3) == draw(3) != draw(4)
    assert any(a != b for a, b in draw(3))  # two rows of one prefill differ
    assert draw(3, top_k=1) == list(generate(model, [1, 2], 2, 12, GREEDY))


def test_top_k_draws_from_the_likeliest(model):
    logits = model(torch.tensor([[1, 2]]))[0, -1]
    allowed = set(logits.topk(3).indices.tolist())
    drawn = set()
    for seed in range(40):
        drawn.update(*generate(model, [1, 2], 4, 1, Sampling(5.0, 3, seed)))
    assert drawn == allowed


def test_a_draw_is_multinomials(model):
    logits = model(torch.tensor([[1, 2], [3, 4], [5, 6]]))[:, -1].float()
    for seed in range(5):
        sampling = Sampling(0.7, 0, seed)
        drawn = sample_next(logits, sampling, row_generators(seed, 3, "cpu"))
        chances = ((logits - logits.amax(dim=-1, keepdim=True)) / 0.7).softmax(dim=-1)
        rows = zip(chances, row_generators(seed, 3, "cpu"), strict=True)
        assert drawn.tolist() == [torch.multinomial(p, 1, generator=g).item() for p, g in rows]


def test_defaults():
    assert Sampling() == Sampling(1.0, 50, 0)
    tiny = random_model(GPTConfig.from_depth(1, 24, 24, sequence_len=26, vocab_size=64))
    columns = list(generate(tiny, [1, 2]))
    assert len(columns) == 256 and {len(column) for column in columns} == {1}
    assert columns[:9] == list(generate(tiny, [1, 2], 1, 9, Sampling()))


def test_rows_end_at_the_stop_token(model):
    greedy = greedy_without_cache(model, [1, 2], 10)
    stop = greedy[4]
    columns = list(generate(model, [1, 2], 2, 10, GREEDY, stop_token=stop))
    assert [c[0] for c in columns] == greedy[: greedy.index(stop)]


def test_an_ended_row_gives_none_while_others_go_on(model):
    sampling = Sampling(1.0, 0, 1)
    free = list(generate(model, [1, 2], 2, 12, sampling))
    stop = free[2][0]
    first = [c[0] for c in free].index(stop)
    columns = list(generate(model, [1, 2], 2, 12, sampling, stop_token=stop))
    assert all(c[0] is None for c in columns[first:])
    other = [c[1] for c in free]
    end = other.index(stop) if stop in other else 12
    assert [c[1] for c in columns][:end] == other[: len(columns)][:end]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: list(generate(m, [])), "at least one token"),
        (lambda m: list(generate(m, [1], num_samples=0)), "num_samples"),
        (lambda m: Sampling(temperature=-1), "temperature"),
        (lambda m: Sampling(top_k=-1), "top_k"),
    ],
)
def test_bad_arguments(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_training_mode_is_restored(model):
    model.train()
    list(generate(model, [1], 1, 2, GREEDY))
    assert model.training
    model.eval()


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-45, 1e-40, 1e-8])
def test_tiny_temperatures_are_greedy(model, temperature):
    """Divided by them, logits are infinite or NaN in fp32."""
    greedy = list(generate(model, [1, 2, 3], 2, 8, Sampling(0.0)))
    assert list(generate(model, [1, 2, 3], 2, 8, Sampling(temperature))) == greedy


@pytest.mark.parametrize("temperature", [math.nan, math.inf, -1.0])
def test_temperatures_that_are_none(temperature):
    with pytest.raises(ValueError, match="temperature"):
        Sampling(temperature)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_no_numbers_are_said(temperature):
    model = random_model(small_config(), torch.float32)
    with torch.no_grad():
        model.lm_head.weight[3, 0] = math.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        list(generate(model, [1, 2, 3], 2, 8, Sampling(temperature)))


def test_a_sample_does_not_depend_on_its_neighbours(model):
    def rows(count, seed=3):
        columns = generate(model, [1, 2], count, 12, Sampling(1.0, 0, seed))
        return list(zip(*columns, strict=True))

    eight = rows(8)
    assert all(rows(count) == eight[:count] for count in (1, 2, 5))
    assert len(set(eight)) == 8 and not set(eight) & set(rows(8, seed=4))
