"""Flags of train.generate, and runs that it cannot read."""

import io
import json
from contextlib import redirect_stderr

import pytest
import torch

from nanofuse.train import convert
from nanofuse.train.checkpoint import save_checkpoint
from nanofuse.train.command import run_command
from nanofuse.train.generate import MAX_SAMPLES, main, parse
from nanofuse.train.run_folder import run_dir
from tests.helpers import random_model, small_config


@pytest.fixture
def run(work_dir, tokenizer):
    """Calls the command on a run of one checkpoint: exit code and what it said on stderr."""
    model = random_model(small_config(), torch.float32)
    facts = {"model_config": model.config.to_dict()}
    save_checkpoint(run_dir("a"), 5, facts, model)
    tokenizer.save(run_dir("a") / "tokenizer.json")

    def call(*flags):
        err = io.StringIO()
        argv = ["--run", "a", "--max-tokens", "3", "--device-type", "cpu", *map(str, flags)]
        with redirect_stderr(err):
            try:
                run_command(lambda: main(argv))
            except SystemExit as stop:
                return stop.code, err.getvalue()
        return 0, err.getvalue()

    return call


def test_defaults():
    assert vars(parse(["--run", "a"])) == {
        "run": "a", "step": None, "prompt": "", "num_samples": 1, "max_tokens": 128,
        "temperature": 0.8, "top_k": 50, "seed": 0, "device_type": "auto",
    }  # fmt: skip
    least = ["--num-samples=1", "--max-tokens=1", "--temperature=0", "--top-k=0", "--seed=0"]
    assert vars(parse(["--run", "a", *least]))["num_samples"] == 1


REFUSED = {
    "--temperature": ("nan", "inf", "-1", "1e999", "", "warm"),
    "--num-samples": ("99999999999", 2**63, "0", "-1", "nan", "1e999", "", MAX_SAMPLES + 1),
    "--max-tokens": (2**63, 2**31, "0", "-1", "nan", "1e999", ""),
    "--top-k": (2**63, "-1", "nan", "1e999", ""),
    "--seed": (2**63, 2**64, "-1", "nan", "1e999", ""),
    "--step": ("garbage", "-1", 2**63, "nan", "", "6", "5.0", "0x5"),
    "--device-type": ("tpu", ""),
    "--run": ("", "..", "b", "a/b"),
}


@pytest.mark.parametrize("flag", REFUSED)
def test_values_that_cannot_be_are_one_line(run, flag):
    for value in REFUSED[flag]:
        code, err = run(f"{flag}={value}")
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, (value, err)
        if flag not in ("--run", "--step"):
            assert flag in err


@pytest.mark.parametrize(
    "flags",
    [
        ("--temperature", "1e-40"),
        ("--temperature", "5e-324"),
        ("--temperature", "1e6"),
        ("--seed", 2**63 - 1),
        ("--top-k", 2**31),
        ("--num-samples", 40),
    ],
    ids=str,
)
def test_values_at_the_bounds_generate(run, flags):
    code, err = run(*flags)
    assert code == 0 and "error" not in err


def test_samples_beyond_the_memory_are_refused(run, monkeypatch):
    monkeypatch.setattr("nanofuse.train.memory.memory_of", lambda device: 10**7)
    monkeypatch.setattr("nanofuse.train.checkpoint.GPT", None)  # nothing is made
    code, err = run("--num-samples", MAX_SAMPLES)
    assert code == 2 and "--num-samples or --max-tokens" in err and "GiB" in err


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_weights_that_are_no_numbers_are_said(run, temperature):
    model = random_model(small_config(), torch.float32)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    save_checkpoint(run_dir("a"), 6, {"model_config": model.config.to_dict()}, model)
    code, err = run("--temperature", temperature)
    assert code == 2 and "not finite" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_layer", 10**6),
        ("n_layer", 4096),
        ("n_embd", 2**40),
        ("sequence_len", 2**40),
        ("vocab_size", 2**20),
        ("bigram_embed_factor", 10**9),
        ("bigram_lambda_init", None),
        ("window_pattern", "X"),
    ],
)
def test_a_meta_of_other_sizes_allocates_nothing(run, monkeypatch, name, value):
    monkeypatch.setattr("nanofuse.train.checkpoint.GPT", None)
    path = run_dir("a") / "step_000005" / "meta.json"
    meta = json.loads(path.read_text())
    meta["model_config"][name] = value
    path.write_text(json.dumps(meta))
    code, err = run()
    assert code == 2 and "step_000005" in err and err.count("\n") == 1


def test_rows_beyond_the_memory_are_refused(run, monkeypatch):
    """No tensor of a checkpoint shows the length of a row, but a table is as long."""
    monkeypatch.setattr("nanofuse.train.memory.memory_of", lambda device: 2**30)
    monkeypatch.setattr("nanofuse.train.checkpoint.GPT", None)
    path = run_dir("a") / "step_000005" / "meta.json"
    meta = json.loads(path.read_text())
    meta["model_config"]["sequence_len"] = 2**24
    path.write_text(json.dumps(meta))
    code, err = run()
    assert code == 2 and "GiB" in err


def test_names_with_line_breaks_stay_one_line(run, tmp_path):
    for call, argv in (
        (convert.main, ["from-nanochat", "no\nwhere", "--run", "z"]),
        (main, ["--run", "a", "--un\nknown", "x\ny"]),
        (main, ["--run", "a\nb"]),
    ):
        err = io.StringIO()
        with redirect_stderr(err), pytest.raises(SystemExit, match="2"):
            run_command(lambda call=call, argv=argv: call(argv))
        assert err.getvalue().count("\n") == 1


@pytest.mark.parametrize(
    "allocate",
    [lambda: bytearray(2**62), lambda: torch.empty(2**60), lambda: torch.zeros(2**40, 2**20)],
    ids=["python", "torch", "zeros"],
)
def test_memory_that_is_not_there_is_one_line(allocate):
    err = io.StringIO()
    with redirect_stderr(err), pytest.raises(SystemExit, match="2"):
        run_command(allocate)
    assert err.getvalue().startswith("error: out of memory") and err.getvalue().count("\n") == 1
    with pytest.raises(RuntimeError, match="another"):
        run_command(lambda: (_ for _ in ()).throw(RuntimeError("another")))
