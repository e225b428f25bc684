import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nanofuse.train.checkpoint import load_model
from nanofuse.train.convert import main
from nanofuse.train.errors import UserError
from nanofuse.train.run import main as run_main
from nanofuse.train.run_folder import find_checkpoint, run_dir
from tests.model.reference import reference_logits

CONFIG = {
    "sequence_len": 256,
    "vocab_size": 500,  # padded to 512
    "n_layer": 4,
    "n_head": 2,
    "n_kv_head": 1,
    "n_embd": 64,
    "window_pattern": "SSSL",
}


def nanochat_tensors():
    """A dense nanochat state dict, keys and shapes written out from its published layout."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=torch.float32):
        return (0.2 * torch.randn(shape, generator=generator)).to(dtype)

    c, kv, vocab = 64, 32, 512
    tensors = {
        "transformer.wte.weight": draw(vocab, c, dtype=torch.bfloat16),
        "lm_head.weight": draw(vocab, c),
        "resid_lambdas": 1 + draw(4),
        "x0_lambdas": draw(4),
        "smear_gate.weight": draw(1, 24),
        "smear_lambda": draw(1),
        "backout_lambda": draw(1),
    }
    for i in range(4):
        block = f"transformer.h.{i}"
        tensors[f"{block}.attn.c_q.weight"] = draw(c, c)
        tensors[f"{block}.attn.c_k.weight"] = draw(kv, c)
        tensors[f"{block}.attn.c_v.weight"] = draw(kv, c)
        tensors[f"{block}.attn.c_proj.weight"] = draw(c, c)
        tensors[f"{block}.mlp.c_fc.weight"] = draw(4 * c, c)
        tensors[f"{block}.mlp.c_proj.weight"] = draw(c, 4 * c)
        if i % 2 == 1:
            tensors[f"{block}.attn.ve_gate.weight"] = draw(1, 12)
            tensors[f"value_embeds.{i}.weight"] = draw(vocab, kv, dtype=torch.bfloat16)
    return tensors


@pytest.fixture
def nanochat_dir(work_dir):
    directory = work_dir / "d4"
    directory.mkdir()
    torch.save(nanochat_tensors(), directory / "model_000500.pt")
    meta = {"step": 500, "val_bpb": 0.9, "model_config": CONFIG, "user_config": {"depth": 4}}
    (directory / "meta_000500.json").write_text(json.dumps(meta))
    return directory


def test_logits_equal_the_formulas_to_1e_5_in_fp32(nanochat_dir, capsys):
    main(["from-nanochat", str(nanochat_dir), "--run", "imported"])
    out = capsys.readouterr().out
    assert "step 500" in out and "\ntokenizer: none found; train.generate needs one" in out
    model, meta = load_model(find_checkpoint(run_dir("imported")), "cpu", torch.float32)
    assert meta["val_bpb"] == 0.9 and model.config.bigram_embed_factor == 0
    tokens = torch.randint(500, (1, 140), generator=torch.Generator().manual_seed(1))
    tensors = {name: t.double() for name, t in nanochat_tensors().items()}
    expected = reference_logits(tensors, CONFIG, tokens[0].tolist())
    difference = np.abs(model(tokens)[0].detach().numpy() - expected).max()
    print(f"largest difference {difference:.2e} of logits up to {np.abs(expected).max():.2f}")
    assert difference <= 1e-5 * max(1, np.abs(expected).max())


def test_there_and_back(nanochat_dir, work_dir):
    main(["from-nanochat", str(nanochat_dir), "--run", "imported"])
    main(["to-nanochat", str(work_dir / "out"), "--run", "imported"])
    back = torch.load(work_dir / "out" / "model_000500.pt", weights_only=True)
    original = nanochat_tensors()
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], original[name].float()) for name in original)
    meta = json.loads((work_dir / "out" / "meta_000500.json").read_text())
    assert meta["model_config"] == CONFIG and meta["step"] == 500


def test_compiled_checkpoints_and_named_steps(nanochat_dir):
    tensors = {f"_orig_mod.{name}": t for name, t in nanochat_tensors().items()}
    torch.save(tensors, nanochat_dir / "model_000200.pt")
    (nanochat_dir / "meta_000200.json").write_text((nanochat_dir / "meta_000500.json").read_text())
    main(["from-nanochat", str(nanochat_dir), "--run", "early", "--step", "200"])
    assert find_checkpoint(run_dir("early")).name == "step_000200"
    main(["from-nanochat", str(nanochat_dir), "--run", "both"])
    (run_dir("early") / "step_000200").rename(run_dir("both") / "step_000200")
    for flags, step in (([], 500), (["--step", "200"], 200)):
        out = nanochat_dir / f"out{step}"
        main(["to-nanochat", str(out), "--run", "both", *flags])
        assert (out / f"model_{step:06d}.pt").exists()


def test_the_architecture_must_fit(nanochat_dir):
    tensors = nanochat_tensors()
    del tensors["smear_lambda"]
    torch.save(tensors, nanochat_dir / "model_000500.pt")
    with pytest.raises(UserError, match=r"model_000500\.pt lacks smear_lambda: it is not whole"):
        main(["from-nanochat", str(nanochat_dir), "--run", "x"])
    assert not run_dir("x").exists()


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("damage", ["cut", "pickle", "no meta", "no config", "empty"])
def test_damaged_checkpoints_are_named_and_nothing_is_made(nanochat_dir, damage, capsys):
    weights, meta = nanochat_dir / "model_000500.pt", nanochat_dir / "meta_000500.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "pickle":
        torch.save({"a": Payload()}, weights)
    elif damage == "no meta":
        meta.unlink()
    elif damage == "no config":
        meta.write_text("{}")
    else:
        weights.unlink()
    with pytest.raises(UserError, match=r"model_(000500|NNNNNN)\.pt|meta_000500\.json"):
        main(["from-nanochat", str(nanochat_dir), "--run", "x"])
    assert not run_dir("x").exists() and "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    [
        [1, 2, 3],
        torch.zeros(3),
        None,
        7,
        {"model": {"a": torch.zeros(2)}, "step": 7},
        {1: torch.zeros(2)},
        {"a": "text"},
        {},
        {"a": torch.zeros(3).to_sparse()},
        {"a": torch.zeros(3, device="meta")},
        {"lm_head.weight": torch.zeros(1, 1).expand(2**20, 2**20)},
    ],
    ids=str,
)
def test_files_of_something_else_are_named(nanochat_dir, content):
    torch.save(content, nanochat_dir / "model_000500.pt")
    with pytest.raises(UserError, match=r"model_000500\.pt") as error:
        main(["from-nanochat", str(nanochat_dir), "--run", "x"])
    assert "\n" not in str(error.value) and not run_dir("x").exists()


def test_a_module_is_not_run(nanochat_dir):
    torch.save(torch.nn.Linear(2, 2), nanochat_dir / "model_000500.pt")
    with pytest.raises(UserError, match=r"model_000500\.pt .* more than tensors"):
        main(["from-nanochat", str(nanochat_dir), "--run", "x"])


def test_files_of_before_the_zip_format(nanochat_dir):
    path = nanochat_dir / "model_000500.pt"
    torch.save(nanochat_tensors(), path, _use_new_zipfile_serialization=False)
    main(["from-nanochat", str(nanochat_dir), "--run", "x"])


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_tensors_that_are_no_weights_are_named(nanochat_dir, dtype):
    """Today's code took them for weights by .float()."""
    tensors = nanochat_tensors()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(dtype)
    torch.save(tensors, nanochat_dir / "model_000500.pt")
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(UserError, match=rf"lm_head\.weight is {name}"):
        main(["from-nanochat", str(nanochat_dir), "--run", "x"])
    assert not run_dir("x").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_real_numbers_are_weights(nanochat_dir, dtype):
    tensors = {name: t.to(dtype) for name, t in nanochat_tensors().items()}
    torch.save(tensors, nanochat_dir / "model_000500.pt")
    main(["from-nanochat", str(nanochat_dir), "--run", "x"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_no_numbers_are_refused(nanochat_dir, value):
    """1e300 is finite in fp64, and infinite in the fp32 of a run."""
    tensors = nanochat_tensors()
    tensors["resid_lambdas"] = tensors["resid_lambdas"].double()
    tensors["resid_lambdas"][2] = value
    torch.save(tensors, nanochat_dir / "model_000500.pt")
    with pytest.raises(UserError, match="resid_lambdas has values that are no finite numbers"):
        main(["from-nanochat", str(nanochat_dir), "--run", "x"])
    assert not run_dir("x").exists()


def config_with(directory, **fields):
    meta = {"step": 500, "model_config": {**CONFIG, **fields}}
    (directory / "meta_000500.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("name", "value"),
    [("rope_base", 500000), ("softcap", 30.0), ("mlp_type", "swiglu"), ("bias", True), ("x", None)],
)
def test_fields_of_another_architecture_are_named(nanochat_dir, name, value):
    config_with(nanochat_dir, **{name: value})
    with pytest.raises(UserError, match=rf"model_config has {name}"):
        main(["from-nanochat", str(nanochat_dir), "--run", "x"])
    assert not run_dir("x").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("rope_base", 100000), ("rope_theta", 100000.0), ("softcap", 15), ("dropout", 0.0)],
)
def test_fields_that_say_what_this_model_does_pass(nanochat_dir, name, value):
    config_with(nanochat_dir, **{name: value})
    main(["from-nanochat", str(nanochat_dir), "--run", "x"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_layer", 10**6),
        ("n_layer", 4096),
        ("n_embd", 2**24),
        ("n_embd", 2**40),
        ("vocab_size", 2**20),
        ("sequence_len", 2**40),
        ("n_layer", -1),
        ("n_layer", 4.0),
        ("n_layer", "4"),
        ("n_layer", True),
        ("n_layer", None),
        ("n_layer", []),
        ("n_layer", float("nan")),
        ("n_head", 0),
        ("n_head", 7),
        ("window_pattern", ""),
        ("window_pattern", "SX"),
    ],
)
def test_claimed_sizes_are_compared_before_anything_is_allocated(
    nanochat_dir, monkeypatch, name, value
):
    def allocated(*args):
        raise AssertionError("a model of the claimed size is made")

    monkeypatch.setattr("nanofuse.train.nanochat.GPT", allocated)
    config_with(nanochat_dir, **{name: value})
    with pytest.raises(UserError, match="000500") as error:
        main(["from-nanochat", str(nanochat_dir), "--run", "x"])
    assert "\n" not in str(error.value) and not run_dir("x").exists()


