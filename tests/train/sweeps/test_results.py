"""The table of a sweep whose runs shared GPUs, and BPB that is of other data; the rest is in
tests/train/test_sweep.py."""

from dataclasses import replace

import pytest

from nanofuse.train.data.corpus import ParquetCorpus
from nanofuse.train.data.digest import data_digest
from nanofuse.train.data.tokenizer import FILE_NAME
from nanofuse.train.errors import UserError
from nanofuse.train.run_folder import run_dir
from nanofuse.train.runlog import METRICS_FILE
from nanofuse.train.sweeps.definition import read_sweep
from nanofuse.train.sweeps.jobs import Note, note_path
from nanofuse.train.sweeps.results import gather, other_data, report
from tests.train.logs import write_run

FILE = "seeds = [1, 2]\n[grid]\nmatrix-lr = [0.25, 0.5, 0.75]\n"


@pytest.fixture
def made(tmp_path, monkeypatch):
    """made(corpus, shared, ms): a Sweep of six runs that have finished, by the name without the
    sweep's of those that shared a GPU, and milliseconds of a step, 10 by default."""
    monkeypatch.chdir(tmp_path)

    def make(corpus="it", shared=(), ms=None, **flags):
        path = tmp_path / "s.toml"
        path.write_text(FILE)
        sweep = read_sweep(path, flags, False)
        for item in sweep.items:
            name = item.run.partition(".")[2]
            write_run(run_dir(item.run), {0: 3.0, 9: 1.5}, (ms or {}).get(name, 10.0))
            facts = {"step": 9, "bpb": 1.5, "seconds": 1.0, "commit": None, "corpus": corpus}
            note = Note(settings=item.settings.flat(), shared=name in shared, **facts)
            note_path(tmp_path, item.run).write_text(note.model_dump_json())
        return sweep

    return make


def test_steps_of_shared_gpus_are_compared_with_nothing(made, tmp_path):
    """Of the second variant one run had a GPU to itself, of the third none."""
    shared = {"matrix-lr-0.5.2", "matrix-lr-0.75.1", "matrix-lr-0.75.2"}
    sweep = made(shared=shared, ms={"matrix-lr-0.5.1": 12.0, "matrix-lr-0.5.2": 30.0})
    results = gather(sweep, tmp_path)
    found = [(row.ms_per_step, row.slower, row.shared) for row in results.rows]
    assert found == [(10.0, None, False), (12.0, pytest.approx(0.2), False), (10.0, None, True)]
    text = "\n".join(report(sweep, results))
    assert text.count("10.0 (shared)") == 1 and "several runs trained on one GPU" in text
    assert [row.difference.mean for row in results.rows[1:]] == [0.0, 0.0]


def test_a_shared_baseline_is_compared_with_nothing_either(made, tmp_path):
    results = gather(made(shared={"matrix-lr-0.25.1", "matrix-lr-0.25.2"}), tmp_path)
    assert [row.slower for row in results.rows] == [None, None, None]


@pytest.mark.parametrize("log", ["", "no record\n"])
def test_a_finished_run_without_its_log_is_named_with_the_way_out(made, tmp_path, log):
    sweep = made()
    path = run_dir(sweep.items[3].run) / METRICS_FILE
    path.write_text(log)
    with pytest.raises(UserError) as error:
        gather(sweep, tmp_path)
    text, note = str(error.value), note_path(tmp_path, sweep.items[3].run)
    assert text.startswith(str(path))
    assert text.endswith(f"; put a copy back, or delete {path.parent} and {note}")


def test_expectations_of_other_data_are_not_compared(made, tmp_path, data_dir, tokenizer):
    corpus = ParquetCorpus(data_dir)
    sweep = made(corpus.fingerprint, data=str(data_dir))
    expected, own = {"matrix-lr-0.5": {9: 1.5}}, data_digest(corpus, tokenizer.fingerprint)
    for seed in (1, 2):
        tokenizer.save(run_dir(f"s.matrix-lr-0.5.{seed}") / FILE_NAME)

    def line(digest):
        return other_data(replace(sweep, expected=expected, corpus=digest), tmp_path)

    assert line(None) is line(own) is None
    for other in ("9-" + own.partition("-")[2], own[:-1] + "x"):
        said = line(other)
        assert said.startswith("BPB is not compared with what s.toml expects: that is of corpus")
        assert other in said and "\n" not in said
    (data_dir / "shard_00000.parquet").write_bytes((data_dir / "shard_00001.parquet").read_bytes())
    assert "not compared" in line(data_digest(ParquetCorpus(data_dir), tokenizer.fingerprint))
