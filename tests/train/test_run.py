"""The command, end to end, on small corpora and models."""

import dataclasses
import gc
import itertools
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanofuse.model.engine import Sampling, generate
from nanofuse.train import generate as generate_command
from nanofuse.train import start as start_module
from nanofuse.train.checkpoint import load_model, load_tensors, load_tokenizer
from nanofuse.train.clock import process_seconds
from nanofuse.train.command import LOADED
from nanofuse.train.data.corpus import StdlibCorpus
from nanofuse.train.data.loader import Packing, packed_batches
from nanofuse.train.data.tokenizer import Tokenizer
from nanofuse.train.device import select_machine
from nanofuse.train.errors import UserError
from nanofuse.train.loop import settle_garbage
from nanofuse.train.run import main
from nanofuse.train.run_folder import MODEL, OPTIM, checkpoints, find_checkpoint, load_meta, run_dir
from nanofuse.train.settings import FLAGS
from nanofuse.train.versions import code
from tests.helpers import documents

ROOT = Path(__file__).parent.parent.parent
# of other processes: libraries may lie beside Python's own
PYTHONPATH = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
SMALL = (
    "--depth 4 --aspect-ratio 16 --head-dim 16 --max-seq-len 64 --device-batch-size 4 "
    "--device-type cpu --total-batch-size 512 --eval-tokens 1024 --eval-every -1 --sample-every -1"
).split()


