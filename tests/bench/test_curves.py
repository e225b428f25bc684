"""bench.curves on runs written by hand."""

import json

import pytest

from nanofuse.bench.curves import gaps, main, plot, read_run
from nanofuse.train.errors import UserError


def write_run(folder, bpbs, ms=10.0):
    folder.mkdir()
    records = [{"kind": "val", "step": step, "bpb": bpb} for step, bpb in bpbs.items()]
    times = (900.0, ms, ms + 1, ms + 2)  # the first window compiles
    records += [
        {"kind": "train", "step": i, "loss": 3.0 - i, "ms_per_step": t} for i, t in enumerate(times)
    ]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text)
    return str(folder)


def test_table_json_and_difference(tmp_path, capsys):
    a = write_run(tmp_path / "fused", {0: 3.2, 100: 1.5, 200: 1.25})
    b = write_run(tmp_path / "compiled", {0: 3.2, 100: 1.501, 300: 1.2}, ms=20.0)
    main([a, b, "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == ("| fused | 3.200000 | 1.500000 | 1.250000 | – | +0.000000 | 11.0 |")
    assert lines[3] == ("| compiled | 3.200000 | 1.501000 | – | 1.200000 | +0.001000 | 21.0 |")
    saved = json.loads((tmp_path / "out" / "curves.json").read_text())
    assert [run["name"] for run in saved] == ["fused", "compiled"]
    assert (tmp_path / "out" / "curves.md").read_text().splitlines() == lines[:4]


def test_gaps_are_at_common_steps(tmp_path):
    a = read_run(write_run(tmp_path / "a", {0: 3.0, 100: 1.5, 200: 1.25}))
    b = read_run(write_run(tmp_path / "b", {100: 1.25, 0: 3.5, 300: 1.0}))
    assert gaps(b, a) == {0: 0.5, 100: -0.25} and list(gaps(b, a)) == [0, 100]


def test_bad_runs_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere/metrics.jsonl is missing or damaged"):
        main([str(tmp_path / "nowhere")])
    damaged = write_run(tmp_path / "damaged", {0: 1.0})
    (tmp_path / "damaged" / "metrics.jsonl").write_text('{"kind": "val"}\n')
    with pytest.raises(UserError, match="damaged"):
        main([damaged])
    with pytest.raises(UserError, match="no evaluation"):
        main([write_run(tmp_path / "blind", {})])


def test_the_plot_has_a_panel_of_differences(tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    runs = [
        read_run(write_run(tmp_path / name, bpbs))
        for name, bpbs in (("a", {0: 3.0, 100: 1.5}), ("b", {0: 3.5, 100: 1.25}))
    ]
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure.Figure, "savefig", lambda self, path, dpi: drawn.append(self))
        assert plot(runs, tmp_path / "curves.png")
    bpb, difference, loss = drawn[0].axes
    assert [list(line.get_ydata()) for line in bpb.lines] == [[3.0, 1.5], [3.5, 1.25]]
    assert [list(line.get_ydata()) for line in difference.lines] == [[0.0, 0.0], [0.5, -0.25]]
    assert difference.get_ylabel() == "validation BPB, minus a" and len(loss.lines) == 2
