import errno
import os

import pytest

from nanofuse.train.errors import UserError
from nanofuse.train.files import (
    atomic_folder,
    make_folder,
    native,
    portable,
    remove_leftovers,
    way_out,
    write_text_atomically,
)


@pytest.mark.parametrize("below", ["", "a", "a/b"])
def test_what_is_in_the_way_of_a_folder_is_named(tmp_path, below):
    make_folder(tmp_path / "made" / below)
    make_folder(tmp_path / "made" / below)
    assert (tmp_path / "made" / below).is_dir()
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to("absent")
    for name in ("file", "link"):
        with pytest.raises(UserError, match=f"{name} is not a folder; move it away$"):
            make_folder(tmp_path / name / below)
    assert (tmp_path / "file").read_text() == "kept" and (tmp_path / "link").is_symlink()


def test_text_replaces_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.json"
    write_text_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(path, "\ud800")
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_folder_appears_only_when_complete(tmp_path):
    target = tmp_path / "step"
    with pytest.raises(RuntimeError), atomic_folder(target) as temporary:
        (temporary / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for content in ("first", "second"):
        with atomic_folder(target) as temporary:
            (temporary / "file").write_text(content)
            assert content == "first" or (target / "file").read_text() == "first"
    assert (target / "file").read_text() == "second" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_are_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_text_atomically(tmp_path / "file", "x")
        with atomic_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~mask


def test_only_leftovers_are_removed(tmp_path):
    ours = (".step_000004.k3j2h1g0", ".step_1000000.00ff00ff", ".metrics.jsonl.hx81hdcz",
            ".tokenizer.json.0123abcd")  # fmt: skip
    mine = (".step_notes.txt", ".git", ".step_000004.backup-of-mine", "step_000004.k3j2h1g0",
            ".step_000004", ".lock", ".step_000004.original", ".step_000004.20261130")  # fmt: skip
    for name in (*ours[:2], *mine):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"x")
    for name in ours[2:]:
        (tmp_path / name).write_text("x")
    (tmp_path / "step_000004").mkdir()
    (tmp_path / "step_000004" / ".meta.json.0123456a").write_text("half")
    assert remove_leftovers(tmp_path) == len(ours) + 1
    (tmp_path / "step_000004").rmdir()
    assert {path.name for path in tmp_path.iterdir()} == set(mine)


def test_a_leftover_that_stays_ends_nothing(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "step_000001") as temporary:
        name = temporary.name
        raise RuntimeError
    (tmp_path / name).mkdir()

    def refuse(*args, **options):
        raise PermissionError("rmdir")

    monkeypatch.setattr(os, "rmdir", refuse)
    assert remove_leftovers(tmp_path) == 1 and (tmp_path / name).is_dir()


def test_names_of_files_travel_between_locales():
    for name in ("data", "δεδομένα"):
        assert native(portable(name)) == name
    assert portable(os.fsdecode(b"a\xff")) == "a\ufffd" and portable(7) == native(7) == 7


def test_an_error_names_what_was_to_be_written(tmp_path, monkeypatch):
    """Not the temporary name beside it, nor what the disk was full with."""

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError) as error, atomic_folder(tmp_path / ("a" * 254)):
        pass
    assert error.value.filename == str(tmp_path / ("a" * 254))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as error:
        write_text_atomically(tmp_path / "file", "x")
    assert error.value.filename == str(tmp_path / "file") and not list(tmp_path.iterdir())


def test_the_way_out_of_a_damaged_checkpoint_is_one_that_is_there(tmp_path):
    """The only checkpoint, or the first one, is not to be deleted for the one before it."""
    for step in (999999, 1000000):
        (tmp_path / f"step_{step}").mkdir()
    assert way_out(tmp_path / "step_1000000").startswith("delete")
    assert way_out(tmp_path / "step_999999").startswith("no checkpoint is before it")
