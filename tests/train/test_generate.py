"""Flags of train.generate, and runs that it cannot read."""

import io
import json
from contextlib import redirect_stderr
from types import SimpleNamespace

import pytest
import torch

from nanofuse.model.fused import kernels_are_interpreted
from nanofuse.train import convert
from nanofuse.train.checkpoint import save_checkpoint
from nanofuse.train.command import run_command
from nanofuse.train.generate import MAX_SAMPLES, Writer, main, parse
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
        "run": "a", "step": None, "prompt": None, "num_samples": 1, "max_tokens": 128,
        "temperature": 0.8, "top_k": 50, "seed": 0, "device_type": "auto", "backend": "auto",
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
    "--backend": ("compile", ""),
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


def converse(answers, monkeypatch):
    """What the command prints in a terminal: input() gives the answers, or raises them."""
    given = iter(answers)

    def ask(prompt):
        assert prompt == "> "
        answer = next(given)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    main(["--run", "a", "--max-tokens", "3", "--device-type", "cpu"])
    assert next(given, None) is None


def test_a_terminal_is_asked_for_one_text_after_the_other(run, monkeypatch, capsys):
    converse(["the cat", " ", KeyboardInterrupt(), "the cat", "x" * 3000, " /quit "], monkeypatch)
    out, err = capsys.readouterr()
    first, blank, second, end = out.split("\n")
    assert first.startswith("the cat") and second.startswith("the cat")
    assert blank == end == "" and first != second  # another seed
    assert err.count("tokens/s (plain PyTorch)") == 2 and err.count("error: --prompt has") == 1
    converse([EOFError()], monkeypatch)
    assert capsys.readouterr().out == "\n"


def test_ctrl_c_stops_a_continuation_and_not_the_command(run, monkeypatch, capsys):
    columns = Writer.columns

    def interrupted(self, ids):
        for column in columns(self, ids):
            yield column
            raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "columns", interrupted)
    converse(["the cat", "rain", "/quit"], monkeypatch)
    out, err = capsys.readouterr()
    assert out.count("\n") == 2 and "\nrain" in out
    assert err.count("1 tokens: the first after") == 2


def test_no_prompt_without_a_terminal_is_the_empty_text(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert run("--seed", 3)[0] == 0
    plain = capsys.readouterr().out
    assert run("--seed", 3, "--prompt", "")[0] == 0 and capsys.readouterr().out == plain


def test_samples_are_those_of_one_alone(run, capsys):
    """The first of several draws what one alone does; several are printed in whole."""
    run("--prompt", "the cat")
    alone = capsys.readouterr().out
    code, err = run("--prompt", "the cat", "--num-samples", 2)
    assert code == 0 and "--- sample 1" in err and "6 tokens: the first after" in err
    assert capsys.readouterr().out.startswith(alone)


def test_the_kernels_write_the_same(run, capsys):
    """In the interpreter; on Hopper it is the default."""
    if not kernels_are_interpreted():
        pytest.skip("the kernels do not run on the CPU here")
    run("--prompt", "the cat")
    plain = capsys.readouterr().out
    code, err = run("--prompt", "the cat", "--backend", "fused")
    assert code == 0 and capsys.readouterr().out == plain and "(kernels)" in err


def test_a_prompt_that_is_too_long_is_to_be_shortened(run):
    """--max-tokens is no way out where the prompt alone takes all positions."""
    code, err = run("--prompt", "the cat " * 5000)
    assert code == 2 and err.endswith("; shorten it\n") and "room for 0 of" in err
