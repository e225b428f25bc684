"""docs/errors.md: what is given, and the line that is said; made by running the commands.

    python -m tests.errors

The test (tests/test_errors.py) runs the same and compares, so the file shows what the code says.
"""

import io
import json
import os
import re
import shutil
import sys
import tempfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from nanofuse.model.config import NANOCHAT_FIELDS, GPTConfig
from nanofuse.train import (
    convert,
    doctor,
    evaluate,
    export,
    generate,
    plot,
    run,
    runs,
    sweep,
    warm,
)
from nanofuse.train.command import run_command
from nanofuse.train.data import __main__ as data
from nanofuse.train.data.pickled import pickled
from nanofuse.train.data.tokenizer import Tokenizer
from tests.helpers import documents, random_model

PAGE = Path(__file__).parents[1] / "docs" / "errors.md"
HEAD = """# Errors

What is given, and the line that is said. Bad input ends with one line `error: …` on stderr and exit
code 2; nothing is left behind. The messages are those of the code: `python -m tests.errors` makes
this page by running the commands on small inputs (a machine of 16 GiB is assumed), and a test
compares it.
"""
MEMORY = 16 * 2**30
TINY = (
    "--depth 1 --aspect-ratio 32 --head-dim 16 --max-seq-len 32 --device-batch-size 1 "
    "--total-batch-size 32 --eval-tokens 32 --eval-every -1 --skip-initial-eval --sample-every -1 "
    "--device-type cpu --data data"
).split()
SAMPLE = "--run a --max-tokens 2 --device-type cpu".split()
BIG = 2**63

