"""train.export: what it takes for a run, and what it writes."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanofuse.train import convert
from nanofuse.train.checkpoint import load_tensors, save_checkpoint
from nanofuse.train.errors import UserError
from nanofuse.train.export import main
from nanofuse.train.run_folder import MODEL, find_run, run_dir
from tests.helpers import random_model, small_config
from tests.test_layers import imports
from tests.train.hub import needs_transformers


@pytest.fixture
def run(work_dir, tokenizer):
    """runs/a with steps 5 and 6, tables in bf16 as on a GPU."""
    for step in (5, 6):
        model = random_model(small_config(), torch.bfloat16, seed=step)
        facts = {"model_config": model.config.to_dict(), "tokenizer": tokenizer.fingerprint}
        folder = save_checkpoint(run_dir("a"), step, facts, model)
    tokenizer.save(run_dir("a") / "tokenizer.json")
    return folder


def test_a_run_is_a_name_a_folder_or_a_checkpoint(run):
    directory = run.parent
    assert find_run("a") == find_run(str(directory)) == find_run(str(run)) == (directory, run)
    early = directory / "step_000005"
    assert find_run("a", 5) == find_run(str(early)) == find_run(str(early), 5) == (directory, early)
    os.unlink(run / MODEL)
    assert find_run("a") == (directory, early)
    Path("a").mkdir()  # a folder here has the run's name
    assert find_run("a") == (directory, early)
    for given, step, message in (
        ("b", None, "runs that have a checkpoint: a"),
        ("a", 7, "no checkpoint of step 7"),
        (str(early), 6, "is step 5; drop --step"),
        (str(run), None, "no checkpoint in"),
    ):
        with pytest.raises(UserError, match=message):
            find_run(given, step)


@needs_transformers
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hf_writes_weights_config_code_and_tokenizer(run, dtype, capsys):
    main(["hf", "a", "out", "--dtype", dtype])
    said = capsys.readouterr().out
    modes = {path.stat().st_mode for path in Path("out").iterdir()}
    assert len(modes) == 1, "who may read config.json may read the weights"
    assert f"out: step 6 for transformers, {dtype}; load it with trust_remote_code=True\n" in said
    assert "tokenizer: out" in said
    assert sorted(os.listdir("out")) == [
        "config.json", "generation_config.json", "model.safetensors", "modeling_nanofuse.py",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    written, held = load_file("out/model.safetensors"), load_tensors(run / MODEL)
    assert written.keys() == held.keys()
    for name, tensor in written.items():
        exact = name in ("resid_lambdas", "x0_lambdas", "bigram_lambdas")
        assert tensor.dtype == (torch.float32 if exact else getattr(torch, dtype))
        assert torch.equal(tensor, held[name].to(tensor.dtype))
    config = json.loads(open("out/config.json").read())
    assert config["dtype"] == dtype and config["bos_token_id"] == 311
    found = set(imports(Path("out/modeling_nanofuse.py")))
    assert {name.partition(".")[0] for name in found} == {"dataclasses", "torch", "transformers"}


@needs_transformers
def test_a_run_without_a_tokenizer_has_its_weights_exported(run, capsys):
    os.unlink(run.parent / "tokenizer.json")
    main(["hf", str(run), "out"])
    assert "tokenizer: none" in capsys.readouterr().out
    assert "tokenizer.json" not in os.listdir("out")
    assert json.loads(open("out/config.json").read()).get("bos_token_id") is None


def test_nanochat_is_what_convert_writes(run):
    main(["nanochat", "a", "ours", "--step", "5"])
    convert.main(["to-nanochat", "older", "--run", "a", "--step", "5"])
    new, old = (torch.load(f"{d}/model_000005.pt", weights_only=True) for d in ("ours", "older"))
    assert new.keys() == old.keys() and all(torch.equal(new[k], old[k]) for k in new)


@pytest.mark.parametrize("kind", ["hf", "nanochat"])
def test_a_folder_that_is_there_stays(run, kind):
    os.mkdir("out")
    with pytest.raises(UserError, match="out exists"):
        main([kind, "a", "out"])
    assert os.listdir("out") == []


@pytest.mark.parametrize("kind", [pytest.param("hf", marks=needs_transformers), "nanochat"])
def test_a_disk_that_is_full_is_one_line_and_nothing_stays(run, kind, monkeypatch):
    there = set(Path().rglob("*"))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="^out .* the disk is full"):
        patch.setattr("nanofuse.train.disk.free_bytes", lambda path: 1000)
        main([kind, "a", "out"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))  # on the way, as others write
    try:
        with pytest.raises(UserError, match="^out cannot be saved: File too large; it takes"):
            main([kind, "a", "out"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert set(Path().rglob("*")) == there


def test_without_transformers_one_line_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "nanofuse.train.modeling_nanofuse", raising=False)
    with pytest.raises(UserError, match=r"needs transformers 5 .*pip install 'nanofuse\[hf\]'"):
        main(["hf", "a", "out"])
    assert not os.path.exists("out")


def test_help_loads_no_torch():
    code = (
        "import sys; from nanofuse.train import export\n"
        "try: export.main(['hf', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
