import json
from dataclasses import asdict, dataclass

import pytest

from nanofuse.bench.tune import CASES
from nanofuse.kernels.common import tuning
from nanofuse.kernels.common.tuning import Tile, forced, tuned

DEFAULT = Tile(rows=1, cols=2, warps=3, stages=4)


@pytest.fixture
def winners(tmp_path, monkeypatch):
    """A tuned.json of one GPU and one op."""
    path = tmp_path / "tuned.json"
    flat = {"config": {"rows": 64, "warps": 8}, "us": 1.0, "width": 1024, "cols": None}
    wide = {**flat, "cols": 1024}
    narrow = {**flat, "config": {"rows": 16, "warps": 4}, "width": 256, "cols": 256}
    path.write_text(json.dumps({"GPU A": {"op": [flat], "grows": [narrow, wide]}}))
    monkeypatch.setattr(tuning, "TUNED", path)
    forget()
    yield path
    forget()


def forget():
    tuning._winners.cache_clear()
    tuning._nearest.cache_clear()


def test_the_winner_of_a_gpu_replaces_what_it_names(winners):
    assert tuned("op", DEFAULT, gpu="GPU A") == Tile(rows=64, cols=2, warps=8, stages=4)


@pytest.mark.parametrize(("cols", "rows"), [(64, 16), (511, 16), (513, 64), (10**6, 64)])
def test_the_nearest_width_is_taken(winners, cols, rows):
    """256 and 1024 are equally near to 512."""
    assert tuned("grows", DEFAULT, cols, "GPU A").rows == rows
    assert tuned("op", DEFAULT, cols, "GPU A").rows == 64


def test_other_ops_other_gpus_and_no_file_get_the_default(winners):
    assert tuned("other", DEFAULT, gpu="GPU A") is DEFAULT
    assert tuned("op", DEFAULT, gpu="GPU B") is DEFAULT
    winners.unlink()
    forget()
    assert tuned("op", DEFAULT, gpu="GPU A") is DEFAULT


def test_forced_holds_within_its_context_only(winners):
    other = Tile(5, 6, 7)
    with pytest.raises(KeyError, match="x"), forced("op", other) as asked:
        assert tuned("op", DEFAULT, gpu="GPU A") is other
        assert tuned("op", DEFAULT, 7) is other and asked == [None, 7]
        raise KeyError("x")
    assert tuned("op", DEFAULT, gpu="GPU A").rows == 64


def test_an_entry_that_does_not_fit_its_config_is_an_error(winners):
    @dataclass(frozen=True)
    class Other:
        depth: int = 1

    with pytest.raises(TypeError):
        tuned("op", Other(), gpu="GPU A")


def test_committed_winners_are_candidates_of_the_tuner():
    """Renaming an op, or a field of its configuration, must not leave an unread or broken entry."""
    table = json.loads(tuning.TUNED.read_text())
    assert table
    for gpu, ops in table.items():
        assert set(ops) <= set(CASES), gpu
        for op, entries in ops.items():
            candidates = CASES[op][1]
            widths = [entry["width"] for entry in entries]
            assert widths == sorted(set(widths)), f"{gpu}: {op}"
            for entry in entries:
                found = tuned(op, candidates[0], entry["cols"], gpu)
                assert found in candidates, f"{gpu}: {op}"
                assert entry["config"] == asdict(found), f"{gpu}: {op}"