RUN_FLAGS = (
    "--depth 0", "--depth four", f"--depth {BIG}", "--dept 4", "--depth=", "--depth 200",
    "--aspect-ratio 8", "--head-dim 15", "--n-kv-head 3", "--window-pattern SX", "--vocab-size 10",
    "--bigram-embed-factor 1000000", "--bigram-lambda-init 0", "--bigram-lambda-init 1e308",
    "--bigram-embedding-lr-mult 0", "--num-iterations 0", f"--num-iterations {BIG}",
    "--num-iterations 3 --target-flops 1e9", "--target-flops 0", "--target-flops 1",
    "--target-param-data-ratio 0", "--device-batch-size 0", "--total-batch-size 100",
    "--device-batch-size 3", "--eval-tokens 10", "--matrix-lr nan", "--matrix-lr -1",
    "--matrix-lr inf", "--warmdown-ratio 2", "--seed -1", f"--seed {BIG}", "--train-log-every 0",
    "--backend warp", "--attention fa9", "--fp8 torch",
    "--fp8-gradients e3m4", "--fp8-gradients e4m3",
    "--compile-mode max-autotune", "--kernel-cache a.zip", "--device-type tpu", "--run a",
    "--run a/b", "--data nowhere", "--data=", "--text-column body",
    "--val-shard none.parquet", "--core-every 5", "--core-every 5 --core-bundle nowhere",
    "--batch-size 4", "--data data/tokenizer.json", "--cache data/tokenizer.json",
    "--wandb maybe", "--wandb", "--trackio", "--tensorboard", "--gpus 0", "--gpus many",
)  # fmt: skip
RESUME_FLAGS = (
    "--run a --resume --depth 2", "--run a --resume --seed 7", "--run a --resume --vocab-size 400",
    "--run a --resume --total-batch-size 64", "--run a --resume --num-iterations 1",
    "--run a --resume --data other", "--run b --resume", "--resume", "--run finished --resume",
    "--run imported --resume",
)  # fmt: skip
SAMPLE_FLAGS = (
    "--temperature nan", "--temperature -1", "--num-samples 0", "--num-samples 99999999999",
    "--max-tokens 0", "--max-tokens 1000", f"--top-k {BIG}", f"--seed {BIG}", "--step garbage",
    "--step 7", "--run b", "--device-type tpu",
)  # fmt: skip
EVALUATE_FLAGS = (
    "b", "a --step 7", "a --data nowhere", "a --val-shard none.parquet", "a --eval-tokens 0",
    "a --skip-bpb", "a --max-per-task 5", "a --core-bundle empty", "a --device-batch-size 16777216",
)  # fmt: skip
DATA_FLAGS = (
    "info --data nowhere", "info --data empty", "download --data new --workers 0",
    "download --data new -n 0", "train-tokenizer --data data --vocab-size 10",
    f"train-tokenizer --data data --vocab-size {BIG}", "train-tokenizer --data data --doc-cap 0",
    "train-tokenizer --data data --max-chars -1",
    "digest --data stdlib", "digest --data nowhere", "tokenize --data stdlib",
    "tokenize --data data --cache off",
    "tokenize --data data --workers 0",
)  # fmt: skip
SWEEP_FLAGS = (
    "nowhere", "data/tokenizer.json", "a.b.toml", "parts-d4 --bogus", "parts-d4 --jobs 0",
    "parts-d4 --per-gpu 0", "parts-d4 --core-every 5", "parts-d4 --per-gpu 2 --device-type cpu",
    "parts-d4 --depth 0", "parts-d4 --scalar-lr 1", "parts-d4 --seed 3", "parts-d4 --run x",
    "parts-d4 --gpus 2", "parts-d4 --data=", "parts-d4 --data nowhere", "parts-d4 --wandb",
)  # fmt: skip
SWEEP_FILES = (
    "seeds = [1", "seeds = []", "seeds = [1, 1]", "seeds = [-1]", 'seeds = ["a"]',
    "seeds = [1]; about = 3", "seeds = [1]; sedes = [2]", "seeds = [1]; depth = 4", "seeds = [1]",
    "[grid]; depth = [1]",
    "seeds = [1]; [grid]; depth = []", "seeds = [1]; [grid]; depth = [1, 1]",
    "seeds = [1]; [grid]; depth = [1, 0]", 'seeds = [1]; [grid]; data = ["a/b"]',
    "seeds = [1]; [grid]; dept = [1]", "seeds = [1]; [grid]; matrix_lr = [1]",
    "seeds = [1]; [grid]; seed = [1]", 'seeds = [1]; [grid]; matrix-lr = ["high"]',
    "seeds = [1]; [grid]; head-dim = [15]",
    "seeds = [1]; [flags]; num-iterations = 3; [grid]; target-flops = [1]",
    'seeds = [1]; baseline = "b"; [grid]; depth = [1]', "seeds = [1]; [[variants]]; depth = 1",
    "seeds = [1]; tolerance = 1; [grid]; depth = [1]",
    "seeds = [1]; tolerance = 1; [grid]; depth = [1]; [expected.b]; 1 = 2",
    "seeds = [1]; tolerance = 1; [grid]; depth = [1]; [expected.depth-1]; x = 2",
    'seeds = [1]; corpus = "9-a"; [grid]; depth = [1]',
    "seeds = [1]; [grid]; total-batch-size = [100]",
)  # fmt: skip
WARM_FLAGS = (
    "--depth 0", "--arch sm_50", "--gpu H9000", "--out nowhere/k.zip", "--head-dim 15", "--out=",
    "--out data", "--device-batch-size auto", "--gpus auto", "--gpus many",
)  # fmt: skip
PLOT_FLAGS = (
    "nowhere", "data", "a a", "a broken", "a --out a.pdf", "a --x hours", "a runs/a/tokenizer.json",
)  # fmt: skip
EXPORT_FLAGS = (
    "hf nowhere out", "hf data out", "hf a data", "hf a out --step 9", "hf a out --dtype float8",
    "hf runs/a/step_000002 out --step 1", "nanochat a data", "gguf a out",
)  # fmt: skip
CONFIG_EDITS = (
    ("rope_base", 500000), ("n_layer", 10**6), ("n_layer", 2000), ("n_embd", 2**40),
    ("n_layer", "two"),
)  # fmt: skip
META_EDITS = (
    ("format", 99), ("step", -1), ("step", "2"), ("model_config.n_layer", 10**6),
    ("model_config.n_layer", 3000), ("model_config.window_pattern", "L"),
    ("settings.depth", 2), ("settings.matrix_lr", None), ("settings.new_flag", 1),
    ("progress.train_seconds", float("nan")), ("loader.unit", -1), ("loader.corpus", "another"),
)  # fmt: skip


