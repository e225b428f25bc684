"""train.evaluate on a small run: BPB as training measures it, CORE, and what is kept."""

import json
import shutil

import pytest
import torch

from nanofuse.train import run
from nanofuse.train.checkpoint import load_model
from nanofuse.train.core import evaluate_core
from nanofuse.train.core_bundle import load_bundle
from nanofuse.train.errors import UserError
from nanofuse.train.evaluate import main
from nanofuse.train.run_folder import run_dir
from tests.train.bundles import write_bundle
from tests.train.tiny import TINY, records


@pytest.fixture
def trained(work_dir, data_dir):
    """A run of two steps that evaluated at the end, CORE included."""
    write_bundle(work_dir / "bundle")
    flags = ["--core-every", "1", "--core-bundle", "bundle", "--core-max-per-task", "3"]
    flags += ["--val-shard", "shard_00002.parquet"]
    argv = [*TINY, "--data", data_dir, "--run", "a", "--num-iterations", 2, *flags]
    run.main(list(map(str, argv)))
    return run_dir("a")


def found(capsys, *flags):
    capsys.readouterr()
    main(["a", "--device-type", "cpu", "--json", *map(str, flags)])
    return json.loads(capsys.readouterr().out)


def test_what_training_measured(trained, tokenizer, capsys):
    (logged,) = records(trained, "val")
    first, last = records(trained, "core")
    assert (first["step"], last["step"]) == (1, 2)
    answer = found(capsys, "--core-bundle", "bundle", "--max-per-task", 3)
    assert answer["bpb"]["bpb"] == logged["bpb"] and answer["bpb"]["tokens"] == 256
    assert answer["core"] == {"max_per_task": 3, "core": last["core"], "tasks": last["tasks"]}
    assert json.loads((trained / "evaluate-000002.json").read_text()) == answer
    model, _ = load_model(trained / "step_000002", torch.device("cpu"), torch.float32)
    assert evaluate_core(model, tokenizer, load_bundle("bundle", 3), 99)["core"] == last["core"]


def test_what_was_measured_is_shown_where_it_cannot_be_kept(trained, capsys, monkeypatch):
    def refusing(path, text):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("nanofuse.train.files.write_text_atomically", refusing)
    with pytest.raises(
        UserError, match=r"evaluate-000002.json cannot be written .Permission denied"
    ):
        found(capsys)
    assert json.loads(capsys.readouterr().out)["bpb"]["tokens"] == 256


def test_other_data_beside_what_was_found(trained, data_dir, capsys):
    before = found(capsys, "--skip-bpb", "--core-bundle", "bundle")
    own = found(capsys)["bpb"]
    train = found(capsys, "--split", "train")["bpb"]
    other = found(capsys, "--val-shard", "shard_00000.parquet")["bpb"]
    more = found(capsys, "--eval-tokens", 512, "--device-batch-size", 3)["bpb"]
    assert len({each["bpb"] for each in (own, train, other)}) == 3
    assert (own["split"], train["split"], more["tokens"]) == ("val", "train", 512)
    assert "shard_00000.parquet validates" in other["data"]
    shutil.copytree(data_dir, "copy")
    shutil.move("copy/shard_00002.parquet", "copy/shard_00003.parquet")  # not the run's --val-shard
    moved = found(capsys, "--data", "copy")
    assert moved["bpb"]["bpb"] == own["bpb"] and "copy" in moved["bpb"]["data"]
    kept = json.loads((trained / "evaluate-000002.json").read_text())
    assert kept == {**moved, "core": before["core"]}
    main([str(trained), "--device-type", "cpu", "--core-bundle", "bundle", "--step", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 2: val BPB ") and "256 tokens of 3 parquet" in lines[0]
    assert lines[1].startswith("| task ") and lines[3].startswith("| words ")
    assert lines[-2] == f"step 2: CORE {before['core']['core']:.6f}"
    assert lines[-1] == f"kept in {trained}/evaluate-000002.json"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--skip-bpb"], "--skip-bpb leaves nothing to do"),
        (["--max-per-task", "3"], "--max-per-task is for CORE"),
        (["--core-bundle", "none"], "none/core.yaml cannot be read"),
        ([], "a: no such run"),
    ],
)
def test_refusals(work_dir, flags, message):
    with pytest.raises(UserError, match=message):
        main(["a", *flags])


def test_a_run_without_its_bundle_does_not_start(work_dir, data_dir):
    argv = [*TINY, "--data", str(data_dir), "--run", "a", "--num-iterations", "2"]
    for flags, message in (
        ([], "--core-every needs the tasks of CORE"),
        (["--core-bundle", "none"], "none/core.yaml cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            run.main([*argv, "--core-every", "1", *flags])
        assert not run_dir("a").exists()
