import json
from dataclasses import dataclass

import pytest

from nanofuse.bench.tune import CASES
from nanofuse.kernels.common import tuning
from nanofuse.kernels.common.tuning import Tile, forced, tuned

DEFAULT = Tile(rows=1, cols=2, warps=3, stages=4)


@pytest.fixture
def winners(tmp_path, monkeypatch):
    """A tuned.json of one GPU and one op."""
    path = tmp_path / "tuned.json"
    entry = {"config": {"rows": 64, "warps": 8}, "us": 1.0}
    path.write_text(json.dumps({"GPU A": {"op": entry}}))
    monkeypatch.setattr(tuning, "TUNED", path)
    tuning._winners.cache_clear()
    yield path
    tuning._winners.cache_clear()


def test_the_winner_of_a_gpu_replaces_what_it_names(winners):
    assert tuned("op", DEFAULT, "GPU A") == Tile(rows=64, cols=2, warps=8, stages=4)


def test_other_ops_other_gpus_and_no_file_get_the_default(winners):
    assert tuned("other", DEFAULT, "GPU A") is DEFAULT
    assert tuned("op", DEFAULT, "GPU B") is DEFAULT
    winners.unlink()
    tuning._winners.cache_clear()
    assert tuned("op", DEFAULT, "GPU A") is DEFAULT


def test_forced_holds_within_its_context_only(winners):
    other = Tile(5, 6, 7)
    with pytest.raises(KeyError, match="x"), forced("op", other):
        assert tuned("op", DEFAULT, "GPU A") is other
        raise KeyError("x")
    assert tuned("op", DEFAULT, "GPU A").rows == 64


def test_an_entry_that_does_not_fit_its_config_is_an_error(winners):
    @dataclass(frozen=True)
    class Other:
        depth: int = 1

    with pytest.raises(TypeError):
        tuned("op", Other(), "GPU A")


def test_committed_winners_are_candidates_of_the_tuner():
    """Renaming an op, or a field of its configuration, must not leave an unread or broken entry."""
    table = json.loads(tuning.TUNED.read_text())
    assert table
    for gpu, entries in table.items():
        assert set(entries) <= set(CASES), gpu
        for op, entry in entries.items():
            candidates = CASES[op][1]
            assert tuned(op, candidates[0], gpu) in candidates, f"{gpu}: {op}"
            assert set(entry["config"]) == set(vars(candidates[0])), f"{gpu}: {op}"
