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
    shared = [place["CUDA_VISIBLE_DEVICES"] for place in environments(["0", "1"], 5, 3)]
    assert shared == ["0", "1", "0", "1", "0"]  # every GPU one, before one gets two
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


def test_a_run_goes_where_the_fewest_are(tmp_path):
    """a and b start on 0 and 1, c and d beside them. b and d end, both on 1; so e goes to 1, and f,
    which has a choice between a second place on 1 and none on 0, too."""
    ending = "import pathlib, time\nwhile not pathlib.Path('{}').exists(): time.sleep(0.01)"
    path = tmp_path / "end"
    items = {name: Item(name, ending.format(path / name)) for name in "abcdef"}
    path.mkdir()
    (tmp_path / "a.shared").touch()  # of an earlier try, which left nothing to go on with
    places = environments(["0", "1"], 4, 2)

    def at(name):
        [place] = [c.place["CUDA_VISIBLE_DEVICES"] for c in pool.children if c.item.run == name]
        return place

    with Pool(tmp_path, places, [sys.executable]) as pool:
        pool.start(items["a"], False)
        pool.start(items["b"], False)
        assert not list(tmp_path.glob("*.shared")) and (at("a"), at("b")) == ("0", "1")
        pool.start(items["c"], False)
        assert {p.stem for p in tmp_path.glob("*.shared")} == {"a", "c"}
        pool.start(items["d"], False)
        assert (at("c"), at("d")) == ("0", "1") and not pool.free
        for name in "bd":
            (path / name).touch()
        ended = pool.run([])
        assert {next(ended)[0].run, next(ended)[0].run} == {"b", "d"}
        pool.start(items["e"], False)
        pool.start(items["f"], False)
        assert (at("e"), at("f")) == ("1", "1")
        for name in "acef":
            (path / name).touch()
        assert {item.run for item, _ in ended} == set("acef")
        assert len(pool.free) == 4


def test_a_cpu_is_shared_by_threads_not_in_turns(tmp_path):
    with Pool(tmp_path, environments([], 2), [sys.executable]) as pool:
        list(pool.run([(Item(name, ""), False) for name in "ab"]))
    assert not list(tmp_path.glob("*.shared"))


@pytest.mark.parametrize(
    ("log", "words"),
    [("", "it said nothing"), ("x\nerror: no\nlast\n", "no"), ("x\nTraceback\n\n", "Traceback")],
)
def test_last_words_are_the_error(tmp_path, log, words):
    (tmp_path / "log").write_text(log)
    assert last_words(tmp_path / "log") == words
