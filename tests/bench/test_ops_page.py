"""docs/ops.md is what the ops, the records and tuned.json say."""

import json
import re
from pathlib import Path

import pytest

from nanofuse.bench import ops_page
from nanofuse.bench.cases.ops import OPS, Call
from nanofuse.bench.cases.tiles import TUNED
from nanofuse.bench.ops_page import PAGE, Figure, figures, from_json, from_table, op_row, page

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_its_sources_say():
    text, there = page(), PAGE.read_text(encoding="utf-8")
    changed = [line for line in text.splitlines() if line not in there.splitlines()]
    assert there == text, f"run python -m bench.ops_page: {changed[:3]}"


def test_every_op_is_on_it():
    files = {path.stem for path in ROOT.glob("kernels/*.py")}
    assert sorted(op.name for op in OPS) == sorted(x for x in files if not x.endswith("_kernels"))


def test_tests_and_benches_name_their_op():
    for op in OPS:
        row = op_row(op)
        for path in re.findall(r"\(\.\./((?:tests|bench)/\S+)\)", row):
            assert op.name in (ROOT / path).read_text(encoding="utf-8"), f"{op.name}: {path}"


def test_every_case_of_the_tuner_and_every_recorded_op_is_on_it():
    calls = [call for op in OPS for call in op.calls]
    assert {call.tuned for call in calls} - {""} == set(TUNED)
    shown = {name for call in calls for name in call.names}
    left_out = {name for name, *_ in ops_page.recorded()} - shown
    assert all(
        name == "optimizer_step"
        or name.startswith(("token_table[all", "token_table[never", "bigram_table[torch.float32"))
        or name.startswith("newton_schulz[[(64, 1024, 1024), (")
        or name == "linear_relu_squared"  # before it was one of two passes
        for name in left_out
    ), left_out


def test_rows_of_both_kinds_of_records_are_read():
    table = (
        "| a | (1, 2) | 12.5 | 3 | 81 % |  |  | eager 2 |\n| b | x | 4.0 | 1 | 40 % | 9 | 106 % | |"
    )
    rows = [("a", 12.5, 0.81), ("b", 4.0, 1.06)]
    assert list(from_table(f"| op | shape | us |\n{table}\nceilings: 1")) == rows
    infos = [{"us": 12.5, "copy_share": 0.81}, {"us": 4.0, "copy_share": 0.4, "matmul_share": 1.06}]
    benches = [
        {"name": f"bench_{name}", "extra_info": info}
        for name, info in zip("ab", infos, strict=True)
    ]
    benches.append({"name": "bench_step", "extra_info": {"contenders": []}})
    assert list(from_json(json.dumps({"benchmarks": benches}))) == rows


def test_the_bench_goes_before_the_tuner_and_old_entries_are_read(monkeypatch, tmp_path):
    old = {"config": {}, "us": 7.0, "rows": 65536, "width": 1024}
    new = {**old, "us": 8.0, "width": 512, "share": 0.5}
    table = {"G": {"op": [old]}, "H": {"op": [new, old]}}
    (tmp_path / "tuned.json").write_text(json.dumps(table))
    monkeypatch.setattr(ops_page, "ROOT", tmp_path)
    monkeypatch.setattr(ops_page, "TUNED", "tuned.json")
    winners = ops_page.tuned()
    assert winners["op", "G", 1024].share is None and winners["op", "H", 512].share == 0.5
    measured = Figure("G", 1024, 6.0, 0.9, "records/x")
    found = figures(Call("", ("now", "then"), "op"), {("then", "G", 1024): measured}, winners)
    assert found == [measured, winners["op", "H", 512], winners["op", "H", 1024]]
    assert figures(Call("", ("other",)), {("then", "G", 1024): measured}, winners) == []


def test_a_file_that_is_gone_is_no_link():
    with pytest.raises(AssertionError, match="nowhere"):
        ops_page.linked("nowhere.py", "x")
