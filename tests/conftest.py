"""Tokenizer, corpus and directories shared by the tests; GPU tests skip without a GPU."""

import fcntl
import os
import signal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanofuse.kernels import newton_schulz
from nanofuse.train.data.tokenizer import FILE_NAME, Tokenizer
from tests.helpers import documents
from tests.interpreter import interpreter_casts_exactly

for name, usual in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    # a shell's background job or nohup ignores them, and so would the runs that tests interrupt
    if signal.getsignal(number := getattr(signal, name, signal.SIGTERM)) is signal.SIG_IGN:
        signal.signal(number, usual)
torch.set_num_threads(1)  # tensors on the CPU are tiny here; threads would wait for each other


@pytest.fixture(scope="session")
def tokenizer():
    """A tokenizer of 320 tokens."""
    return Tokenizer.train(documents(200), 320)


@pytest.fixture
def data_dir(tmp_path, tokenizer):
    """Folder of three parquet shards with a tokenizer; the last shard validates."""
    return write_data(tmp_path / "data", tokenizer)


def write_data(directory, tokenizer):
    directory.mkdir()
    for index, count in enumerate((90, 70, 60)):
        table = pa.table({"text": documents(count, seed=index + 1)})
        pq.write_table(table, directory / f"shard_{index:05d}.parquet", row_group_size=25)
    tokenizer.save(directory / FILE_NAME)
    return directory


@pytest.fixture
def work_dir(tmp_path, monkeypatch):
    """An empty current directory, with no data directory of the user's in sight."""
    directory = tmp_path / "work"
    directory.mkdir()
    monkeypatch.chdir(directory)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NANOFUSE_DIR", raising=False)
    return directory


@pytest.fixture
def short_muon(monkeypatch):
    """One step of Muon's iteration in place of five, where the test is not about it: of a fused
    step in the interpreter, it is most of the time."""
    segments = (newton_schulz.POLAR_EXPRESS[:1],)
    monkeypatch.setattr(newton_schulz, "_segments", lambda shape, gram: segments)


@pytest.fixture(autouse=True)
def exact_fp32_products():
    """Assembling a run allows TF32 in this process (train/assemble.py); the next test must not."""
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="session", autouse=True)
def exact_casts():
    with interpreter_casts_exactly():
        yield


@pytest.fixture(autouse=True)
def gpu_to_oneself(request, tmp_path_factory):
    """Tests on a GPU leave no memory in PyTorch's cache, and `large` ones wait for each other."""
    if "large" not in request.keywords:
        yield
        if "cuda" in request.keywords:
            torch.cuda.empty_cache()
        return
    # processes of one pytest-xdist have one folder above those of their own
    above = "PYTEST_XDIST_WORKER" in os.environ
    base = tmp_path_factory.getbasetemp()
    with open((base.parent if above else base) / "large.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


def pytest_collection_modifyitems(items):
    """Tests marked `cuda` skip with a reason where there is no GPU, those marked `cpu` where
    there is one."""
    on_gpu = torch.cuda.is_available()
    mark, reason = ("cpu", "there is a GPU: run with CUDA_VISIBLE_DEVICES= -m cpu") if on_gpu else (
        "cuda", "needs a CUDA GPU")  # fmt: skip
    for item in items:
        if mark in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))
