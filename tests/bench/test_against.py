"""bench.against: two trees take turns, and the figures are those of the rounds."""

import json
from pathlib import Path

import pytest

from nanofuse.bench import against
from nanofuse.bench.against import difference, main
from nanofuse.train.errors import UserError

ROOT = Path(__file__).parents[2]
TINY = ["--depth", "1", "--backend", "eager", "--rounds", "3"]


@pytest.mark.cpu
def test_a_tree_against_itself(tmp_path, capsys):
    out = tmp_path / "result.json"
    main([str(ROOT), *TINY, "--json", str(out)])
    result = json.loads(out.read_text())
    assert [len(result["ms"][name]) for name in ("ours", "theirs")] == [3, 3]
    assert result["facts"]["ours"] == result["facts"]["theirs"]
    assert result["losses"]["ours"] == result["losses"]["theirs"] and all(result["losses"]["ours"])
    out = capsys.readouterr().out
    assert f"ours against {ROOT}: " in out and out.count("last loss") == 2
    assert result["options"]["ours"] == result["options"]["theirs"]


@pytest.mark.cpu
def test_other_flags_for_the_other_tree(tmp_path, capsys):
    out = tmp_path / "result.json"
    main([str(ROOT), *TINY, "--theirs", "--depth 2 --bigram-factor 0", "--json", str(out)])
    options = json.loads(out.read_text())["options"]
    assert options["ours"] == ["--depth=1", "--rows=32", "--backend=eager", "--fp8=auto"]
    changed = set(options["theirs"]) - set(options["ours"])
    assert changed == {"--depth=2", "--bigram-factor=0"}
    assert f"ours against {ROOT} --depth 2 --bigram-factor 0: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, said", [("--rows 0", "--rows must be"), ("--round 3", "--round"), ("'", "--theirs '")]
)
def test_other_flags_are_checked(flags, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([".", "--theirs", flags])
    err = capsys.readouterr().err
    assert err.startswith("error: ") and said in err and err.count("\n") == 1


def test_the_first_of_a_round_changes(monkeypatch):
    calls = []

    class Fake:
        facts = []

        def __init__(self, tree, options):
            self.name = "theirs" if tree != ROOT else "ours"

        def step(self):
            calls.append(self.name)
            return 1.0, None

        def close(self):
            pass

    monkeypatch.setattr(against, "Worker", Fake)
    main([str(ROOT / "bench"), "--rounds", "2"])
    assert calls == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]  # the last two untimed


def test_difference_is_the_rounds_median():
    middle, (low, high) = difference([11.0, 22.0, 36.0], [10.0, 20.0, 30.0])
    assert middle == pytest.approx(0.1) and low <= middle <= high
    assert low == pytest.approx(0.1) and high == pytest.approx(0.2)


def test_a_revision_that_is_none_is_named():
    with pytest.raises(UserError, match="neither a folder nor a commit"):
        main(["nonsense"])


@pytest.mark.parametrize("flag", ["--rounds", "--depth", "--rows"])
def test_numbers_are_checked(flag, capsys):
    for value in ("-1", "0", 2**63, "nan", "1e999", ""):
        with pytest.raises(SystemExit, match="2"):
            main([".", f"{flag}={value}"])
        assert capsys.readouterr().err.startswith(f"error: {flag} must be ")


@pytest.mark.parametrize("answer, given", [("7.5 4.25", (7.5, 4.25)), ("7.5", (7.5, None))])
def test_a_step_has_a_time_and_a_loss(answer, given, tmp_path):
    """One that an older tree does not say is None."""
    assert worker_that_answers(answer, tmp_path).step() == given


@pytest.mark.parametrize("loss", ["nan", "inf"])
def test_a_loss_that_is_no_number_is_refused(loss, tmp_path):
    with pytest.raises(UserError, match=f"loss of {loss}"):
        worker_that_answers(f"7.5 {loss}", tmp_path).step()


def worker_that_answers(line, tmp_path):
    folder = tmp_path / "bench"
    folder.mkdir()
    (folder / "step_worker.py").write_text(f"print('[]', flush=True)\ninput()\nprint('{line}')\n")
    return against.Worker(tmp_path, [])


def test_a_worker_that_fails_is_named(capfd):
    with pytest.raises(UserError, match="ended with an error"):
        main([str(ROOT), "--fp8", "warp", "--backend", "eager"])
    assert "--fp8 warp" in capfd.readouterr().err
