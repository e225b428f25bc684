"""Places of a sweep's runs, and how the end of a process is told."""

import sys

import pytest

from nanofuse.train.sweeps.jobs import Pool, environments, last_words


class Item:
    """A run whose command is Python's."""

    def __init__(self, run, code):
        self.run, self.code = run, code

    def command(self, resumed):
        return ["-c", self.code]


def test_every_gpu_has_one_run(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert environments(["3", "GPU-5"], 2) == [
        {"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "GPU-5"},
    ]  # fmt: skip
    assert environments(["0", "1"], 1) == [{"CUDA_VISIBLE_DEVICES": "0"}]
    assert (
        environments([], 3) == [{"OMP_NUM_THREADS": environments([], 3)[0]["OMP_NUM_THREADS"]}] * 3
    )


def test_places_are_taken_by_one_run_at_a_time(tmp_path):
    code = "import os; print('at', os.environ['PLACE']); {}"
    items = [Item("a", code.format("")), Item("b", code.format("os._exit(3)")),
             Item("c", code.format("os.kill(os.getpid(), 9)"))]  # fmt: skip
    with Pool(tmp_path, [{"PLACE": "0"}], [sys.executable]) as pool:
        ended = {item.run: outcome for item, outcome in pool.run([(i, False) for i in items])}
        assert pool.free == [{"PLACE": "0"}] and not pool.children
    assert {run: outcome.kind for run, outcome in ended.items()} == {
        "a": "finished", "b": "failed", "c": "failed",
    }  # fmt: skip
    assert ended["b"].text.startswith("exit code 3: ")
    assert ended["c"].text.startswith("killed by signal 9")
    assert (tmp_path / "a.txt").read_text() == "at 0\n"


@pytest.mark.parametrize(
    ("log", "words"),
    [("", "it said nothing"), ("x\nerror: no\nlast\n", "no"), ("x\nTraceback\n\n", "Traceback")],
)
def test_last_words_are_the_error(tmp_path, log, words):
    (tmp_path / "log").write_text(log)
    assert last_words(tmp_path / "log") == words
