"""bench.report: summary, tables and plots from results in pytest-benchmark's format."""

import json
import sys

import pytest

from nanofuse.bench.report import main, summarize
from nanofuse.train.errors import UserError


def contender(backend, attention, ms, fp8="te"):
    return {
        "backend": backend,
        "attention": attention,
        "fp8": fp8,
        "ms_per_step": ms,
        "tok_per_s": 524288e3 / ms,
        "peak_gib": 40.0,
        "time_to_first_step_s": 9.0,
        "forward_ms": 0.3 * ms,
        "backward_ms": 0.6 * ms,
        "optimizer_ms": 0.1 * ms,
    }


def info(depth, *contenders, **fields):
    return {
        "device": "NVIDIA H200",
        "commit": None,
        "depth": depth,
        "contenders": list(contenders),
        "left_out": [],
        "allocation_retries": 0,
        "floor_ms": 500.0,
        **fields,
    }


def results(*infos):
    other = {"name": "bench_quantize", "extra_info": {"us": 1.0}}
    steps = [{"name": "bench_step", "extra_info": extra} for extra in infos]
    return {"datetime": "2026-11-23T01:02:03+00:00", "benchmarks": [other, *steps]}


PROFILE = {
    "depth": 16,
    "backend": "fused",
    "fp8": "te",
    "date": "2026-11-22",
    "classes": {"GEMM": {"ms": 70.0, "kernels": 99.0}, "gaps": {"ms": 1.5, "kernels": 0.0}},
}
D16 = info(
    16,
    contender("fused", "fa4", 1000.0) | {"joules_per_million_tokens": 1290.46},
    contender("compile", "fa4", 1500.0, "torch"),
    contender("compile", "flex", 1600.0, "torch"),
)
D4 = info(4, contender("fused", "fa4", 100.0), contender("compile", "flex", 250.0), commit="abc")


@pytest.fixture
def save(tmp_path):
    def write(document, name="steps.json"):
        path = tmp_path / name
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        return str(path)

    return write


def test_summary(save, tmp_path, capsys):
    main([save(results(D16, D4)), "--out", str(tmp_path / "out"), "--commit", "f00"])
    d4, d16 = json.loads((tmp_path / "out/summary.json").read_text())
    expected = {
        "depth": 16,
        "backend": "fused",
        "attention": "fa4",
        "fp8": "te",
        "ms_per_step": 1000.0,
        "tok_per_s": 524288.0,
        "baseline_ms_per_step": 1500.0,
        "baseline_attention": "fa4",
        "speedup": 1.5,
        "peak_gib": 40.0,
        "baseline_peak_gib": 40.0,
        "time_to_first_step_s": 9.0,
        "floor_share": 0.5,
        "gpu": "NVIDIA H200",
        "commit": "f00",
    }
    assert expected.items() <= d16.items()
    assert (d4["depth"], d4["speedup"], d4["commit"]) == (4, 2.5, "f00")
    assert summarize(D4)["commit"] == "abc"
    table = (tmp_path / "out/table.md").read_text()
    assert "| 16 | compile | flex | torch | 1600.0 | 480.0 | 960.0 | 160.0 | 327,680 |" in table
    assert "| 50% | 1290.5 |  |" in table and d16["joules_per_million_tokens"] == 1290.46
    assert "| – | 1.50 |" in table and d4["joules_per_million_tokens"] is None
    assert table in capsys.readouterr().out


def test_plots_and_breakdown(save, tmp_path):
    pytest.importorskip("matplotlib")
    files = [save(results(D16, D4)), save(PROFILE, "profile.json")]
    main([*files, "--out", str(tmp_path / "out")])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    plots = {"speedup.png", "floor.png", "breakdown.png", "step.svg"}
    assert names == {"table.md", "summary.json", *plots}
    assert (
        "| GEMM | 70.00 |\n| gaps | 1.50 |\n| sum | 71.50 |"
        in (tmp_path / "out/table.md").read_text()
    )


def test_without_matplotlib(save, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    main([save(results(D4)), "--out", str(tmp_path / "out")])
    assert "no plots: they need matplotlib" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"table.md", "summary.json"}


def test_default_folder_and_a_product_without_baseline(save, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    main([save(results(info(8, contender("fused", "te", 300.0))))])
    (summary,) = json.loads((tmp_path / "records/2026-11-23-step/summary.json").read_text())
    assert (summary["baseline_ms_per_step"], summary["speedup"]) == (None, None)


def test_what_crowded_or_is_missing_is_said(save, tmp_path, capsys):
    product = contender("fused", "fa4", 9.0) | {"facts": ["kernels: on: all; CUDA graphs: off"]}
    others = contender("compile", "flex", 12.0) | {"facts": ["attention: flex"]}
    crowded = info(20, product, others, left_out=["baseline auto is flex"], allocation_retries=3)
    main([save(results(crowded)), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "d20: baseline auto is flex" in said
    assert "d20: torch ran out of memory 3 times" in said
    assert "d20: fused without CUDA graphs" in said


@pytest.mark.parametrize(
    "document",
    [
        "not JSON",
        "[1]",
        "3",
        "{}",
        '{"benchmarks": 3}',
        results(),
        results(info(4)),
        results({**D4, "contenders": [{"backend": "fused"}]}),
        {"classes": {"GEMM": 1}},
    ],
)
def test_bad_files_are_named(save, tmp_path, document):
    path = save(document)
    with pytest.raises(UserError, match="steps.json") as caught:
        main([path, "--out", str(tmp_path / "out")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="absent.json: No such file"):
        main([str(tmp_path / "absent.json")])
