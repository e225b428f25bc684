"""The exported modelling file against this project's own model and generator."""

import json

import pytest
import torch

from nanofuse.model.engine import Sampling, generate
from tests.helpers import random_model, small_config
from tests.train.hub import export, load, needs_transformers

pytestmark = needs_transformers
SHAPES = {
    "bigram": {},
    "dense": {"bigram_embed_factor": 0},
    "grouped": {"n_kv_head": 1, "window_pattern": "SL"},
    "odd vocabulary": {"vocab_size": 300},
}


def tokens_of(rows, length, vocab_size=300):
    generator = torch.Generator().manual_seed(length)
    return torch.randint(vocab_size, (rows, length), generator=generator)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(our model, transformers' of its export) with a bigram table, in fp32."""
    folder = tmp_path_factory.mktemp("hub") / "bigram"
    model, folder = export(folder, small_config(), torch.float32)
    return model, load(folder)


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_ours_to_1e_5_in_fp32(tmp_path, shape):
    """300 tokens pass the window of 128 and that of 256, the length of a row."""
    model, folder = export(tmp_path / "m", small_config(**SHAPES[shape]), torch.float32)
    theirs, tokens = load(folder), tokens_of(2, 300)
    assert theirs.dtype == torch.float32 and not theirs.training
    ours, logits = model(tokens), theirs(tokens).logits
    difference = (ours - logits).abs().max().item()
    print(f"{shape}: largest difference {difference:.1e} of {ours.abs().max():.2f}")
    assert logits.dtype == torch.float32 and difference <= 1e-5
    assert torch.equal(theirs(tokens, logits_to_keep=3).logits, logits[:, -3:])
    assert torch.equal(theirs(tokens, use_cache=False).logits, logits)


@torch.no_grad()
def test_logits_are_ours_to_1e_3_in_bf16(tmp_path):
    """Weights are rounded once, on both sides, and the lambdas nowhere."""
    config = small_config()
    model, folder = export(tmp_path / "m", config, torch.bfloat16)
    theirs, tokens = load(folder), tokens_of(2, 200)
    assert theirs.dtype == torch.bfloat16
    assert theirs.resid_lambdas.dtype == theirs.bigram_lambdas.dtype == torch.float32
    assert torch.equal(theirs.resid_lambdas, model.resid_lambdas)
    ours, logits = model(tokens), theirs(tokens).logits
    difference = ((ours - logits).norm() / ours.norm()).item()
    print(f"relative difference {difference:.1e}")
    assert difference <= 1e-3


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("length", [1, 120])
def test_greedy_tokens_are_those_of_our_generator(pair, use_cache, length):
    """From 120 on the window of 128 is passed."""
    model, theirs = pair
    prompt = tokens_of(1, length)
    ours = [c[0] for c in generate(model, prompt[0].tolist(), 1, 30, Sampling(temperature=0))]
    found = theirs.generate(
        prompt, max_new_tokens=30, do_sample=False, use_cache=use_cache, pad_token_id=0
    )
    assert found[0, length:].tolist() == ours


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(1, 2), (5, 130, 140)])
def test_a_cache_filled_in_pieces_gives_the_same_logits(pair, cuts):
    theirs, tokens = pair[1], tokens_of(2, 200)
    whole, cache, pieces = theirs(tokens, use_cache=False).logits, None, []
    for piece in tokens.tensor_split(cuts, dim=1):
        output = theirs(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_as_without_padding(pair, side):
    theirs, rows = pair[1], [tokens_of(1, n)[0] for n in (3, 150, 140)]
    longest = max(map(len, rows))
    padded, mask = torch.full((3, longest), 7), torch.zeros(3, longest, dtype=torch.long)
    spans = [slice(longest - len(r), None) if side == "left" else slice(len(r)) for r in rows]
    for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
        padded[i, span], mask[i, span] = row, 1
    logits = theirs(padded, attention_mask=mask).logits
    assert logits.isfinite().all()
    for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
        alone = theirs(row[None]).logits[0]
        torch.testing.assert_close(logits[i, span], alone, rtol=1e-5, atol=1e-5)


def test_left_padded_prompts_generate_as_alone(pair):
    theirs, rows = pair[1], [tokens_of(1, n)[0] for n in (2, 125)]
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    padded, mask = torch.zeros(2, 125, dtype=torch.long), torch.zeros(2, 125, dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, -len(row) :], mask[i, -len(row) :] = row, 1
    found = theirs.generate(padded, attention_mask=mask, **settings)
    for i, row in enumerate(rows):
        alone = theirs.generate(row[None], **settings)[0, len(row) :]
        assert found[i, 125:].tolist() == alone.tolist()


def test_beams_carry_their_tokens_along(pair):
    """A beam that another one replaces takes the previous tokens with it."""
    theirs, prompt = pair[1], tokens_of(1, 4)
    settings = {"num_beams": 4, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with_cache = theirs.generate(prompt, use_cache=True, **settings)
    assert torch.equal(with_cache, theirs.generate(prompt, use_cache=False, **settings))


@torch.no_grad()
def test_save_and_load_again(pair, tmp_path):
    from transformers import NanoChatForCausalLM

    model, theirs = pair
    theirs.save_pretrained(tmp_path / "again")
    again, tokens = load(tmp_path / "again"), tokens_of(1, 20)
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)
    assert again.lm_head.weight.data_ptr() != again.get_input_embeddings().weight.data_ptr()
    assert again.state_dict().keys() == model.state_dict().keys()
    with pytest.raises(KeyError, match="trust_remote_code=True"):
        NanoChatForCausalLM.from_pretrained(tmp_path / "again")


def test_loss_is_the_mean_of_ours(pair):
    model, theirs = pair
    tokens = tokens_of(2, 30)
    ours = model(tokens[:, :-1], tokens[:, 1:].contiguous())
    torch.testing.assert_close(theirs(tokens, labels=tokens).loss, ours)


def test_other_classes_refuse_the_folder(tmp_path):
    """transformers' NanoChat would leave the value embeddings, smear and lambdas out."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, NanoChatForCausalLM

    _, folder = export(tmp_path / "m", small_config(), torch.float32)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "nanofuse" and config["architectures"] == ["NanofuseForCausalLM"]
    for other in (NanoChatForCausalLM, LlamaForCausalLM):
        with pytest.raises(KeyError, match="trust_remote_code=True"):
            other.from_pretrained(folder)
    with pytest.raises(ValueError, match="custom code"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


def test_what_it_does_not_do_is_refused(pair):
    from transformers import DynamicCache, StaticCache

    theirs, tokens = pair[1], tokens_of(1, 3)
    other = DynamicCache()
    other.update(*(torch.zeros(1, 2, 5, 16) for _ in range(2)), 0)
    refused = {
        "input_ids": lambda: theirs(inputs_embeds=torch.zeros(1, 3, 32)),
        "StaticCache": lambda: theirs(
            tokens, past_key_values=StaticCache(theirs.config, max_cache_len=8)
        ),
        "another model": lambda: theirs(tokens, past_key_values=other),
        "attention_mask": lambda: theirs(tokens, attention_mask=torch.ones(1, 2)),
        "vocabulary": lambda: theirs.resize_token_embeddings(400),
        "tie": lambda: type(theirs.config)(tie_word_embeddings=True),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_the_config_says_what_ours_does(pair):
    config = pair[1].config
    for fields in ({}, {"window_pattern": "L"}, {"window_pattern": "SL"}, {"sequence_len": 1000}):
        ours = small_config(**fields)
        theirs = type(config)(**ours.to_dict())
        assert theirs.windows == ours.windows
        layers = [i for i in range(ours.n_layer) if theirs.has_value_embedding(i)]
        assert layers == ours.value_embed_layers
        assert theirs.max_position_embeddings == ours.sequence_len
    counted = sum(p.numel() for p in pair[1].parameters())
    assert counted == random_model(small_config()).config.num_params
