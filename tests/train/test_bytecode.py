"""Compiled modules where a library has none: kept, found, and nothing done where Python does it."""

import os
import py_compile
import subprocess
import sys

import pytest

from nanofuse.train import bytecode

NAME = "library_of_the_tests"


@pytest.fixture
def library(tmp_path, monkeypatch):
    """The source file of a library that can be found, in a folder of its own; nothing is changed
    for other tests."""
    for name in ("pycache_prefix", "dont_write_bytecode"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    monkeypatch.setattr(sys, "pycache_prefix", None)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", "")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("NANOFUSE_DIR", str(tmp_path / "user"))
    source = tmp_path / "site" / NAME / "__init__.py"
    source.parent.mkdir(parents=True)
    source.write_text("VALUE = 3")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return source


def test_modules_are_kept_for_the_processes_that_follow(library, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    folder = tmp_path / "user" / "bytecode"
    assert bytecode.keep_bytecode(NAME) == (
        f"python: {NAME} came without compiled modules; those are kept in {folder}"
    )
    assert sys.pycache_prefix == str(folder) and not sys.dont_write_bytecode
    assert not bytecode.is_kept(str(library))
    env = {**os.environ, "PYTHONPATH": str(library.parents[1])}
    subprocess.run([sys.executable, "-c", f"import {NAME}"], env=env, check=True)
    assert bytecode.is_kept(str(library)) and not (library.parent / "__pycache__").exists()
    assert bytecode.keep_bytecode(NAME) is None  # a place was named


def test_nothing_is_done_where_python_keeps_them(library, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert bytecode.keep_bytecode(NAME) is None  # it will be, beside it
    monkeypatch.setattr(bytecode, "is_writable", lambda folder: False)
    assert bytecode.keep_bytecode(NAME) is None  # nowhere to keep it
    assert bytecode.keep_bytecode("no_such_library_of_the_tests") is None
    assert bytecode.keep_bytecode("sys") is None


def test_what_is_there_is_taken_unless_it_is_older(library, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    mode = py_compile.PycInvalidationMode
    py_compile.compile(str(library), invalidation_mode=mode.TIMESTAMP)
    assert bytecode.keep_bytecode(NAME) is None
    os.utime(library, (1, 1))
    assert not bytecode.is_kept(str(library))
    py_compile.compile(str(library), invalidation_mode=mode.UNCHECKED_HASH)
    os.utime(library, (2, 2))
    assert bytecode.is_kept(str(library))
    cached = next((library.parent / "__pycache__").iterdir())
    cached.write_bytes(cached.read_bytes()[:9])
    assert not bytecode.is_kept(str(library))
    cached.write_bytes(b"XXXX" + bytes(12))
    assert not bytecode.is_kept(str(library))
    assert bytecode.keep_bytecode(NAME)


def test_a_folder_that_is_to_be_made(tmp_path, monkeypatch):
    assert bytecode.is_writable(tmp_path / "a" / "b")
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    assert not bytecode.is_writable(tmp_path / "a" / "b")


def test_a_user_without_a_folder_keeps_nothing(library, tmp_path, monkeypatch):
    """A start goes on where the folder above may not be read, or there is no home."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("NANOFUSE_DIR", str(tmp_path / ("x" * 300)))  # root may read all others
    assert bytecode.keep_bytecode(NAME) is None
    monkeypatch.delenv("NANOFUSE_DIR")

    def homeless(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.expanduser", homeless)
    assert bytecode.keep_bytecode(NAME) is None