def test_rows_beyond_the_memory_are_refused(nanochat_dir, monkeypatch):
    """No tensor of the file shows the length of a row, but a table is as long."""
    monkeypatch.setattr("nanofuse.train.memory.memory_of", lambda device: 2**30)
    config_with(nanochat_dir, sequence_len=2**24)
    with pytest.raises(UserError, match="GiB"):
        main(["from-nanochat", str(nanochat_dir), "--run", "x"])


def test_flags_are_parsed_without_torch():
    root = Path(__file__).parents[2]
    for module in ("convert", "generate", "data.__main__"):
        code = f"import sys; from nanofuse.train.{module} import main\n"
        code += "try: main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
        done = subprocess.run(
            [sys.executable, "-OO", "-c", code], cwd=root, capture_output=True, text=True
        )
        assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_existing_targets_are_kept(nanochat_dir, work_dir):
    main(["from-nanochat", str(nanochat_dir), "--run", "x"])
    with pytest.raises(UserError, match="exists; choose another --run"):
        main(["from-nanochat", str(nanochat_dir), "--run", "x"])
    with pytest.raises(UserError, match="exists; name a folder to be made"):
        main(["to-nanochat", str(nanochat_dir), "--run", "x"])


def test_a_tokenizer_travels_if_it_fits(nanochat_dir, data_dir):
    path = data_dir / "tokenizer.json"
    with pytest.raises(UserError, match="--tokenizer .* has 320 tokens, the model 500"):
        main(["from-nanochat", str(nanochat_dir), "--run", "x", "--tokenizer", str(path)])
    assert not run_dir("x").exists()


def test_a_command_is_required(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2 and "{from-nanochat,to-nanochat}" in capsys.readouterr().err


def test_a_converted_run_does_not_resume(nanochat_dir, data_dir):
    main(["from-nanochat", str(nanochat_dir), "--run", "x"])
    with pytest.raises(UserError, match="optimiser state"):
        run_main(["--run", "x", "--resume", "--data", str(data_dir)])


@pytest.mark.parametrize("flags", [["", "--run", "x"], ["x", "--run", "x", "--tokenizer", ""]])
def test_empty_values_are_refused(flags, capsys):
    """Which a variable of a shell that is not set gives."""
    with pytest.raises(SystemExit) as stop:
        main(["from-nanochat", *flags])
    assert stop.value.code == 2 and "is empty; give it a value" in capsys.readouterr().err
