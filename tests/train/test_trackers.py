"""Trackers take what metrics.jsonl takes; Weights & Biases' are in test_runlog.py."""

import json
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from nanofuse.train.errors import UserError
from nanofuse.train.run import main
from nanofuse.train.run_folder import run_dir
from nanofuse.train.runlog import RunLog
from nanofuse.train.settings import Reports
from nanofuse.train.trackers import FOLDER, check_installed, start_trackers
from tests.train.tiny import TINY, records


class FakeTrackio(types.ModuleType):
    def __init__(self):
        super().__init__("trackio")
        self.starts, self.logged, self.ends = [], [], 0

    def init(self, **kwargs):
        self.starts.append(kwargs)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.ends += 1


class FakeTensorBoard(types.ModuleType):
    """torch.utils.tensorboard, of which every writer is noted."""

    def __init__(self):
        super().__init__("torch.utils.tensorboard")
        self.writers = []

    def SummaryWriter(self, folder, purge_step):
        Path(folder).mkdir(exist_ok=True)
        Path(folder, f"events.out.tfevents.{len(self.writers)}").touch()
        writer = types.SimpleNamespace(folder=folder, purge=purge_step, scalars=[], texts=[])
        writer.add_scalar = lambda *args: writer.scalars.append(args)
        writer.add_text = lambda *args: writer.texts.append(args)
        writer.close = lambda: writer.scalars.append("closed")
        self.writers.append(writer)
        return writer


@pytest.fixture
def fakes(monkeypatch):
    trackio, board = FakeTrackio(), FakeTensorBoard()
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, board)
    return trackio, board


def test_a_run_and_its_resumption_are_one_in_each(fakes, data_dir, work_dir):
    trackio, board = fakes
    flags = ["--trackio", "--tensorboard", "--num-iterations", "1"]
    main([*TINY, "--data", str(data_dir), "--run", "a", *flags])
    main(["--run", "a", "--resume", "--num-iterations", "2"])
    assert [start["resume"] for start in trackio.starts] == ["never", "allow"]
    assert {(start["project"], start["name"]) for start in trackio.starts} == {("nanofuse", "a")}
    assert trackio.starts[0]["config"]["depth"] == 1 and trackio.ends == 2
    expected = [(r["step"], r["loss"]) for r in records(run_dir("a"))]
    assert [(s, v["train/loss"]) for s, v in trackio.logged if "train/loss" in v] == expected

    first, second = board.writers
    assert first.folder == second.folder == str(run_dir("a") / FOLDER)
    assert (first.purge, second.purge) == (None, 2)
    assert first.scalars.pop() == second.scalars.pop() == "closed"
    losses = [(s, v) for name, v, s in first.scalars + second.scalars if name == "train/loss"]
    assert losses == expected
    [(name, text, _)] = first.texts
    settings = json.loads(text.removeprefix("<pre>").removesuffix("</pre>"))
    assert (name, settings["depth"], second.texts) == ("settings", 1, [])


def test_a_run_that_is_older_than_the_flag_writes_its_settings(fakes, tmp_path):
    for _ in range(2):
        start_trackers(Reports(tensorboard=True), tmp_path, {"depth": 1}, step=3)
    first, second = fakes[1].writers
    assert (first.purge, len(first.texts), second.texts) == (4, 1, [])


def test_tensorboard_takes_numbers_alone(fakes, tmp_path):
    [tracker] = start_trackers(Reports(tensorboard=True), tmp_path, {})
    values = {"a": 1, "b": 2.5, "c": "text", "d": None, "e": [1, 2], "f": True}
    tracker.log(values, 3)
    assert fakes[1].writers[0].scalars == [("a", 1, 3), ("b", 2.5, 3)]


def test_figures_within_a_figure_have_a_path(fakes, tmp_path):
    trackers = start_trackers(Reports(tensorboard=True), tmp_path, {})
    log = RunLog(tmp_path, 0, 1, trackers)
    log.metrics("core", 5, core=0.25, tasks={"arc": {"accuracy": 0.5, "examples": 4}})
    log.close()
    assert fakes[1].writers[0].scalars == [
        ("core/core", 0.25, 5),
        ("core/tasks/arc/accuracy", 0.5, 5),
        ("core/tasks/arc/examples", 4, 5),
        "closed",
    ]


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_what_is_missing_is_told_before_torch_loads(name, monkeypatch):
    """train.building loads torch and all else."""
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "nanofuse.train.building", None)
    with pytest.raises(
        UserError, match=rf"--{name} needs {name}; install it .*'.\[{name}\]', or give --no-{name}$"
    ):
        main([f"--{name}"])
    check_installed({})
    monkeypatch.delitem(sys.modules, name)
    found = ModuleSpec(name, None, is_package=True)  # a folder of that name, as wandb makes one
    monkeypatch.setattr("nanofuse.train.trackers.find_spec", {name: found}.get)
    with pytest.raises(UserError, match="install it"):
        check_installed({name: True})
    found.origin = "there"
    check_installed({name: True})


def test_a_run_goes_on_without_its_tracker(fakes, data_dir, work_dir, monkeypatch):
    main([*TINY, "--data", str(data_dir), "--run", "a", "--num-iterations", "2", "--tensorboard"])
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    more = ["--run", "a", "--resume", "--num-iterations", "3"]
    with pytest.raises(UserError, match="--tensorboard needs .*, or give --no-tensorboard$"):
        main(more)
    main([*more, "--no-tensorboard"])
    assert len(fakes[1].writers) == 1 and len(records(run_dir("a"))) == 3


def test_trackers_start_before_the_model_and_are_closed_where_it_fails(
    fakes, data_dir, work_dir, monkeypatch
):
    def assemble(*args, **kwargs):
        assert len(fakes[0].starts) == 1
        raise UserError("no such model")

    monkeypatch.setattr("nanofuse.train.building.assemble", assemble)
    with pytest.raises(UserError, match="no such model"):
        main([*TINY, "--data", str(data_dir), "--run", "a", "--trackio"])
    assert fakes[0].ends == 1 and not run_dir("a").exists()


@pytest.mark.parametrize("name", ["trackio", "tensorboard"])
def test_what_is_missing_or_does_not_start_is_one_line(name, tmp_path, monkeypatch):
    module = {"trackio": "trackio", "tensorboard": "torch.utils.tensorboard"}[name]
    reports = Reports(**{name: True})
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"--{name} needs {name}; install .* --no-{name}$"):
        start_trackers(reports, tmp_path, {})

    def fail(*args, **kwargs):
        raise OSError("no room\nand more")

    broken = types.SimpleNamespace(init=fail, SummaryWriter=fail)
    monkeypatch.setitem(sys.modules, module, broken)
    with pytest.raises(UserError, match=rf"--{name} does not start .OSError: no room.; give --no-"):
        start_trackers(reports, tmp_path, {})
    assert start_trackers(Reports(), tmp_path, {}) == []


def test_those_before_one_that_fails_are_closed(fakes, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="--tensorboard needs tensorboard"):
        start_trackers(Reports(trackio=True, tensorboard=True), tmp_path, {})
    assert fakes[0].ends == 1
