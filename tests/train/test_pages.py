"""Freed memory stays: large blocks that come and go cost the system no new pages."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from nanofuse.train import pages

ROOT = Path(__file__).parents[2]
PROGRAM = """
import resource, sys
from nanofuse.train.pages import keep_pages
assert "torch" not in sys.modules
if sys.argv[1] == "keep":
    assert keep_pages()
size = 64 << 20
for turn in range(5):
    if turn == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(size)
    block[::4096] = bytes(size // 4096)
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_blocks_that_come_and_go_take_no_new_pages():
    def faults(how):
        command = [sys.executable, "-c", PROGRAM, how]
        out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        return int(out.stdout)

    assert 20 * faults("keep") < faults("leave")


def test_another_c_library_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(pages.ctypes, "CDLL", lambda name: object())
    assert not pages.keep_pages()
