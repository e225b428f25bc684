import json
import os
import re
import shutil

import pytest
import torch

from nanofuse.train.checkpoint import (
    load_model,
    load_tensors,
    load_tokenizer,
    load_weights,
    save_checkpoint,
)
from nanofuse.train.data.tokenizer import Tokenizer
from nanofuse.train.errors import UserError
from nanofuse.train.run_folder import (
    META,
    MODEL,
    amend_meta,
    checkpoints,
    find_checkpoint,
    is_complete,
    load_meta,
    prune,
    run_dir,
)
from tests.helpers import documents, random_model, small_config


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


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x" * 201, "é" * 101])
def test_run_names_are_folder_names(name):
    with pytest.raises(UserError, match="--run"):
        run_dir(name)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_a_checkpoint_cut_short_is_named(saved, keep):
    _, folder = saved
    content = (folder / MODEL).read_bytes()
    (folder / MODEL).write_bytes(content[: int(keep * len(content)) if 0 < keep < 1 else keep])
    with pytest.raises(UserError, match=r"model\.safetensors is missing or cut short; no checkp"):
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


def test_the_newest_is_the_largest_number_of_the_complete_ones(saved):
    _, folder = saved
    run = folder.parent
    for name in ("step_000002.bak", "step_9", "step_0000009", "step_999999", "step_1000000"):
        shutil.copytree(folder, run / name)
    (run / "step_notes.txt").write_text("mine")
    (run / "step_2000000").mkdir()  # without files
    shutil.copytree(folder, run / "step_1500000", ignore=lambda *_: [MODEL])
    assert list(checkpoints(run)) == [5, 999999, 1000000]
    assert find_checkpoint(run).name == "step_1000000"
    with pytest.raises(UserError, match="there are: 5, 999999, 1000000"):
        find_checkpoint(run, 2)


def test_a_later_checkpoint_that_is_not_complete_is_said(saved, capsys):
    _, folder = saved
    later = shutil.copytree(folder, folder.parent / "step_000009")
    (later / MODEL).unlink()
    said = f"{later} has no {MODEL} and is passed over; put it back, or delete the rest"
    assert find_checkpoint(folder.parent) == folder
    assert capsys.readouterr().err == f"run: {said}\n"
    assert find_checkpoint(folder.parent, 5) == find_checkpoint(folder.parent, tell=False) == folder
    assert capsys.readouterr().err == ""
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=re.escape(f"no checkpoint in {folder.parent}; {said}")):
        find_checkpoint(folder.parent)


@pytest.mark.parametrize("kind", ["folder", "link", "dangling"])
def test_what_is_no_checkpoint_is_moved_aside_for_one(saved, capsys, tmp_path, kind):
    model, folder = saved
    place, meta = folder.parent / "step_000009", {"model_config": {}}
    if kind == "folder":
        shutil.copytree(folder, place)
        (place / MODEL).unlink()
    else:
        (tmp_path / "disk").mkdir()
        place.symlink_to(tmp_path / ("disk" if kind == "link" else "none"))
    assert save_checkpoint(folder.parent, 9, meta, model) == place
    aside = place.with_name("step_000009.aside")
    assert capsys.readouterr().out == f"run: {place} is not complete; it is {aside} now\n"
    assert aside.is_symlink() == (kind != "folder") and (
        kind != "folder" or (aside / META).exists()
    )
    assert list(checkpoints(folder.parent)) == [5, 9]
    (place / META).unlink()
    save_checkpoint(folder.parent, 9, meta, model)
    assert place.with_name("step_000009.aside-2").is_dir()


def test_a_link_to_a_checkpoint_is_replaced_and_its_target_stays(saved, tmp_path):
    model, folder = saved
    moved = shutil.move(folder, tmp_path / "disk")
    folder.symlink_to(moved)
    save_checkpoint(folder.parent, 5, {"model_config": {}}, model)
    assert not folder.is_symlink() and is_complete(folder) and is_complete(moved)
    assert {path.name for path in folder.parent.iterdir()} == {"tokenizer.json", folder.name}