def train(data_dir, run, *flags):
    """Run the command; returns its metrics records."""
    main([*SMALL, "--data", str(data_dir), "--run", run, *map(str, flags)])
    lines = (run_dir(run) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def figures(records, kind, name):
    return [record[name] for record in records if record["kind"] == kind]


def test_trains_evaluates_samples_and_saves(data_dir, work_dir, capsys):
    records = train(
        data_dir, "a", "--num-iterations", 20, "--eval-every", 10, "--sample-every", 20,
        "--save-every", 10, "--train-log-every", 5,
    )  # fmt: skip
    out = capsys.readouterr().out
    assert figures(records, "train", "step") == [1, 5, 10, 15, 20]
    assert figures(records, "val", "step") == [0, 10, 20]
    assert figures(records, "sample", "step") == [20]
    losses, bpbs = figures(records, "train", "loss"), figures(records, "val", "bpb")
    assert losses[-1] < losses[0] - 0.5 and bpbs[-1] < bpbs[0] - 0.2
    for fact in ("device: CPU", "backend: eager (auto on cpu)", "attention: sdpa", "fp8: off",
                 "parameters:", "plan: 20 steps", "memory: about"):  # fmt: skip
        assert fact in out
    told, last = out.splitlines()[-2:]
    assert told == 'done: python -m train.generate --run a --prompt "..." continues a text'
    summary = json.loads(last)
    assert summary["steps"] == 20 and summary["val_bpb"] == bpbs[-1]
    assert re.search(
        r"first step after \d+\.\d s: imports \d+\.\d, data .*, evaluation \d+\.\d, step \d", out
    )
    assert 0 < summary["first_evaluation_s"] < summary["time_to_first_step_s"]
    steps = sorted(folder.name for folder in run_dir("a").glob("step_*"))
    assert steps == ["step_000010", "step_000020"]


def test_two_runs_of_one_seed_are_identical(data_dir, work_dir):
    """d4, 8 steps: every loss and BPB equal, and another seed differs."""
    flags = ("--num-iterations", 8, "--train-log-every", 1)
    a, b = (train(data_dir, run, *flags) for run in "ab")
    c = train(data_dir, "c", *flags, "--seed", 7)
    for kind, name in (("train", "loss"), ("val", "bpb")):
        assert figures(a, kind, name) == figures(b, kind, name) != figures(c, kind, name)


def test_losses_are_the_golden_ones(data_dir, work_dir):
    """A refactor must not move the losses; 1e-3 leaves room for another CPU's rounding. The steps
    are those of a warm-up, as at the full rate such a small model makes 0.5 of 1e-6.

    A change that means to move them writes the file anew and says so in dev/LOG.md.
    """
    golden = json.loads((ROOT / "tests/train/golden_losses.json").read_text())
    records = train(data_dir, "a", *golden["flags"])
    assert figures(records, "train", "loss") == pytest.approx(golden["losses"], abs=1e-3)
    assert figures(records, "val", "bpb") == pytest.approx(golden["bpb"], abs=1e-3)


def test_resume_is_bit_for_bit(data_dir, work_dir):
    flags = ("--num-iterations", 14, "--train-log-every", 1, "--save-every", 6)
    whole = train(data_dir, "a", *flags)
    last = run_dir("a") / "step_000014"
    files = {
        name: {key: x.clone() for key, x in load_tensors(last / name).items()}
        for name in (MODEL, OPTIM)
    }
    for folder in (last, run_dir("a") / "step_000012"):  # as if it had been cut off after step 6
        shutil.rmtree(folder)
    (run_dir("a") / "metrics.jsonl").unlink()
    main(["--run", "a", "--resume"])
    lines = (run_dir("a") / "metrics.jsonl").read_text().splitlines()
    resumed = [json.loads(line) for line in lines]
    assert figures(resumed, "train", "loss") == figures(whole, "train", "loss")[6:]
    assert figures(resumed, "val", "bpb") == figures(whole, "val", "bpb")[1:]
    for name, a in files.items():
        b = load_tensors(last / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_initial_bpb_is_log2_vocab_over_bytes_per_token(data_dir, work_dir):
    records = train(data_dir, "a", "--num-iterations", 1)
    tokenizer = Tokenizer.load(data_dir / "tokenizer.json")
    from nanofuse.train.data.corpus import ParquetCorpus

    batches = packed_batches(Packing(ParquetCorpus(data_dir), "val", tokenizer, 4, 64))
    lengths = torch.from_numpy(tokenizer.token_bytes())
    rows = [torch.from_numpy(rows[:, 1:]).long() for rows, _ in itertools.islice(batches, 4)]
    batches.close()
    targets = lengths[torch.cat(rows)]
    expected = math.log2(320) * (targets > 0).sum().item() / targets.sum().item()
    assert figures(records, "val", "bpb")[0] == pytest.approx(expected, abs=1e-3)


def test_log_every_spaces_the_records(data_dir, work_dir):
    records = train(data_dir, "a", "--num-iterations", 9, "--train-log-every", 4,
                    "--skip-initial-eval")  # fmt: skip
    assert figures(records, "train", "step") == [1, 4, 8, 9]
    assert figures(records, "val", "step") == [9]


def test_dense_and_upstream_optimiser(data_dir, work_dir):
    records = train(data_dir, "a", "--num-iterations", 8, "--bigram-embed-factor", 0,
                    "--no-muon-plus", "--muon-eq", "none")  # fmt: skip
    names = load_tensors(run_dir("a") / "step_000008" / MODEL)
    assert not any(name.startswith("bigram") for name in names)
    assert figures(records, "val", "bpb")[-1] < figures(records, "val", "bpb")[0]


def test_generate_command(data_dir, work_dir, capsys):
    train(data_dir, "a", "--num-iterations", 4)
    capsys.readouterr()
    argv = ["--run", "a", "--prompt", "the cat", "--num-samples", "2", "--max-tokens", "8"]
    texts = []
    for seed in ("1", "1", "2"):
        generate_command.main([*argv, "--seed", seed, "--device-type", "cpu"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].count("the cat") == 2
    model, _ = load_model(find_checkpoint(run_dir("a")), "cpu", torch.float32)
    tokenizer = load_tokenizer(run_dir("a"), model.config)
    ids = [tokenizer.bos, *tokenizer.encode("the cat")]
    columns = list(generate(model, ids, 1, 8, Sampling(temperature=0), tokenizer.bos))
    expected = "the cat" + tokenizer.decode([column[0] for column in columns]) + "\n"
    for flags in (["--temperature", "0"], ["--top-k", "1"]):
        generate_command.main([*argv[:4], "--max-tokens", "8", "--device-type", "cpu", *flags])
        assert capsys.readouterr().out == expected
    for flags, message in (
        (["--run", "absent"], "no checkpoint"),
        (["--run", "a", "--step", "3"], "no checkpoint of step 3"),
        (["--run", "a", "--max-tokens", "100000"], "lower --max-tokens"),
    ):
        with pytest.raises(UserError, match=message):
            generate_command.main(flags)


def test_run_names(data_dir, work_dir):
    for expected in ("d4", "d4-2"):
        main([*SMALL, "--data", str(data_dir), "--num-iterations", "1", "--skip-initial-eval"])
        assert find_checkpoint(run_dir(expected)).name == "step_000001"
    with pytest.raises(UserError, match="runs/d4 exists; add --resume or choose another"):
        train(data_dir, "d4", "--num-iterations", 1)


BAD = [
    (["--total-batch-size", "500"], "--total-batch-size 500 is not a multiple"),
    (["--head-dim", "7"], "--head-dim 7 is odd"),
    (["--n-kv-head", "3"], "--n-kv-head"),
    (["--fp8", "torch"], "--fp8 torch needs a CUDA GPU"),
    (["--attention", "flex"], "--attention flex needs a CUDA GPU"),
    (["--vocab-size", "400"], "--vocab-size 400: .*tokenizer.json has 320 tokens"),
    (["--num-iterations", "0"], "--num-iterations"),
    (["--eval-tokens", "10"], "--eval-tokens 10"),
    (["--run", "../x"], "--run"),
    (["--compile-mode", "max-autotune"], "--compile-mode needs --backend compile.* is eager"),
    (["--cuda-graphs"], "--cuda-graphs needs --backend fused.* is eager"),
    (["--resume"], "no checkpoint in runs/bad"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=lambda x: "-".join(x) if x[0] else None)
def test_bad_flags_name_themselves_and_leave_nothing(data_dir, work_dir, flags, message):
    argv = [*SMALL, "--num-iterations", "1", "--data", str(data_dir), "--run", "bad"]
    with pytest.raises(UserError, match=message):
        main([*argv, *flags])
    assert not (work_dir / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_an_absent_gpu_is_named(data_dir, work_dir):
    with pytest.raises(UserError, match="--device-type cuda: no CUDA GPU"):
        main(["--device-type", "cuda", "--data", str(data_dir)])
    assert not (work_dir / "runs").exists()


def test_bad_data_leaves_nothing(data_dir, work_dir):
    argv = [*SMALL, "--num-iterations", "1", "--data", str(data_dir), "--run", "bad"]
    shard = data_dir / "shard_00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match="shard_00000.parquet is truncated"):
        main(argv)
    shard.unlink()
    (data_dir / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json is not a tokenizer"):
        main(argv)
    assert not (work_dir / "runs").exists()


def test_resume_refuses_what_does_not_fit(data_dir, work_dir, tmp_path):
    train(data_dir, "a", "--num-iterations", 4, "--save-every", 2)
    with pytest.raises(UserError, match="has finished its 4 steps"):
        main(["--run", "a", "--resume"])
    last = run_dir("a") / "step_000004"
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    for flags, message in (
        (["--resume"], "add --run NAME"),
        (["--run", "a", "--resume", "--depth", "6"], "--depth 6 differs from the run's 4"),
        (["--run", "a", "--resume", "--data", "stdlib"], "differ from the run's data"),
    ):
        with pytest.raises(UserError, match=message):
            main(flags)
    optim = run_dir("a") / "step_000002" / OPTIM
    optim.write_bytes(optim.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"optim\.safetensors is damaged, or of another"):
        main(["--run", "a", "--resume"])
    (run_dir("a") / "tokenizer.json").write_text(Tokenizer.train(["abc"], 300).to_json())
    with pytest.raises(UserError, match="the model 320"):
        main(["--run", "a", "--resume"])
    assert load_meta(find_checkpoint(run_dir("a")))["step"] == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train.run", "--backend", "warp"], "--backend"),
        (["train.run", "--data", "absent"], "data directory absent does not exist"),
        (["train.run", "--resume", "--run", "x"], "no checkpoint in runs/x"),
        (["train.data", "info", "--data", "absent"], "absent does not exist"),
        (["train.convert", "from-nanochat", "absent", "--run", "x"], "absent holds no model_"),
        (["train.generate", "--run", "x"], "no checkpoint in runs/x"),
        (["bench.tune", "nonsense"], "unknown op 'nonsense'"),
    ],
)
def test_commands_end_with_one_line_and_code_2(work_dir, capsys, monkeypatch, argv, message):
    monkeypatch.setattr(sys, "argv", argv)
    for name in ("stdout", "stderr"):  # a command may put others there
        monkeypatch.setattr(sys, name, getattr(sys, name))
    with pytest.raises(SystemExit) as end, warnings.catch_warnings(action="ignore"):
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)  # python -m
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err
    assert not (work_dir / "runs").exists()


def test_what_is_in_the_way_is_named_and_stays(data_dir, work_dir):
    runs = work_dir / "runs"
    runs.write_text("")
    flags = [*SMALL, "--num-iterations", "1", "--skip-initial-eval", "--data", str(data_dir)]
    with pytest.raises(UserError, match="^runs is not a folder; move it away$"):
        main(flags)
    assert runs.read_text() == ""
    runs.unlink()
    runs.symlink_to("absent")
    with pytest.raises(UserError, match="^runs is not a folder; move it away$"):
        main(flags)
    assert runs.is_symlink()


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPU tests take larger models")
def test_a_fused_run_continues_bit_for_bit(data_dir, work_dir, short_muon):
    """In Triton's interpreter, with the fused optimiser's state in the checkpoint."""
    tiny = (
        "--backend fused --depth 2 --aspect-ratio 32 --head-dim 32 --max-seq-len 16 "
        "--device-batch-size 2 --total-batch-size 32 --bigram-embed-factor 1 --eval-tokens 32 "
        "--skip-initial-eval --save-every 1 --train-log-every 1"
    ).split()
    whole = train(data_dir, "a", *tiny, "--num-iterations", 2)
    files = {name: (run_dir("a") / "step_000002" / name).read_bytes() for name in (MODEL, OPTIM)}
    shutil.rmtree(run_dir("a") / "step_000002")
    main(["--run", "a", "--resume", "--data", str(data_dir)])
    again = [json.loads(line) for line in (run_dir("a") / "metrics.jsonl").open()]
    assert figures(again, "train", "loss")[-1] == figures(whole, "train", "loss")[-1]
    for name, content in files.items():
        assert (run_dir("a") / "step_000002" / name).read_bytes() == content, name


def test_embedded_default_trains_on_the_standard_library(work_dir, capsys):
    """The preset's path with a shorter run: corpus, tokenizer, falling BPB, sample."""
    main(
        [
            "--device-type",
            "cpu",
            "--num-iterations",
            "3",
            "--depth",
            "2",
            "--vocab-size",
            "512",
            "--eval-tokens",
            "4096",
        ]
    )
    out = capsys.readouterr().out
    assert StdlibCorpus().name in out and "training 512 tokens" in out and "sample: " in out
    records = [json.loads(x) for x in (run_dir("d2") / "metrics.jsonl").open()]
    assert [text[:4] for text in figures(records, "sample", "text")] == ["def "]
    bpbs = figures(records, "val", "bpb")
    assert bpbs[-1] < bpbs[0]


@pytest.mark.cuda
def test_compiled_fp8_run_on_a_gpu(data_dir, work_dir, capsys):
    """The baseline's whole path: compile, flex, FP8 in training, bf16 in evaluation. After 18 of
    these steps the loss of some backends jumps (dev/LOG.md, 2026-11-30)."""
    flags = ["--depth", "4", "--max-seq-len", "256", "--num-iterations", "16", "--fp8", "torch",
             "--device-batch-size", "4", "--total-batch-size", "2048", "--eval-tokens", "4096",
             "--eval-every", "8", "--backend", "compile", "--attention", "flex"]  # fmt: skip
    main([*flags, "--data", str(data_dir), "--run", "gpu"])
    out = capsys.readouterr().out
    assert "backend: compile" in out and "attention: flex" in out and "25 linears" in out
    records = [json.loads(x) for x in (run_dir("gpu") / "metrics.jsonl").open()]
    bpbs = figures(records, "val", "bpb")
    assert bpbs[-1] < bpbs[0] - 0.1


GPU_SMALL = [
    "--depth", "4", "--max-seq-len", "256", "--num-iterations", "20", "--device-batch-size", "4",
    "--total-batch-size", "2048", "--eval-tokens", "4096", "--eval-every", "10", "--sample-every",
    "-1", "--train-log-every", "1",
]  # fmt: skip


def gpu_run(data_dir, run, *flags):
    """Metrics of a run at depth 4 on the GPU."""
    main([*GPU_SMALL, "--data", str(data_dir), "--run", run, *flags])
    return [json.loads(x) for x in (run_dir(run) / "metrics.jsonl").open()]


@pytest.mark.cuda
def test_fused_run_on_a_gpu_and_its_continuation(data_dir, work_dir, capsys):
    records = gpu_run(data_dir, "fused", "--backend", "fused", "--save-every", "10")
    out = capsys.readouterr().out
    assert "backend: fused" in out and "17 linears in training" in out
    assert "kernels: on: embed_smear" in out and "CUDA graphs: on" in out
    bpbs = figures(records, "val", "bpb")
    assert bpbs[-1] < bpbs[0] - 0.1
    shutil.rmtree(run_dir("fused") / "step_000020")
    # in a process of its own, in which no kernel has been loaded when training goes on
    command = [sys.executable, "-m", "train.run", "--run", "fused", "--resume", "--data", data_dir]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": PYTHONPATH}, check=True)
    again = [json.loads(x) for x in (run_dir("fused") / "metrics.jsonl").open()]
    assert figures(again, "val", "bpb")[-1] == pytest.approx(bpbs[-1], abs=1e-3)


@pytest.fixture
def restore_determinism(monkeypatch):
    """Leaves torch's switches as they were."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.cuda
def test_two_deterministic_runs_are_equal(data_dir, work_dir, restore_determinism):
    runs = [gpu_run(data_dir, name, "--backend", "fused", "--deterministic") for name in ("a", "b")]
    losses = [figures(records, "train", "loss") for records in runs]
    assert len(losses[0]) == 20 and losses[0] == losses[1]


@pytest.mark.cuda
def test_fused_in_bf16_is_as_close_to_fp32_as_eager(data_dir, work_dir, monkeypatch):
    """BPB over 20 steps of one seed: at most twice as far from fp32 as the eager model in bf16."""
    runs = [
        gpu_run(data_dir, name, "--backend", name, "--fp8", "off") for name in ("fused", "eager")
    ]
    wide = partial(dataclasses.replace, select_machine("cuda", "eager"), dtype=torch.float32)
    monkeypatch.setattr(start_module, "own_machine", lambda *args: wide())
    exact = "--backend", "eager", "--fp8", "off", "--attention", "sdpa"
    runs.append(gpu_run(data_dir, "fp32", *exact))
    for fused, eager, exact in zip(*(figures(r, "val", "bpb") for r in runs), strict=True):
        print(f"fused {fused:.6f}, eager {eager:.6f}, fp32 {exact:.6f}")
        assert abs(fused - exact) <= 2 * abs(eager - exact) + 1e-3


def test_process_seconds_count_from_the_start_of_the_process():
    program = (
        "import time; time.sleep(0.5); import nanofuse.train.clock as r; print(r.process_seconds())"
    )
    began = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    lasted = time.perf_counter() - began
    assert 0.5 < float(out.stdout) < lasted + 0.1
    assert process_seconds() > float(out.stdout)


def test_a_diverged_run_stops_with_one_line(data_dir, work_dir):
    with pytest.raises(UserError, match="gradients of step 2 are not finite .*lower --matrix-lr"):
        train(data_dir, "a", "--num-iterations", 60, "--matrix-lr", 1e30, "--train-log-every", 5,
              "--warmup-steps", 0)  # fmt: skip
    assert not list(run_dir("a").glob("step_*"))


def write_shard(path, texts):
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path)


def test_resume_refuses_other_text_of_the_same_size(data_dir, work_dir):
    def write(turn):
        for index in range(3):
            texts = [f"{index} {i:03d} birds sang {i:03d} {index}"[::turn] for i in range(400)]
            table = pa.table({"text": texts})
            path = data_dir / f"shard_{index:05d}.parquet"
            pq.write_table(table, path, compression="none", use_dictionary=False)

    write(1)
    train(data_dir, "a", "--num-iterations", 2)
    meta_path = find_checkpoint(run_dir("a")) / "meta.json"
    write(-1)
    more = ["--run", "a", "--resume", "--num-iterations", "3"]
    with pytest.raises(UserError, match="differ from the run's data"):
        main(more)
    write(1)
    meta = json.loads(meta_path.read_text())
    assert meta["loader"].pop("content")
    meta_path.write_text(json.dumps(meta))  # as 0.1 wrote it
    main(more)


@pytest.mark.parametrize("flags", [(), ("--skip-initial-eval",)])
def test_a_validation_split_without_text_is_found_before_the_first_step(data_dir, work_dir, flags):
    write_shard(data_dir / "shard_00002.parquet", ["", None])
    with pytest.raises(
        UserError, match="no validation document .* --val-shard than shard_00002.parquet"
    ):
        train(data_dir, "a", "--num-iterations", 2, *flags)
    assert not (work_dir / "runs").exists()


def test_a_tiny_validation_split_is_gone_over_again(data_dir, work_dir):
    write_shard(data_dir / "shard_00002.parquet", ["tiny"])
    assert len(figures(train(data_dir, "a", "--num-iterations", 2), "val", "bpb")) == 2


@pytest.mark.parametrize(("texts", "message"), [([], "train shards are empty"),
                                                ([""] * 5, "holds text")])  # fmt: skip
def test_data_without_text_ends_with_one_line(data_dir, work_dir, texts, message):
    for index in (0, 1):
        write_shard(data_dir / f"shard_{index:05d}.parquet", texts)
    if not texts:
        for index in (0, 1):
            pq.ParquetWriter(
                data_dir / f"shard_{index:05d}.parquet", pa.schema([("text", pa.string())])
            ).close()
    with pytest.raises(UserError, match=message):
        train(data_dir, "a", "--num-iterations", 1)


def test_out_of_memory_names_the_flag(data_dir, work_dir, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("nanofuse.train.loop.Trainer.train_step", full)
    with pytest.raises(UserError, match="--device-batch-size 4 does not fit"):
        train(data_dir, "a", "--num-iterations", 1)


def test_the_heap_is_frozen_while_training(data_dir, work_dir, monkeypatch):
    """Later collections skip what lives on; at the end everything is collectable again."""
    frozen = []
    monkeypatch.setattr("nanofuse.train.loop.settle_garbage", settle_garbage)
    monkeypatch.setattr(
        "nanofuse.train.loop.Trainer.save", lambda self: frozen.append(gc.get_freeze_count())
    )
    train(data_dir, "a", "--num-iterations", 2)
    assert frozen[0] > 100_000 and gc.get_freeze_count() == 0


def test_the_same_validation_rows_at_every_device_batch(data_dir, work_dir):
    """Rows that fill no device batch count: an untrained model has one BPB, whatever the batch."""
    odd = documents(300, seed=9) + ["Zq#%9 Xv&7 ~ Kk!2 " * 30]
    write_shard(data_dir / "shard_00002.parquet", odd)
    found = {}
    for eval_tokens in (64 * 3, 64 * 3 + 1, 64 * 11):
        bpbs = []
        for rows in (1, 3, 7):
            flags = ("--device-batch-size", rows, "--total-batch-size", 64 * rows)
            records = train(data_dir, f"b{rows}-{eval_tokens}", "--num-iterations", 1,
                            "--eval-tokens", eval_tokens, *flags)  # fmt: skip
            bpbs.append(figures(records, "val", "bpb")[0])
        assert bpbs == pytest.approx([bpbs[0]] * 3, rel=1e-6)
        found[eval_tokens] = bpbs[0]
    assert len(set(found.values())) == 3


def test_a_checkpoint_has_the_bpb_of_its_own_weights_or_none(data_dir, work_dir):
    records = train(data_dir, "a", "--num-iterations", 6, "--eval-every", 4, "--save-every", 2)
    metas = {step: load_meta(find_checkpoint(run_dir("a"), step)) for step in (2, 4, 6)}
    bpbs = dict(zip((0, 4, 6), figures(records, "val", "bpb"), strict=True))
    assert {step: meta["val_bpb"] for step, meta in metas.items()} == {
        2: None, 4: bpbs[4], 6: bpbs[6],
    }  # fmt: skip
    assert metas[6]["progress"]["best_bpb"] == min(bpbs.values())


def test_meta_says_what_ran(data_dir, work_dir):
    train(data_dir, "a", "--num-iterations", 1)
    meta = load_meta(find_checkpoint(run_dir("a")))
    assert meta["versions"]["torch"] == version("torch")
    assert meta["versions"]["safetensors"] == version("safetensors")
    assert meta["tokenizer"] == Tokenizer.load(data_dir / "tokenizer.json").fingerprint
    assert meta["code"] == code()
    if (ROOT / ".git").exists():
        assert re.fullmatch("[0-9a-f]{40}", meta["code"]["commit"])


def test_a_checkpoint_of_version_0_1_resumes(data_dir, work_dir):
    """Without digests, fingerprint, smoothed loss and the flags of 0.2."""
    flags = ("--num-iterations", 4, "--save-every", 2, "--train-log-every", 1)
    whole = train(data_dir, "a", *flags)
    shutil.rmtree(run_dir("a") / "step_000004")
    path = run_dir("a") / "step_000002" / "meta.json"
    meta = json.loads(path.read_text())
    for name in ("files", "tokenizer", "code", "versions", "wandb"):
        del meta[name]
    old = {"step", "train_seconds", "val_bpb", "best_bpb", "loss"}
    meta["progress"] = {name: value for name, value in meta["progress"].items() if name in old}
    young = [name for name, (_, f) in FLAGS.items() if f.metadata["since"]]
    assert "keep" in young
    meta["settings"] = {n: v for n, v in meta["settings"].items() if n not in young}
    meta["val_bpb"] = 2.0  # it was that of the latest evaluation
    path.write_text(json.dumps(meta))
    main(["--run", "a", "--resume"])
    again = [json.loads(line) for line in (run_dir("a") / "metrics.jsonl").open()]
    assert figures(again, "train", "loss") == figures(whole, "train", "loss")


def test_keep_and_the_size_of_a_checkpoint(data_dir, work_dir, capsys):
    records = train(data_dir, "a", "--num-iterations", 6, "--eval-every", 1, "--save-every", 1,
                    "--keep", 2)  # fmt: skip
    assert re.search(r"checkpoint: [\d.]+ MiB each; .* free", capsys.readouterr().out)
    bpbs = {r["step"]: r["bpb"] for r in records if r["kind"] == "val" and r["step"]}
    assert list(checkpoints(run_dir("a"))) == sorted({5, 6, min(bpbs, key=bpbs.get)})
    for value in ("0", "-1", "nan"):
        with pytest.raises((UserError, SystemExit)):
            main(["--keep", value])


@pytest.mark.parametrize("boot", [-1e6, 12.0, 1e9])
def test_the_time_to_the_first_step_is_a_duration(monkeypatch, boot):
    """Where the system's clocks do not fit together, such as in a container."""
    own = time.perf_counter() - LOADED
    assert process_seconds() >= own
    monkeypatch.setattr(time, "clock_gettime", lambda clock: boot)
    assert own <= process_seconds() <= own + 5
