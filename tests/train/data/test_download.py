"""The download command against a hub that lives in this process."""

import hashlib
import threading
import time
from types import SimpleNamespace

import pytest

from nanofuse.train.data import __main__ as data
from nanofuse.train.data import download
from nanofuse.train.errors import UserError


class FakeHub:
    """The two calls of huggingface_hub that download uses, with faults on demand.

    `faults[name]` lists what the next transfers of a shard do: "cut", "raise" or "flip".
    """

    def __init__(self, **faults):
        self.content = {
            download.shard_name(i): bytes([i % 251]) * (1000 + i % 7)
            for i in [*range(20), download.LAST_SHARD]
        }
        self.faults = {f"{name}.parquet": list(kinds) for name, kinds in faults.items()}
        self.transfers = []

    def HfApi(self):
        return self

    def get_paths_info(self, repo, paths, repo_type):
        assert repo == download.REPO and repo_type == "dataset"
        return [
            SimpleNamespace(
                path=p,
                size=len(self.content[p]),
                lfs=SimpleNamespace(sha256=hashlib.sha256(self.content[p]).hexdigest()),
            )
            for p in paths
            if p in self.content
        ]

    def hf_hub_download(self, repo, name, repo_type, local_dir):
        self.transfers.append(name)
        fault = self.faults[name].pop(0) if self.faults.get(name) else None
        if fault == "raise":
            raise ConnectionError("reset by peer")
        content = self.content[name]
        content = {"cut": content[:-1], "flip": b"x" + content[1:]}.get(fault, content)
        local_dir.mkdir(parents=True, exist_ok=True)
        (local_dir / name).write_bytes(content)
        return str(local_dir / name)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(download, "BACKOFF_SECONDS", 0)


def test_fetches_training_shards_and_the_validation_shard(tmp_path):
    hub = FakeHub()
    paths = download.download_shards(tmp_path / "new", 3, hub=hub)
    names = [download.shard_name(i) for i in (0, 1, 2, 6542)]
    assert [p.name for p in paths] == names
    assert [p.read_bytes() for p in paths] == [hub.content[n] for n in names]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == names  # nothing half-written


def test_faults_are_retried(tmp_path):
    hub = FakeHub(shard_00001=["cut", "raise", "flip"])
    paths = download.download_shards(tmp_path, 2, hub=hub)
    assert paths[1].read_bytes() == hub.content["shard_00001.parquet"]
    assert hub.transfers.count("shard_00001.parquet") == 4


@pytest.mark.parametrize("fault", ["cut", "raise", "flip"])
def test_a_shard_that_never_arrives_leaves_nothing(tmp_path, fault):
    hub = FakeHub(shard_00000=[fault] * 99)
    with pytest.raises(UserError, match="shard_00000.parquet did not arrive after 5 attempts"):
        download.download_shards(tmp_path, 1, hub=hub)
    assert not (tmp_path / "shard_00000.parquet").exists()


def test_whole_shards_are_kept_and_damaged_ones_replaced(tmp_path):
    hub = FakeHub()
    download.download_shards(tmp_path, 2, hub=hub)
    hub.transfers.clear()
    (tmp_path / "shard_00001.parquet").write_bytes(b"cut short")
    download.download_shards(tmp_path, 2, hub=hub)
    assert hub.transfers == ["shard_00001.parquet"]


def test_unreachable_hub_and_missing_shards(tmp_path):
    class Unreachable(FakeHub):
        def get_paths_info(self, *args, **kwargs):
            raise ConnectionError("no route")

    with pytest.raises(UserError, match="hub cannot be reached"):
        download.download_shards(tmp_path, 1, hub=Unreachable())
    with pytest.raises(UserError, match="has no shard_00020.parquet"):
        download.download_shards(tmp_path, 21, hub=FakeHub())


def test_a_failure_waits_for_no_other_shard(tmp_path):
    """Nor does a signal, which comes where the failure does."""
    release, hub = threading.Event(), FakeHub(shard_00000=["raise"] * 99)
    fetch = hub.hf_hub_download

    def slow(repo, name, **kwargs):
        if name != "shard_00000.parquet":
            release.wait(60)
        return fetch(repo, name, **kwargs)

    hub.hf_hub_download = slow
    began = time.monotonic()
    with pytest.raises(UserError, match="shard_00000.parquet did not arrive"):
        download.download_shards(tmp_path, 9, workers=2, hub=hub)
    assert time.monotonic() - began < 30
    release.set()
    assert len(set(hub.transfers)) <= 2  # what had begun


def test_a_hub_that_does_not_answer(tmp_path, monkeypatch):
    release, hub = threading.Event(), FakeHub()
    hub.get_paths_info = lambda *args, **kwargs: release.wait(60)
    monkeypatch.setattr(download, "ANSWER_SECONDS", 0.2)
    with pytest.raises(UserError, match=r"does not answer within 0\.2 s"):
        download.download_shards(tmp_path / "new", 1, hub=hub)
    release.set()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("entry", [{"size": None}, {"size": "big"}, {"size": -5}, {}])
def test_what_the_hub_lists_without_a_size(tmp_path, entry):
    """As it does a folder."""
    hub = FakeHub()
    hub.get_paths_info = lambda repo, paths, repo_type: [
        SimpleNamespace(path=path, **entry) for path in paths
    ]
    with pytest.raises(UserError, match="has no size for shard_00000.parquet; try again later"):
        download.download_shards(tmp_path, 1, hub=hub)


def test_a_hub_that_refuses_was_reached(tmp_path):
    class Refused(Exception):
        response = "401"

    def refuse(*args, **kwargs):
        raise Refused("401 Unauthorized")

    hub = FakeHub()
    hub.get_paths_info = refuse
    with pytest.raises(UserError, match=r"the hub refuses \(401 Unauthorized\)"):
        download.download_shards(tmp_path, 1, hub=hub)


def test_a_folder_that_cannot_be_one_is_told_before_the_hub_is_asked(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="file is not a folder; move it away, or name another"):
            download.download_shards(path, 1, hub=SimpleNamespace())


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("-n", "0", "-n 0 must be at least 1"),
        ("-n", "-3", "-n -3 must be at least 1"),
        ("-n", "6543", "-n 6543 must be at most 6,542"),
        ("-n", str(2**63), "must be at most 6,542"),
        ("--workers", "0", "--workers 0 must be at least 1"),
        ("--workers", "-3", "--workers -3 must be at least 1"),
        ("--workers", str(2**63), "must be at most 64"),
    ],
)
def test_command_checks_its_numbers(tmp_path, monkeypatch, flag, value, message):
    """Before the network is asked or a folder is made."""
    monkeypatch.setattr(data, "download_shards", None)
    with pytest.raises(UserError, match=message):
        data.main(["download", f"{flag}={value}", "--data", str(tmp_path / "new")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["two", "nan", "1e3", "", "1.5"])
@pytest.mark.parametrize("flag", ["-n", "--workers"])
def test_what_is_no_whole_number_ends_in_one_line(flag, value, capsys):
    with pytest.raises(SystemExit) as stop:
        data.main(["download", f"{flag}={value}"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and flag in err