@pytest.mark.parametrize("name", [MODEL, META])
def test_a_file_that_may_be_whole_is_not_called_damaged(saved, name, monkeypatch):
    """As where the user has no right to it, or a disk fails."""
    _, folder = saved
    real = open

    def refusing(path, *args, **kwargs):
        if str(path) == str(folder / name):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refusing)
    monkeypatch.setattr("io.open", refusing)
    with pytest.raises(UserError) as error:
        load_meta(folder)
        load_tensors(folder / name)
    assert str(error.value) == f"{folder / name} cannot be read (Permission denied)"


def test_a_folder_that_cannot_be_read_is_not_called_empty(saved, monkeypatch):
    _, folder = saved

    def refusing(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.listdir", refusing)
    with pytest.raises(UserError, match="^runs/a cannot be read .Permission denied.$"):
        find_checkpoint(folder.parent)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_flipped_bit_is_found(saved, share):
    _, folder = saved
    raw = bytearray((folder / MODEL).read_bytes())
    raw[int(share * len(raw))] ^= 1
    (folder / MODEL).write_bytes(raw)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged, or of another checkpoint"):
        load_model(folder, "cpu", torch.float32)


def test_weights_of_another_step_are_refused(saved):
    model, folder = saved
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    meta = {"model_config": model.config.to_dict()}
    later = save_checkpoint(folder.parent, 6, meta, model)
    shutil.copy(folder / MODEL, later / MODEL)
    with pytest.raises(UserError, match="of another checkpoint"):
        load_model(later, "cpu", torch.float32)


def test_another_tokenizer_of_the_same_size_is_refused(saved, tokenizer):
    model, folder = saved
    config, meta = model.config, {"tokenizer": tokenizer.fingerprint}
    assert load_tokenizer(folder.parent, config, meta).fingerprint == tokenizer.fingerprint
    other = Tokenizer.train([text[::-1] for text in documents(200, seed=5)], 320)
    assert other.vocab_size == 320
    other.save(folder.parent / "tokenizer.json")
    load_tokenizer(folder.parent, config)
    with pytest.raises(UserError, match="is another tokenizer than the checkpoint's"):
        load_tokenizer(folder.parent, config, meta)


def test_the_last_and_the_best_are_kept(saved):
    model, folder = saved
    run, meta = folder.parent, {"model_config": model.config.to_dict()}
    shutil.rmtree(folder)
    for step, bpb in enumerate((None, 2.0, 1.5, None, 1.7, 1.6, None), 1):
        save_checkpoint(run, step, {**meta, "val_bpb": bpb}, model)
    shutil.copytree(run / "step_000001", run / "step_000001.bak")
    prune(run, 7)
    assert list(checkpoints(run)) == [1, 2, 3, 4, 5, 6, 7]
    assert [f.name for f in prune(run, 2)] == [f"step_{n:06d}" for n in (1, 2, 4, 5)]
    assert list(checkpoints(run)) == [3, 6, 7] and (run / "step_000001.bak").exists()
    amend_meta(run / "step_000007", {"val_bpb": 1.4})
    shutil.copytree(run / "step_000003", run / "step_000099")  # somebody's, of no step of the run
    prune(run, 1, newest=7)
    assert list(checkpoints(run)) == [7, 99] and load_meta(run / "step_000007")["val_bpb"] == 1.4
    with pytest.raises(UserError, match=r"step_000099 is of step 3, as its meta\.json says"):
        load_meta(run / "step_000099")


def test_files_have_the_mode_of_the_umask(saved):
    model, folder = saved
    before = os.umask(0o027)
    try:
        folder = save_checkpoint(folder.parent, 6, {"model_config": model.config.to_dict()}, model)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes == {META: 0o640, MODEL: 0o640} and folder.stat().st_mode & 0o777 == 0o750
