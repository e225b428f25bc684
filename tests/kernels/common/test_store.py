import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanofuse.kernels.common.store import Store, user_folder


def test_entries_are_found_again_and_sections_stay_apart(tmp_path):
    path = tmp_path / "new" / "file.json"
    here, there = Store(path, "GPU A, library 1"), Store(path, "GPU B, library 1")
    assert here.entries() == {}
    assert here.add({"a": 1, "b": [2.5, None]}) is None and there.add({"a": 3}) is None
    assert here.add({"b": 4}) is None
    assert Store(path, "GPU A, library 1").entries() == {"a": 1, "b": 4}
    assert Store(path, "GPU B, library 1").entries() == {"a": 3}
    assert Store(path, "GPU A, library 2").entries() == {}
    assert [each.name for each in path.parent.iterdir()] == ["file.json"]


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"s": 5}', '{"s": null}', "\udc80"])
def test_a_damaged_file_is_as_none_and_is_written_anew(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert Store(path, "s").entries() == {}
    assert Store(path, "s").add({"k": 1}) is None
    assert Store(path, "s").entries() == {"k": 1}


def test_what_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    why = Store(tmp_path / "file" / "x.json", "s").add({"k": 1})
    assert why == f"File exists: {tmp_path / 'file' / 'x.json'}"
    (tmp_path / "folder.json").mkdir()
    assert Store(tmp_path / "folder.json", "s").entries() == {}
    assert Store(tmp_path / "folder.json", "s").add({"k": 1})
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder.json"]
    assert (Store(None, "s").add({"k": 1}), Store(None, "s").entries()) == ("no file", {})


def test_readers_beside_writers_see_whole_files(tmp_path):
    path = tmp_path / "file.json"
    Store(path, "s").add({"first": 0})

    def write(number):
        for step in range(25):
            assert Store(path, "s").add({f"{number}-{step}": "x" * 2000}) is None

    def read(_):
        return [json.loads(path.read_text())["s"]["first"] for _ in range(100)]

    with ThreadPoolExecutor(6) as pool:
        writing, reading = [pool.submit(write, i) for i in range(3)], list(map(read, range(3)))
        for each in writing:
            each.result()
    assert reading == [[0] * 100] * 3


def test_the_folder_is_that_of_the_data_and_needs_no_torch(monkeypatch):
    monkeypatch.setenv("NANOFUSE_DIR", "/somewhere")
    assert user_folder() == Path("/somewhere")
    monkeypatch.setenv("NANOFUSE_DIR", "")
    assert user_folder() == Path("~/.cache/nanofuse").expanduser()
    code = "import sys, nanofuse.kernels.common.store; print('torch' in sys.modules)"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "False\n"
