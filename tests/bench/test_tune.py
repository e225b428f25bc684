"""bench.tune without its GPU: its widths, and how entries come together."""

import json
from types import SimpleNamespace

import pytest

from nanofuse.bench import tune as module
from nanofuse.bench.tune import merged, parse_widths, read_table
from nanofuse.train.errors import UserError


def entry(width, us, cols=1):
    return {"width": width, "us": us, "cols": cols}


def test_widths():
    assert parse_widths("512,256,512") == [256, 512]
    for text in ("0", "200", "256,", "x", "9" * 5000):
        with pytest.raises(UserError, match="--widths"):
            parse_widths(text)


def test_other_widths_stay():
    old = [entry(256, 1.0), entry(1024, 2.0)]
    assert merged(old, [entry(1024, 3.0), entry(512, 4.0)]) == [
        entry(256, 1.0), entry(512, 4.0), entry(1024, 3.0)
    ]  # fmt: skip
    assert merged([entry(256, 2.0)], [entry(1024, 1.0, None)]) == [entry(1024, 1.0, None)]
    assert merged([entry(1024, 2.0, None)], [entry(256, 1.0)]) == [entry(256, 1.0)]


def test_a_file_that_is_no_table_is_refused_before_anything_is_timed(tmp_path):
    path = tmp_path / "tuned.json"
    assert read_table(path) == {}
    for table in ({}, {"GPU": {}}, {"GPU": {"op": [entry(256, 1.0)]}}):
        path.write_text(json.dumps(table))
        assert read_table(path) == table
    for op in (entry(256, 1.0), [{"us": 1.0}], 3):  # the first as up to 2026-11-28
        path.write_text(json.dumps({"GPU": {"op": op}}))
        with pytest.raises(UserError, match="--out .* is no table of bench.tune; move it away"):
            read_table(path)
    for table in ([], {"GPU": []}):
        path.write_text(json.dumps(table))
        with pytest.raises(UserError, match="--out .* is no table of bench.tune; move it away"):
            read_table(path)
    path.write_text("{")
    with pytest.raises(UserError, match="--out .* is no JSON"):
        read_table(path)


@pytest.mark.parametrize("asks", [True, False])
def test_an_op_that_another_kernel_does_here_has_no_entry(asks, monkeypatch):
    """As a panel's at widths that no panel takes: its configuration is never asked for."""
    tile = module.tuning.Tile(1, 2, 3)

    def run():
        if asks:
            module.tuning.tuned("op", None, 1536)

    def make(rows, device):
        return SimpleNamespace(run=run, share=lambda seconds: 0.5)

    monkeypatch.setitem(module.CASES, "op", (make, [tile]))
    monkeypatch.setattr(module.CLOCK, "timed", lambda call: call() or 1e-6)
    entry = module.tune("op", 1536)
    assert entry is None if not asks else (entry["cols"], entry["us"]) == (1536, 1.0)


def test_the_closest_take_turns(monkeypatch):
    """What a drift of the clocks made the fastest at a glance does not win by that, nor is one lost
    whose first call was late."""
    tiles = [module.tuning.Tile(rows, 2, 3) for rows in (1, 2, 3)]
    times, asked = {1: [9.0, 1.05, 1.05, 1.05, 1.05], 2: [1.0] * 5, 3: [1.5] * 5}, []
    in_turns = {1: 1.0, 2: 1.02}

    def timed(call):
        call()
        return times[asked[-1]].pop(0) if times[asked[-1]] else in_turns[asked[-1]]

    case = SimpleNamespace(
        run=lambda: asked.append(module.tuning.tuned("op", None, 1536).rows),
        share=lambda seconds: 0.5,
    )
    monkeypatch.setitem(module.CASES, "op", (lambda rows, device: case, tiles))
    monkeypatch.setattr(module.CLOCK, "timed", timed)
    entry = module.tune("op", 1536)
    assert entry["config"]["rows"] == 1 and entry["us"] == 1e6
    # a glance of six calls each, then two each in turns
    assert asked[:18] == [1] * 6 + [2] * 6 + [3] * 6
    assert asked[18:26] == [2, 2, 1, 1, 1, 1, 2, 2] and 3 not in asked[18:]


def test_what_is_timed_is_kept_when_the_next_op_ends_it(monkeypatch, tmp_path):
    def tune(op, width):
        if op == "second":
            raise KeyboardInterrupt
        return entry(width, 1.0)

    monkeypatch.setattr(module, "tune", tune)
    monkeypatch.setattr(module.tuning, "gpu_name", lambda: "GPU")
    path, grows = tmp_path / "tuned.json", {"first": True, "second": False}
    with pytest.raises(KeyboardInterrupt):
        module.time_candidates(["first", "second"], [256, 512], grows, {"other": {}}, path)
    kept = json.loads(path.read_text())
    assert kept == {"other": {}, "GPU": {"first": [entry(256, 1.0), entry(512, 1.0)]}}
