"""Words about room on a disk, and saves that it does not have."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from nanofuse.train import disk
from nanofuse.train.disk import (
    FILE_OVERHEAD,
    SaveError,
    check_room,
    free_bytes,
    in_units,
    naming_save_errors,
    reason_of,
    room,
    size_of,
)


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (2**20, "1.0 MiB"),
        (5 * 2**30, "5.0 GiB"),
        (3 * 2**40, "3.0 TiB"),
        (2**50, "1024.0 TiB"),
    ],
)
def test_numbers_for_people(count, words):
    assert in_units(count) == words


def test_the_size_of_a_checkpoint():
    model = {"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.bfloat16)}
    assert size_of(model, None, {"c": torch.zeros(2, dtype=torch.int64)}) == 90 + FILE_OVERHEAD


def test_room_is_that_of_the_nearest_folder(tmp_path, monkeypatch):
    asked = []

    def usage(path):
        asked.append(Path(path))
        if not Path(path).exists():
            raise FileNotFoundError(path)
        return SimpleNamespace(total=total, free=5000)

    monkeypatch.setattr(disk.shutil, "disk_usage", usage)
    total = 9000
    assert free_bytes(tmp_path / "a" / "b") == 5000 and asked[-1] == tmp_path
    total = 0  # some file systems of a network do not tell
    assert free_bytes(tmp_path) is None
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: open("/nowhere/at/all"))
    assert free_bytes(tmp_path) is None


def test_what_is_missing_is_said(monkeypatch):
    free = 2048
    monkeypatch.setattr(disk, "free_bytes", lambda path: free)
    assert room(2048, "runs") == "checkpoint: 2.0 KiB each; 2.0 KiB free in runs"
    words = "checkpoint: 3.0 KiB each; 2.0 KiB free in runs; warning: it does not fit, 1,024 bytes"
    assert room(3072, "runs") == f"{words} are missing"
    check_room("a", 2048)
    message = "a cannot be saved: the disk is full; it takes 3,072 bytes and 2,048 are free, 1,024"
    with pytest.raises(SaveError, match=f"^{message} bytes are missing$"):
        check_room("a", 3072)
    free = None
    assert room(3072, "runs") == "checkpoint: 3.0 KiB each"
    check_room("a", 3072)


def test_errors_of_the_system_and_of_the_library_are_one_line(monkeypatch):
    full, words = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), os.strerror(errno.ENOSPC)
    assert reason_of(full) == words
    assert reason_of(SafetensorError(f"Error: IoError (os error {errno.ENOSPC})")) == words
    assert reason_of(OSError("first\nsecond")) == "first"
    for free, end in ((None, "bytes"), (9, "bytes and 9 are free"), (6, "1 bytes are missing")):
        monkeypatch.setattr(disk, "free_bytes", lambda path, free=free: free)
        with pytest.raises(SaveError, match=f"^a cannot be saved: {words}; it takes 7 .*{end}$"):
            with naming_save_errors("a", 7):
                raise full