@contextmanager
def inside(folder):
    """The current folder is another one (contextlib.chdir came with Python 3.11)."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def said(main, argv):
    """The line that a command says on stderr, and '' where it works.

    Raises:
        AssertionError: it says more, ends with another code than 2, or leaves files behind.
    """
    err, code, before = io.StringIO(), 0, files()
    with redirect_stdout(io.StringIO()), redirect_stderr(err):
        try:
            run_command(lambda: main(argv))
        except SystemExit as stop:
            code = stop.code
    lines = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
    if not code:
        return ""
    left = files() - before
    assert (code, len(lines), left) == (2, 1, set()), f"{argv}: exit code {code}, {lines}, {left}"
    return lines[0]


def files():
    """Every path in the current folder."""
    return set(Path().rglob("*"))


def prepare():
    """Data, and runs to go on with, in the current folder."""
    for name, seed in (("data", 1), ("other", 9)):
        os.mkdir(name)
        for index in range(3):
            table = pa.table({"text": documents(60, seed=seed + index)})
            pq.write_table(table, f"{name}/shard_{index:05d}.parquet", row_group_size=25)
        Tokenizer.train(documents(200), 320).save(f"{name}/tokenizer.json")
    os.mkdir("empty")
    for name in ("a", "finished"):
        argv = [*TINY, "--run", name, "--num-iterations", "3", "--save-every", "2"]
        assert not said(run.main, argv)
    shutil.rmtree("runs/a/step_000003")
    write_nanochat("nanochat")
    assert not said(convert.main, ["from-nanochat", "nanochat", "--run", "imported"])


def write_nanochat(folder, tensors=None, **fields):
    """A checkpoint in nanochat's format; `tensors` in place of its weights."""
    config = GPTConfig.from_depth(2, 32, 16, sequence_len=64, vocab_size=300, bigram_embed_factor=0)
    weights = dict(random_model(config).state_dict()) if tensors is None else tensors
    declared = {name: getattr(config, name) for name in NANOCHAT_FIELDS}
    Path(folder).mkdir(exist_ok=True)
    torch.save(weights, f"{folder}/model_000007.pt")
    meta = {"step": 7, "val_bpb": 1.5, "model_config": {**declared, **fields}}
    Path(folder, "meta_000007.json").write_text(json.dumps(meta))
    return weights


def nanochat_rows():
    """(what is given, message) of checkpoints of nanochat that are none."""
    weights = write_nanochat("theirs")
    name = "lm_head.weight"
    nan = {**weights, name: weights[name] * float("nan")}
    tensors = {
        "weights: a list": [1, 2],
        "weights: a dict of a dict": {"model": {"a": torch.zeros(2)}},
        f"weights: {name} int8": {**weights, name: weights[name].to(torch.int8)},
        f"weights: {name} NaN": nan,
        "weights: one is missing": {n: t for n, t in weights.items() if n != name},
        "weights: no smear": {n: t for n, t in weights.items() if "smear" not in n},
    }
    for what, content in tensors.items():
        write_nanochat("theirs", content)
        yield what, said(convert.main, ["from-nanochat", "theirs", "--run", "b"])
    for field, value in CONFIG_EDITS:
        write_nanochat("theirs", **{field: value})
        line = said(convert.main, ["from-nanochat", "theirs", "--run", "b"])
        yield f"model_config: {field} {value}", line
    yield "--step 8", said(convert.main, ["from-nanochat", "theirs", "--run", "b", "--step", "8"])
    yield "--run a", said(convert.main, ["from-nanochat", "theirs", "--run", "a"])
    yield "an empty folder", said(convert.main, ["from-nanochat", "empty", "--run", "b"])
    whole = pickled(Tokenizer.load("data/tokenizer.json"))
    files = {
        "a call of os.system": b"cos\nsystem\n(Vtrue\ntR.",
        "the name of an encoding": b"\x80\x02ctiktoken.core\nEncoding\n)\x81Vgpt2\nb.",
        "another special token": whole.replace(b"<|output_end|>", b"<|output_fin|>"),
        "cut short": whole[:500],
        "320 tokens": whole,
    }
    write_nanochat("theirs")
    argv = "from-nanochat theirs --run b --tokenizer t.pkl".split()
    for what, content in files.items():
        Path("t.pkl").write_bytes(content)
        yield f"--tokenizer t.pkl: {what}", said(convert.main, argv)
    Path("t.pkl").unlink()
    yield "--tokenizer t.pkl: not there", said(convert.main, argv)
    yield "to-nanochat data", said(convert.main, ["to-nanochat", "data", "--run", "a"])
    os.makedirs("base/tokenizer")
    Path("base/tokenizer/tokenizer.pkl").write_bytes(b"")
    argv = ["to-nanochat", "base/base_checkpoints/a", "--run", "a"]
    yield "to-nanochat beside another tokenizer", said(convert.main, argv).replace(os.getcwd(), "…")


