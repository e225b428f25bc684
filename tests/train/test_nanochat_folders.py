"""Whole folders of nanochat's, with tokenizers, bigram tables and older metas, in and out."""

import json
import pickle

import numpy as np
import pytest
import tiktoken
import torch

from nanofuse.model.config import GPTConfig
from nanofuse.train import generate, nanochat
from nanofuse.train.checkpoint import load_model, load_tokenizer, save_checkpoint
from nanofuse.train.convert import main
from nanofuse.train.data.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from nanofuse.train.errors import UserError
from nanofuse.train.run_folder import find_checkpoint, run_dir
from tests.helpers import documents, random_model, small_config
from tests.model.reference import reference_logits

SIZES = {
    "sequence_len": 256,
    "vocab_size": 320,
    "n_layer": 2,
    "n_head": 2,
    "n_kv_head": 1,
    "n_embd": 64,
    "window_pattern": "SL",
}
BIGRAM = {"bigram_embed_factor": 3, "bigram_lambda_init": 0.05}


def tensors_of(bigram):
    """nanochat's state dict of SIZES, names and shapes written out."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return 0.2 * torch.randn(shape, generator=generator)

    tensors = {
        "transformer.wte.weight": draw(320, 64),
        "lm_head.weight": draw(320, 64),
        "resid_lambdas": 1 + draw(2),
        "x0_lambdas": draw(2),
        "smear_gate.weight": draw(1, 24),
        "smear_lambda": draw(1),
        "backout_lambda": draw(1),
        "value_embeds.1.weight": draw(320, 32),
        "transformer.h.1.attn.ve_gate.weight": draw(1, 12),
    }
    for i in range(2):
        for name, shape in (
            ("attn.c_q", (64, 64)),
            ("attn.c_k", (32, 64)),
            ("attn.c_v", (32, 64)),
            ("attn.c_proj", (64, 64)),
            ("mlp.c_fc", (256, 64)),
            ("mlp.c_proj", (64, 256)),
        ):
            tensors[f"transformer.h.{i}.{name}.weight"] = draw(*shape)
    if bigram:
        tensors["bigram_embed.weight"] = draw(3 * 320, 64)
        tensors["bigram_lambdas"] = draw(2)
    return tensors


def write(folder, tensors, model_config):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "model_000500.pt")
    meta = {"step": 500, "val_bpb": 0.9, "model_config": model_config}
    (folder / "meta_000500.json").write_text(json.dumps(meta))


def test_the_latest_step_is_taken(tmp_path):
    steps = [500, 7, 100_000, 20, 3000, 1_000_000, 60, 9999]
    for step in steps:
        (tmp_path / f"model_{step:06d}.pt").touch()
    (tmp_path / "model_x.pt").touch()
    assert nanochat.find_step(tmp_path) == 1_000_000
    assert nanochat.find_step(tmp_path, 20) == 20
    names = ", ".join(map(str, sorted(steps)))
    with pytest.raises(UserError, match=f"has no step 21; there are: {names}$"):
        nanochat.find_step(tmp_path, 21)


def write_pickle(path, tokenizer):
    """As nanochat writes it."""
    ranks = {token: rank for rank, token in enumerate(tokenizer.tokens)}
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    made = tiktoken.Encoding(
        "rustbpe", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=specials
    )
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(made))


@pytest.fixture
def base(work_dir, tokenizer):
    """A base directory of nanochat: a model and the tokenizer."""
    write(work_dir / "base" / "base_checkpoints" / "d2", tensors_of(False), SIZES)
    write_pickle(work_dir / "base" / "tokenizer" / "tokenizer.pkl", tokenizer)
    return work_dir / "base"


def imported(folder, name="x", *flags):
    """(model, meta) of the run made of a folder."""
    main(["from-nanochat", str(folder), "--run", name, *map(str, flags)])
    return load_model(find_checkpoint(run_dir(name)), "cpu", torch.float32)


def test_a_converted_run_generates_at_once(base, tokenizer, capsys):
    _, meta = imported(base / "base_checkpoints" / "d2")
    assert f"tokenizer: {base}/tokenizer/tokenizer.pkl" in capsys.readouterr().out
    assert meta["tokenizer"] == tokenizer.fingerprint
    generate.main("--run x --prompt cat --max-tokens 8 --device-type cpu".split())
    assert capsys.readouterr().out.startswith("cat")


def test_a_folder_named_from_within(base, monkeypatch):
    """Its parents are not in the name."""
    monkeypatch.chdir(base / "base_checkpoints" / "d2")
    _, meta = imported(".")
    assert meta["tokenizer"]


def test_the_tokenizer_inside_comes_first_and_the_flag_before_it(base, tokenizer, work_dir):
    folder = base / "base_checkpoints" / "d2"
    small = Tokenizer.train(documents(200), 300)
    write_pickle(base / "tokenizer" / "tokenizer.pkl", small)
    with pytest.raises(UserError, match=r"tokenizer\.pkl has 300 tokens, the model 320; name"):
        imported(folder)
    assert not run_dir("x").exists()
    tokenizer.save(work_dir / "own.json")
    imported(folder, "json", "--tokenizer", work_dir / "own.json")
    write_pickle(folder / "tokenizer" / "tokenizer.pkl", tokenizer)
    imported(folder, "inside")
    write_pickle(work_dir / "small.pkl", small)
    with pytest.raises(UserError, match=r"--tokenizer .*small\.pkl has 300 tokens"):
        imported(folder, "x", "--tokenizer", work_dir / "small.pkl")
    (folder / "tokenizer" / "tokenizer.pkl").write_bytes(b"x")
    with pytest.raises(UserError, match="is not nanochat's tokenizer"):
        imported(folder)


@pytest.mark.parametrize("bigram", [False, True])
def test_logits_are_those_of_the_formulas(work_dir, bigram):
    config = SIZES | (BIGRAM if bigram else {})
    write(work_dir / "d2", tensors_of(bigram), config)
    model, meta = imported(work_dir / "d2")
    assert meta["model_config"]["bigram_embed_factor"] == (3 if bigram else 0)
    tokens = torch.randint(320, (1, 140), generator=torch.Generator().manual_seed(1))
    expected = reference_logits(tensors_of(bigram), config, tokens[0].tolist())
    assert np.abs(model(tokens)[0].detach().numpy() - expected).max() <= 1e-4


@pytest.mark.parametrize("factor", [0, 3])
def test_out_and_in_again_are_equal_bits(work_dir, tokenizer, factor):
    first = random_model(small_config(bigram_embed_factor=factor), torch.float32)
    facts = {"model_config": first.config.to_dict(), "val_bpb": 1.5}
    save_checkpoint(run_dir("a"), 7, facts, first)
    tokenizer.save(run_dir("a") / "tokenizer.json")
    main(["to-nanochat", "out", "--run", "a"])

    theirs = torch.load(work_dir / "out" / "model_000007.pt", weights_only=True)
    assert {"bigram_embed.weight", "bigram_lambdas"} <= theirs.keys() or not factor
    meta = json.loads((work_dir / "out" / "meta_000007.json").read_text())
    fields = set(SIZES) | (set(BIGRAM) if factor else set())
    assert set(meta["model_config"]) == fields and meta["step"] == 7

    second, meta = imported("out", "b")
    assert second.config == first.config and meta["val_bpb"] == 1.5
    there = second.state_dict()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, theirs[name]) and torch.equal(tensor, there[name]), name
    tokens = torch.randint(320, (2, 200), generator=torch.Generator().manual_seed(1))
    assert torch.equal(first(tokens), second(tokens))
    again = load_tokenizer(run_dir("b"), second.config, meta)
    assert again.fingerprint == tokenizer.fingerprint


def exported(work_dir, tokenizer, target, name="a"):
    model = random_model(small_config(), torch.float32)
    save_checkpoint(run_dir(name), 7, {"model_config": model.config.to_dict()}, model)
    if tokenizer:
        tokenizer.save(run_dir(name) / "tokenizer.json")
    main(["to-nanochat", str(work_dir / target), "--run", name])


def test_the_tokenizer_files_are_nanochats(work_dir, tokenizer, capsys):
    exported(work_dir, tokenizer, "out")
    folder = work_dir / "out" / "tokenizer"
    assert f"tokenizer: {folder}" in capsys.readouterr().out
    encoding = pickle.loads((folder / "tokenizer.pkl").read_bytes())
    for text in [*documents(20), "naïve 日本語 1234", "<|bos|>", ""]:
        assert encoding.encode_ordinary(text) == tokenizer.encode(text)
    count = torch.load(folder / "token_bytes.pt", weights_only=True)
    assert count.dtype == torch.int32 and count.shape == (320,)
    raw = [len(encoding.decode_single_token_bytes(i)) for i in range(311)]
    assert count.tolist() == raw + [0] * 9 and min(raw) == 1


def test_under_a_base_directory_there_is_one_tokenizer(work_dir, tokenizer):
    exported(work_dir, tokenizer, "base/base_checkpoints/d4")
    assert (work_dir / "base" / "tokenizer" / "token_bytes.pt").is_file()
    assert not (work_dir / "base" / "base_checkpoints" / "d4" / "tokenizer").exists()
    exported(work_dir, tokenizer, "base/base_checkpoints/d4-2", "b")
    for other in (1, 2):
        if other == 1:  # of other merges
            write_pickle(
                work_dir / "base" / "tokenizer" / "tokenizer.pkl",
                Tokenizer.train(documents(300, seed=5), 320),
            )
        else:
            (work_dir / "base" / "tokenizer" / "tokenizer.pkl").unlink()
        with pytest.raises(UserError, match="/base/tokenizer does not hold the run's tokenizer"):
            exported(work_dir, tokenizer, "base/base_checkpoints/d5", f"c{other}")
    folders = sorted(path.name for path in (work_dir / "base" / "base_checkpoints").iterdir())
    assert folders == ["d4", "d4-2"]


def test_a_run_without_a_tokenizer(work_dir, capsys):
    exported(work_dir, None, "base/base_checkpoints/d4")
    assert "none, as the run has none" in capsys.readouterr().out
    assert not (work_dir / "base" / "tokenizer").exists()


def without(mapping, *names):
    return {name: value for name, value in mapping.items() if name not in names}


def test_older_checkpoints_mean_what_nanochat_takes_them_for(work_dir, capsys):
    tensors = tensors_of(False)
    write(work_dir / "old", without(tensors, "resid_lambdas", "x0_lambdas"), SIZES)
    ones = {**tensors, "resid_lambdas": torch.ones(2), "x0_lambdas": torch.zeros(2)}
    write(work_dir / "new", ones, SIZES)
    old, new = (imported(work_dir / name, name)[0] for name in ("old", "new"))
    tokens = torch.randint(320, (1, 200), generator=torch.Generator().manual_seed(1))
    assert torch.equal(old(tokens), new(tokens))
    out = capsys.readouterr().out
    assert "model: resid_lambdas 1, x0_lambdas 0, as nanochat" in out and out.count("model:") == 1

    write(work_dir / "windows", tensors, without(SIZES, "window_pattern"))
    model, meta = imported(work_dir / "windows", "windows")
    assert model.config.windows == [256, 256] and meta["model_config"]["window_pattern"] == "L"
    assert "window_pattern L" in capsys.readouterr().out
    write(work_dir / "small", tensors, {**SIZES, "window_pattern": "sl"})
    model, _ = imported(work_dir / "small", "small")
    assert model.config.windows == [128, 256] and model.config.window_pattern == "SL"


PARTS = ("smear_gate.weight", "smear_lambda", "backout_lambda", "lm_head.weight",
         "transformer.h.1.attn.ve_gate.weight", "value_embeds.1.weight", "bigram_lambdas",
         "bigram_embed.weight")  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_other_parts_are_not_made_up(work_dir, part):
    """Lambdas are filled in only where all else is there."""
    write(work_dir / "d2", without(tensors_of(True), "x0_lambdas", part), SIZES | BIGRAM)
    with pytest.raises(UserError, match=f"lacks {part}: it is not whole, or of a nanochat whose"):
        imported(work_dir / "d2")
    assert not run_dir("x").exists()


def test_bigram_tables_of_other_sizes_are_refused(work_dir):
    for fields, words in (
        (BIGRAM | {"bigram_embed_factor": 2}, r"bigram_embed.weight is \(960, 64\)"),
        ({}, "bigram_embed.weight is .*, the model's is missing"),
        ({"bigram_embed_factor": -1}, "bigram_embed_factor"),
        ({"bigram_embed_factor": 1.5}, "bigram_embed_factor"),
        ({"bigram_embed_factor": 10**9}, "claims"),
        (BIGRAM | {"bigram_lambda_init": float("nan")}, "bigram_lambda_init"),
        (BIGRAM | {"bigram_lambda_init": "x"}, "bigram_lambda_init"),
    ):
        write(work_dir / "d2", tensors_of(True), SIZES | fields)
        with pytest.raises(UserError, match=words) as error:
            imported(work_dir / "d2")
        assert "\n" not in str(error.value) and not run_dir("x").exists()


def test_vocabularies_whose_hash_overflows_are_refused_both_ways(work_dir):
    def int32(vocab):
        return torch.tensor(vocab - 1, dtype=torch.int32) * 36313

    most = nanochat.MAX_HASHED
    assert int32(most) == 36313 * (most - 1) and int32(most + 1) < 0
    write(work_dir / "d2", tensors_of(True), {**SIZES, **BIGRAM, "vocab_size": most + 1})
    with pytest.raises(UserError, match="overflows from 59,140 tokens on, and .* has 59,140"):
        imported(work_dir / "d2")
    fields = {**SIZES, "vocab_size": most + 1}
    with pytest.raises(UserError, match="overflows"):
        nanochat.to_nanochat(work_dir / "out", GPTConfig(**fields, **BIGRAM), 1, None, {})
    nanochat.check_hash(GPTConfig(**fields, bigram_embed_factor=0), "dense")
    nanochat.check_hash(GPTConfig(**{**fields, "vocab_size": most}, **BIGRAM), "the largest")
    assert not (work_dir / "out").exists()
