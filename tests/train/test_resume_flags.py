"""--resume with other flags: what changes, what must not, and what is kept for the next time."""

import json
import shutil

import pytest

from nanofuse.train.data.corpus import open_corpus
from nanofuse.train.errors import UserError
from nanofuse.train.run import main
from nanofuse.train.run_folder import amend_meta, find_checkpoint, load_meta, run_dir
from nanofuse.train.start import find_tokenizer

SMALL = (
    "--depth 2 --aspect-ratio 16 --head-dim 16 --max-seq-len 32 --device-batch-size 4 "
    "--total-batch-size 256 --eval-tokens 256 --eval-every -1 --skip-initial-eval "
    "--sample-every -1 --train-log-every 1 --save-every 4 --device-type cpu"
).split()


def train(data_dir, name, steps, *flags):
    main([*SMALL, "--data", str(data_dir), "--run", name, f"--num-iterations={steps}", *flags])


def records(name):
    lines = (run_dir(name) / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == "train"]


def settings(name):
    return load_meta(find_checkpoint(run_dir(name)))["settings"]


@pytest.fixture
def half(data_dir, work_dir):
    """A run of 8 steps, and "half", stopped after 4 of them."""
    train(data_dir, "whole", 8)
    train(data_dir, "half", 8)
    shutil.rmtree(run_dir("half") / "step_000008")


def test_a_longer_run_has_the_schedule_of_its_length(data_dir, half, capsys):
    train(data_dir, "long", 12)
    main(["--run", "half", "--resume", "--num-iterations", "12"])
    assert "12 steps in place of 8" in capsys.readouterr().out
    late = [{r["step"]: r["lr_mult"] for r in records(name)[4:]} for name in ("half", "long")]
    assert late[0] == late[1] and max(late[0]) == 12
    assert settings("half")["num_iterations"] == 12
    with pytest.raises(UserError, match="finished its 12 steps; raise --num-iterations"):
        main(["--run", "half", "--resume"])


def test_another_device_batch_sees_the_same_rows(half):
    main(["--run", "half", "--resume", "--device-batch-size", "2"])
    whole, resumed = ([r["loss"] for r in records(name)] for name in ("whole", "half"))
    assert resumed == pytest.approx(whole, abs=1e-4)
    assert settings("half")["device_batch_size"] == 2


def test_new_rates_are_used_and_kept(half):
    main(["--run", "half", "--resume", "--matrix-lr", "0.3", "--embedding-lr", "3"])
    whole, resumed = ([r["loss"] for r in records(name)] for name in ("whole", "half"))
    assert resumed[:4] == whole[:4] and resumed[-1] != whole[-1]
    assert settings("half")["matrix_lr"] == 0.3 and settings("half")["embedding_lr"] == 3


def test_the_flags_of_the_start_are_those_of_the_resume(data_dir, work_dir):
    """A corpus that gives fewer tokens than --vocab-size asks for."""
    (data_dir / "tokenizer.json").unlink()
    flags = [*SMALL, "--data", str(data_dir), "--run", "a", "--num-iterations", "8"]
    flags += ["--vocab-size", "5000"]
    main(flags)
    shutil.rmtree(run_dir("a") / "step_000008")
    assert find_tokenizer(open_corpus(str(data_dir)), 5000, True).vocab_size < 5000
    main([*flags, "--resume"])
    assert find_checkpoint(run_dir("a")).name == "step_000008"


def test_a_run_in_fp8_goes_on_without(half):
    """Settings of a run with gradients in e4m3, which say nothing of a run in fp32."""
    checkpoint = find_checkpoint(run_dir("half"))
    changed = {**settings("half"), "fp8_gradients": "e4m3"}
    amend_meta(checkpoint, {"settings": changed})
    main(["--run", "half", "--resume"])
    assert settings("half")["fp8_gradients"] == "e4m3"


def test_what_cannot_change_is_refused_before_anything_is_written(half):
    before = sorted(p.name for p in run_dir("half").iterdir())
    for flag, value in (("--depth", "3"), ("--max-seq-len", "64"), ("--seed", "7")):
        with pytest.raises(UserError, match=f"{flag} {value} differs from the run's .*, and "):
            main(["--run", "half", "--resume", flag, value])
    with pytest.raises(UserError, match="--num-iterations 3 ends at step 3, .* at step 4"):
        main(["--run", "half", "--resume", "--num-iterations", "3"])
    with pytest.raises(UserError, match="--device-batch-size 3"):
        main(["--run", "half", "--resume", "--device-batch-size", "3"])
    assert sorted(p.name for p in run_dir("half").iterdir()) == before


def test_a_link_to_a_tokenizer_that_is_gone_is_refused(data_dir, tmp_path):
    path = data_dir / "tokenizer.json"
    path.rename(tmp_path / "kept.json")
    path.symlink_to(tmp_path / "gone.json")
    with pytest.raises(UserError, match="is a link to .*gone.json, which is not there; mend it"):
        find_tokenizer(open_corpus(str(data_dir)), 320, True)
    assert path.is_symlink()