def file_rows():
    """(what is given, message) of files of a run that were edited."""
    shutil.copytree("runs/a", "kept")
    meta_path = Path("runs/a/step_000002/meta.json")

    def after(edit):
        shutil.rmtree("runs/a")
        shutil.copytree("kept", "runs/a")
        edit()
        return said(run.main, ["--run", "a", "--resume"])

    def edit_meta(place, value):
        meta = json.loads(meta_path.read_text())
        *path, key = place.split(".")
        holder = meta
        for part in path:
            holder = holder[part]
        holder[key] = value
        meta_path.write_text(json.dumps(meta))

    for place, value in META_EDITS:
        yield (
            f"meta.json: {place} {json.dumps(value)}",
            after(lambda p=place, v=value: edit_meta(p, v)),
        )
    for name in ("meta.json", "model.safetensors", "optim.safetensors", "loader.safetensors"):
        path = meta_path.parent / name

        def cut(path=path):
            path.write_bytes(path.read_bytes()[:50])

        def flip(path=path):
            content = bytearray(path.read_bytes())
            content[-5] ^= 1
            path.write_bytes(content)

        yield f"{name}: cut short", after(cut)
        if name != "meta.json":
            yield f"{name}: a bit flipped", after(flip)
    tokenizer = Path("runs/a/tokenizer.json")
    yield "tokenizer.json: missing", after(tokenizer.unlink)
    yield "tokenizer.json: cut short", after(lambda: tokenizer.write_text("{"))
    others = (Tokenizer.train(documents(300, seed=seed), 320) for seed in range(8, 99))
    other = next(each for each in others if each.vocab_size == 320)
    yield "tokenizer.json: of another run", after(lambda: other.save(tokenizer))
    shutil.rmtree("runs/a")
    shutil.copytree("kept", "runs/a")


def sweep_rows():
    """(what is given, message) of sweeps: flags, and files whose lines are parted by ";"."""
    Path("a.b.toml").touch()
    for flags in SWEEP_FLAGS:
        yield flags, said(sweep.main, flags.split())
    path = Path("s.toml")
    for text in SWEEP_FILES:
        path.write_text(text.replace("; ", "\n"))
        yield text, said(sweep.main, ["s.toml", "--data", "data"])
    path.write_text("seeds = [1]\n[grid]\ndepth = [1]\n")
    shutil.copytree("runs/a", "runs/s.depth-1.1")
    flags = "s.toml --data data --device-type cpu"
    yield flags, said(sweep.main, flags.split())
    shutil.rmtree("runs/s.depth-1.1")


def sections():
    """(title, [(what is given, message)])."""
    long = [*TINY, "--num-iterations", "1"]

    def train(flags):
        given = flags.split()
        drop = {flag.partition("=")[0] for flag in given if flag.startswith("--")}
        if "--target" in flags and "--num-iterations" not in flags:
            drop.add("--num-iterations")
        argv = list(long)
        for flag in drop & set(argv):
            at = argv.index(flag)
            del argv[at : at + 2]
        return said(run.main, [*argv, *given])

    yield "train.run", [(flags, train(flags)) for flags in RUN_FLAGS]
    yield "train.run --resume", [(f, said(run.main, f.split())) for f in RESUME_FLAGS]
    yield "A run's files, with `--resume`", list(file_rows())
    yield "train.generate", [(f, said(generate.main, [*SAMPLE, *f.split()])) for f in SAMPLE_FLAGS]
    asked = [[*f.split(), "--device-type", "cpu"] for f in EVALUATE_FLAGS]
    lines = [said(evaluate.main, argv) for argv in asked]
    yield "train.evaluate", list(zip(EVALUATE_FLAGS, lines, strict=True))
    yield "train.convert", list(nanochat_rows())
    yield "train.export", [(f, said(export.main, f.split())) for f in EXPORT_FLAGS]
    Path("runs/broken").mkdir()
    Path("runs/broken/metrics.jsonl").write_text('{"kind": "val", "step": -1}\n')
    yield "train.plot", [(flags, said(plot.main, flags.split())) for flags in PLOT_FLAGS]
    yield "train.sweep", list(sweep_rows())
    yield "train.runs", [("all", said(runs.main, ["all"]))]
    asked = ("--data nowhere", "--data empty", "--data=", "--fast")
    yield "train.doctor", [(flags, said(doctor.main, flags.split())) for flags in asked]
    yield "train.warm", [(flags, said(warm.main, flags.split())) for flags in WARM_FLAGS]
    yield "train.data", [(flags, said(data.main, flags.split())) for flags in DATA_FLAGS]


def shown(message):
    """A message as a table's cell; Python's versions quote the choices of a flag or not."""
    choices = re.compile(r"(?<=\(choose from ).*(?=\))")
    return choices.sub(lambda found: found[0].replace("'", ""), message).replace("|", "\\|")


def page():
    """The text of docs/errors.md."""
    with tempfile.TemporaryDirectory() as folder, inside(folder):
        hidden = {"HOME": folder, "NANOFUSE_DIR": folder}
        patched = mock.patch("nanofuse.train.memory.memory_of", lambda device: MEMORY)
        without = mock.patch("nanofuse.train.trackers.find_spec", lambda name: None)
        with mock.patch.dict(os.environ, hidden), patched, without:
            prepare()
            text = HEAD
            for title, rows in sections():
                text += f"\n## {title}\n\n| given | message |\n| --- | --- |\n"
                for given, message in rows:
                    text += f"| `{given}` | {shown(message)} |\n"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written to {PAGE}", file=sys.stderr)
