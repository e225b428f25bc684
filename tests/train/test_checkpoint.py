import json

import pytest
import torch

from nanofuse.train.checkpoint import (
    MODEL,
    find_checkpoint,
    load_meta,
    load_model,
    load_tensors,
    load_tokenizer,
    load_weights,
    run_dir,
    save_checkpoint,
)
from nanofuse.train.errors import UserError
from tests.helpers import random_model, small_config


@pytest.fixture
def saved(work_dir, tokenizer):
    """A run of one checkpoint at step 5: its model and folder."""
    model = random_model(small_config(), torch.float32)
    directory = run_dir("a")
    folder = save_checkpoint(directory, 5, {"model_config": model.config.to_dict()}, model)
    tokenizer.save(directory / "tokenizer.json")
    return model, folder


def test_round_trip(saved):
    model, folder = saved
    again, meta = load_model(folder, "cpu", torch.float32)
    assert meta["step"] == 5 and again.config == model.config and not again.training
    tokens = torch.randint(320, (1, 30))
    assert torch.equal(again(tokens), model(tokens))


def test_latest_or_named_step(saved):
    model, folder = saved
    later = save_checkpoint(folder.parent, 1000, {"model_config": {}}, model)
    assert find_checkpoint(folder.parent) == later
    assert find_checkpoint(folder.parent, 5) == folder
    with pytest.raises(UserError, match="no checkpoint of step 7; there are: 5, 1000"):
        find_checkpoint(folder.parent, 7)
    with pytest.raises(UserError, match="no checkpoint in runs/b; runs that have one: a"):
        find_checkpoint(run_dir("b"))


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b"])
def test_run_names_are_folder_names(name):
    with pytest.raises(UserError, match="--run"):
        run_dir(name)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_a_checkpoint_cut_short_is_named(saved, keep):
    _, folder = saved
    content = (folder / MODEL).read_bytes()
    (folder / MODEL).write_bytes(content[: int(keep * len(content)) if 0 < keep < 1 else keep])
    with pytest.raises(UserError, match=r"model\.safetensors is missing or cut short; delete"):
        load_model(folder, "cpu", torch.float32)


@pytest.mark.parametrize("content", ["", "[]", '{"format": 99, "model_config": {}}', "{"])
def test_damaged_meta_is_named(saved, content):
    _, folder = saved
    (folder / "meta.json").write_text(content)
    with pytest.raises(UserError, match=r"meta\.json is missing, damaged"):
        load_meta(folder)


def test_unknown_config_fields_are_named(saved):
    _, folder = saved
    meta = json.loads((folder / "meta.json").read_text())
    meta["model_config"]["from_the_future"] = 1
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="from_the_future"):
        load_model(folder, "cpu", torch.float32)


@pytest.mark.parametrize("fields", [{"vocab_size": 640}, {"bigram_embed_factor": 0}])
def test_weights_of_another_shape_change_nothing(saved, fields):
    _, folder = saved
    other = random_model(small_config(**fields), torch.float32, seed=1)
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(UserError, match="the model's is"):
        load_weights(other, load_tensors(folder / MODEL), "source")
    assert all(torch.equal(before[name], t) for name, t in other.state_dict().items())


def test_tokenizer_of_another_vocabulary(saved):
    _, folder = saved
    with pytest.raises(UserError, match="has 320 tokens, the model 640"):
        load_tokenizer(folder.parent, small_config(vocab_size=640))


def test_bf16_tables_keep_their_dtype(work_dir):
    model = random_model(small_config(), torch.bfloat16)
    save_checkpoint(run_dir("c"), 1, {"model_config": model.config.to_dict()}, model)
    tensors = load_tensors(run_dir("c") / "step_000001" / MODEL)
    assert tensors["bigram_embed.weight"].dtype == torch.bfloat16
    assert tensors["lm_head.weight"].dtype == torch.float32
