"""metrics.jsonl and Weights & Biases."""

import json
import sys
import types

import pytest

from nanofuse.train.errors import UserError
from nanofuse.train.files import remove_folder
from nanofuse.train.run import main
from nanofuse.train.run_folder import checkpoints, load_meta, run_dir
from nanofuse.train.runlog import RunLog, cut_back
from tests.train.tiny import TINY, losses, records


def line(kind, step, value=0):
    return json.dumps({"kind": kind, "step": step, "value": value})


@pytest.mark.parametrize(
    "torn",
    ['{"kind": "train", "st', "\0\0\0\0", b"\xce".decode("latin1"), "[1]", "NaN", "[" * 99999],
)
def test_a_torn_end_is_cut_off(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    whole = "\n".join([line("train", 1), line("train", 2)]) + "\n"
    path.write_bytes((whole + torn).encode("latin1"))
    assert cut_back(path, 2) == {"train"}
    assert path.read_text() == whole


def test_later_steps_are_cut_back_and_doubles_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [line("val", 0), line("train", 1, 1), line("train", 2, 1), line("train", 3, 1),
             line("train", 2, 2), '{"mine": 1}', line("val", 2), line("train", 3, 2)]  # fmt: skip
    path.write_text("\n".join(lines) + "\n")
    assert cut_back(path, 2, {"val"}) == {"train"}
    kept = [line("val", 0), line("train", 1, 1), line("train", 2, 2), '{"mine": 1}']
    assert path.read_text().splitlines() == kept
    before = path.stat().st_ino
    cut_back(path, 2)
    assert path.stat().st_ino == before  # nothing to mend, nothing written
    assert cut_back(tmp_path / "absent", 2) == set()


def test_a_resumed_run_logs_each_step_once(data_dir, work_dir):
    flags = ["--save-every", "3", "--eval-every", "3", "--num-iterations", "8"]
    main([*TINY, "--data", str(data_dir), "--run", "a", *flags])
    directory = run_dir("a")
    whole, vals = losses(directory), records(directory, "val")
    remove_folder(directory / "step_000008")
    path = directory / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])  # in the middle of the last line
    main(["--run", "a", "--resume"])
    assert [r["step"] for r in records(directory)] == list(range(1, 9))
    assert losses(directory) == whole
    again = records(directory, "val")
    assert [(r["step"], r["bpb"]) for r in again] == [(r["step"], r["bpb"]) for r in vals]


def test_the_smoothed_loss_is_the_weighted_mean_and_goes_on(data_dir, work_dir):
    args = [*TINY, "--data", str(data_dir), "--run", "a", "--num-iterations", "6"]
    main([*args, "--save-every", "3"])
    whole = records(run_dir("a"))
    for step, record in enumerate(whole, 1):
        weights = [0.9 ** (step - i) for i in range(1, step + 1)]
        mean = sum(w * r["loss"] for w, r in zip(weights, whole, strict=False)) / sum(weights)
        assert record["loss_ema"] == pytest.approx(mean, rel=1e-5)
    remove_folder(run_dir("a") / "step_000006")
    main(["--run", "a", "--resume"])
    again = records(run_dir("a"))
    assert [r["loss_ema"] for r in again] == [r["loss_ema"] for r in whole]


def test_the_bar_has_no_stray_comma(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    log = RunLog(tmp_path, 0, 10)
    log.bar.mininterval = 0
    log.advance("loss 2.5")
    log.close()
    shown = capsys.readouterr().err
    assert "| loss 2.5 ETA" in shown and ", loss" not in shown


class FakeWandb(types.ModuleType):
    """Notes what is asked of it; `init` or `log` may fail."""

    def __init__(self, init_error=None, log_error=None):
        super().__init__("wandb")
        self.init_error, self.log_error, self.id = init_error, log_error, "made-1"
        self.starts, self.logged = [], []

    def init(self, **kwargs):
        self.starts.append(kwargs)
        if self.init_error:
            raise self.init_error
        return self

    def log(self, values, step):
        if self.log_error:
            raise self.log_error
        self.logged.append((step, values))

    def finish(self):
        if self.log_error:
            raise self.log_error


@pytest.fixture
def run_with(data_dir, work_dir, monkeypatch):
    def run(wandb, *flags):
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        main([*TINY, "--data", str(data_dir), "--run", "a", "--num-iterations", "2", *flags])

    return run


def test_wandb_that_does_not_start_is_one_line(run_with, work_dir):
    with pytest.raises(
        UserError, match="--wandb does not start .RuntimeError: api_key.*login"
    ) as e:
        run_with(FakeWandb(init_error=RuntimeError("api_key not configured\nmore")), "--wandb")
    assert "\n" not in str(e.value) and not (work_dir / "runs").exists()


def test_wandb_that_fails_later_ends_no_run(run_with, capsys):
    run_with(FakeWandb(log_error=ConnectionError("unreachable")), "--wandb")
    assert capsys.readouterr().out.count("wandb: ConnectionError: unreachable") == 1
    assert len(records(run_dir("a"))) == 2 and checkpoints(run_dir("a"))


def test_a_resumed_run_goes_on_in_its_wandb_run(run_with, monkeypatch):
    wandb = FakeWandb()
    run_with(wandb, "--wandb", "--save-every", "1")
    assert load_meta(run_dir("a") / "step_000001")["wandb"] == "made-1"
    expected = [(r["step"], r["loss"]) for r in records(run_dir("a"))]
    assert [(step, v["train/loss"]) for step, v in wandb.logged if "train/loss" in v] == expected
    remove_folder(run_dir("a") / "step_000002")
    main(["--run", "a", "--resume"])
    assert "id" not in wandb.starts[0]
    assert (wandb.starts[1]["id"], wandb.starts[1]["resume"]) == ("made-1", "allow")


def test_wandb_that_is_missing_is_named(run_with, work_dir):
    with pytest.raises(UserError, match=r"--wandb needs wandb; install it with .*\[wandb\]"):
        run_with(None, "--wandb")


def test_without_wandb_nothing_is_said_of_it(tmp_path, capsys):
    log = RunLog(tmp_path, 0, 10)
    log.metrics("train", 1, loss=2.5)
    log.close()
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 2.5


@pytest.mark.parametrize("meanwhile", ["", "what another wrote\n"])
def test_a_removed_file_is_written_anew(tmp_path, meanwhile):
    log = RunLog(tmp_path, 0, 10)
    log.metrics("train", 1, loss=2.5)
    log.path.unlink()
    if meanwhile:
        log.path.write_text(meanwhile)
    log.restore()
    log.metrics("train", 2, loss=2.25)
    log.close()
    found = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in found] == [(1, 2.5), (2, 2.25)]
