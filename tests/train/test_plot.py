"""train.plot on runs written by hand."""

import json
import subprocess
import sys

import pytest

from nanofuse.train.errors import UserError
from nanofuse.train.plot import SUFFIXES, main, position
from tests.train.logs import TOKENS, add_checkpoint, metrics, write_run

FAST = {0: 3.2, 100: 1.5, 200: 1.25}


def configured(folder, bpbs, ms=10.0, **flags):
    write_run(folder, bpbs, ms)
    add_checkpoint(folder, 200, 200, run=folder.name, **flags)
    return str(folder)


def as_json(capsys, *argv):
    main([*argv, "--json"])
    return json.loads(capsys.readouterr().out)


def test_tables_say_bpb_at_equal_steps_and_time(tmp_path, capsys):
    a = write_run(tmp_path / "fused", FAST)
    b = write_run(tmp_path / "compiled", {0: 3.2, 100: 1.501, 300: 1.2}, ms=20.0)
    main([a, b])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "at equal steps and tokens:"
    assert lines[3] == "| fused    |        1.500000 |        1.250000 |"
    assert lines[4] == "| compiled |        1.501000 |        1.350500 |"
    assert lines[6] == "at equal time:" and "BPB at 2.0 s" in lines[7]
    assert lines[10] == "| compiled |     2.350500 |     1.501000 |"
    assert "| compiled |               +0.001000 |    20.0 |" in lines[15]
    assert lines[-1].startswith("compiled: settings not known")


def test_other_batches_get_a_table_of_tokens(tmp_path, capsys):
    a, b = write_run(tmp_path / "a", FAST), tmp_path / "b"
    write_run(b, FAST, tok_per_s=200_000.0)  # 2,000 tokens a step at 10 ms
    found = as_json(capsys, a, str(b))
    assert [at["at"] for at in found["equal"]["tokens"]] == [100 * TOKENS, 200 * TOKENS]
    assert found["equal"]["tokens"][1]["bpb"] == [1.25, 1.5]
    main([a, str(b)])
    assert "BPB at 0.2 M tokens" in capsys.readouterr().out
    assert position("tokens", 5120) == "5,120 tokens"


def test_a_run_alone_is_compared_with_nothing(tmp_path, capsys):
    a = write_run(tmp_path / "a", FAST)
    main([a])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "by steps and tokens:" and lines[-1] == "a: 10.0 ms/step"
    assert not any("equal" in line or "first" in line for line in lines)


def test_columns_are_the_evaluations_of_the_first(tmp_path, capsys):
    a = write_run(tmp_path / "a", FAST)
    b = write_run(tmp_path / "b", {0: 3.2, 150: 1.5, 200: 1.25})
    for runs, steps in (((a, b), [100, 200]), ((b, a), [150, 200])):
        assert [at["at"] for at in as_json(capsys, *runs)["equal"]["steps"]] == steps
    many = write_run(tmp_path / "many", {10 * i: 2.0 for i in range(31)})
    equal = as_json(capsys, many)["equal"]["steps"]
    assert [at["at"] for at in equal] == [10, 70, 130, 180, 240, 300]


def test_seeds_of_one_configuration_are_a_mean_and_its_deviation(tmp_path, capsys):
    runs = [
        configured(tmp_path / "a", FAST, seed=1),
        configured(tmp_path / "b", {0: 3.2, 100: 1.52, 200: 1.27}, seed=2, resume=True),
        configured(tmp_path / "c", {0: 3.2, 100: 1.4, 200: 1.2}, matrix_lr=0.5),
    ]
    found = as_json(capsys, *runs)["groups"]
    assert [group["runs"] for group in found] == [["a", "b"], ["c"]]
    last = found[0]["evaluations"][-1]
    assert last["bpb"] == pytest.approx(1.26) and last["sd"] == pytest.approx(0.02 / 2**0.5)
    assert found[1]["changes"] == {"matrix_lr": [0.5, 0.02]}
    main(runs)
    out = capsys.readouterr().out
    assert "1.260000 ± 0.014142" in out and "c: --matrix-lr 0.5 (first: 0.02)" in out
    assert [g["runs"] for g in as_json(capsys, *runs, "--apart")["groups"]] == [["a"], ["b"], ["c"]]


def test_a_group_of_several_commits_is_said(tmp_path, capsys):
    a = configured(tmp_path / "a", FAST, seed=1)
    b = configured(tmp_path / "b", FAST, seed=2, commit="b" * 40)
    main([a, b])
    assert "a and 1 more: of several commits (aaaaaaa, bbbbbbb)" in capsys.readouterr().out


def test_multipliers_are_the_cost_of_equal_bpb(tmp_path, capsys):
    """The variant has the baseline's last BPB, 1.25, half-way between 1.5 and 1.0: after 150 steps
    in place of 200, of 20 ms in place of 10, and of a dense model in place of one with a table."""
    a = configured(tmp_path / "a", FAST)
    b = configured(tmp_path / "b", {0: 3.2, 100: 1.5, 200: 1.0}, ms=20.0, bigram_embed_factor=0)
    first, found = (group["multiplier"] for group in as_json(capsys, a, b)["groups"])
    assert first["flops"] == first["seconds"] == 1
    assert found["bpb"] == 1.25
    assert found["seconds"] == pytest.approx(200 * 10 / (150 * 20))
    assert found["flops"] == pytest.approx(200 / 150)  # lookups cost none


def test_multipliers_that_are_not_known(tmp_path, capsys):
    """FLOPs without a checkpoint; seconds where the first evaluation is all there is."""
    a, b = write_run(tmp_path / "a", FAST), write_run(tmp_path / "b", {0: 3.2})
    found = as_json(capsys, a, b)["groups"]
    assert found[1]["multiplier"]["flops"] is None
    assert found[1]["multiplier"]["seconds"] is None
    c = write_run(tmp_path / "c", {100: 1.5})
    assert as_json(capsys, b, c)["equal"]["steps"] == []


def test_runs_go_by_name_too_and_a_log_may_lie_anywhere(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "a", FAST)
    (tmp_path / "record.jsonl").write_text(metrics(FAST))
    write_run(tmp_path / "old" / "a", FAST)
    found = as_json(capsys, "a", "record.jsonl", "old/a")["groups"]
    assert [group["name"] for group in found] == ["a", "record", "old/a"]


def test_a_log_may_have_other_kinds_and_lack_its_end(tmp_path, capsys):
    run = write_run(tmp_path / "a", FAST)
    with open(tmp_path / "a" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "sample", "step": 200, "text": "?"}\n{"kind": "tra')
    assert len(as_json(capsys, run)["groups"][0]["evaluations"]) == 3


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no evaluation"),
        (metrics({}, last=3), "holds no evaluation"),
        (metrics(FAST) + "{}\n", "line 7 is not of a run's log"),
        (metrics(FAST) + '{"kind": "val"}\n', "line 7 is not of a run's log .*step: Field req"),
        (metrics(FAST) + "\n" + metrics(FAST), "line 7 is not"),
        (metrics(FAST).replace("1.25", "NaN"), "line 6 is not"),
        (metrics(FAST).replace("1.25", "-1"), "line 6 is not"),
        ("\0\0\0\n", "line 1 is not"),
    ],
)
def test_logs_that_cannot_be_compared_are_named(tmp_path, text, message):
    write_run(tmp_path / "a", FAST)
    (tmp_path / "a" / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=f"a/metrics.jsonl.*{message}"):
        main([str(tmp_path / "a")])


def test_what_is_given_is_checked(tmp_path, capsys):
    a = write_run(tmp_path / "a", FAST)
    with pytest.raises(UserError, match="nowhere: no such run"):
        main([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match=r"has no metrics\.jsonl"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match="given twice"):
        main([a, a + "/metrics.jsonl"])
    with pytest.raises(UserError, match=r"--out .* must end in \.png or \.svg"):
        main([a, "--out", str(tmp_path / "a.pdf")])
    with pytest.raises(UserError, match="--out .* is a folder"):
        main([a, "--out", str(tmp_path)])
    only = tmp_path / "val.jsonl"
    only.write_text('{"kind": "val", "step": 0, "bpb": 3.2, "train_seconds": 0.0}\n')
    with pytest.raises(UserError, match="--x tokens: a run has logged no training step"):
        main([str(only), "--x", "tokens"])
    seeds = [configured(tmp_path / name, {step: 1.0}) for name, step in (("b", 5), ("c", 6))]
    with pytest.raises(UserError, match="no step that all of them evaluated.*--apart"):
        main(seeds)
    (tmp_path / "b" / "step_000200" / "meta.json").write_text("{")
    with pytest.raises(UserError, match="meta.json is missing, damaged"):
        main(seeds)


def test_the_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from nanofuse.train.compare import grouped
    from nanofuse.train.metrics import read_run
    from nanofuse.train.pictures import figure_of

    runs = [
        configured(tmp_path / "a", FAST, seed=1),
        configured(tmp_path / "b", FAST, seed=2),
        write_run(tmp_path / "c", {0: 3.0, 100: 1.75}, grad_norm=None, fp8_clipped=3),
    ]
    with (tmp_path / "c" / "metrics.jsonl").open("a") as file:
        for step, core in ((50, 0.1), (100, 0.25)):
            record = {
                "kind": "core",
                "step": step,
                "core": core,
                "train_seconds": 0.89 + step / 100,
            }
            file.write(json.dumps({**record, "tasks": {"piqa": {"accuracy": 0.5}}}) + "\n")
    groups = grouped([read_run(run) for run in runs])
    panels = {axes.get_title(): axes for axes in figure_of(groups, "time").axes}
    bpb = panels["validation BPB"]
    assert [list(line.get_ydata()) for line in bpb.lines] == [[1.5, 1.25], [3.0, 1.75]]
    assert list(bpb.lines[0].get_xdata()) == pytest.approx([1.0, 2.0])
    gaps = panels["validation BPB at equal steps, minus a and 1 more"]
    assert list(gaps.lines[1].get_ydata()) == pytest.approx([-0.2, 0.25])
    assert len(panels["loss, smoothed"].lines) == 3
    assert list(panels["tensors clipped in FP8"].lines[2].get_ydata()) == [3, 3]
    assert "gradient norm" not in panels  # nobody logged one
    core = panels["CORE"].lines[2]
    assert list(core.get_ydata()) == [0.1, 0.25]
    assert list(core.get_xdata()) == pytest.approx([0.5, 1.0])
    assert len(panels) == 7
    alone = figure_of(groups[:1], "steps").axes  # compared with nothing, and no more of the grid
    assert len(alone) == 4 and not any("minus" in axes.get_title() for axes in alone)


def test_a_picture_has_the_same_bits_again(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from nanofuse.train import pictures
    from nanofuse.train.compare import grouped
    from nanofuse.train.metrics import read_run

    groups = grouped([read_run(write_run(tmp_path / "a", FAST))])
    monkeypatch.setattr(pictures, "PANELS", {})
    for name in ("one", "two"):
        paths = [tmp_path / f"{name}{suffix}" for suffix in SUFFIXES]
        pictures.draw(groups, "steps", paths)
    for suffix in SUFFIXES:
        first, second = ((tmp_path / f"{n}{suffix}").read_bytes() for n in ("one", "two"))
        assert first == second and first

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pictures, "write_atomically", full)
    with pytest.raises(UserError, match=r"--out: .*one\.png cannot be written \(No space"):
        pictures.draw(groups, "steps", [tmp_path / "one.png"])


def test_out_without_a_suffix_makes_both(tmp_path, capsys, monkeypatch):
    drawn = []
    run = write_run(tmp_path / "a", FAST)
    monkeypatch.setattr("nanofuse.train.pictures.draw", lambda *args: drawn.append(args))
    main([run, "--out", str(tmp_path / "picture"), "--x", "tokens"])
    assert drawn[0][1:] == ("tokens", [tmp_path / "picture.png", tmp_path / "picture.svg"])


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"--out needs matplotlib; .*\[plot\]"):
        main([write_run(tmp_path / "a", FAST), "--out", str(tmp_path / "a.png")])


def test_the_command_needs_no_torch(tmp_path):
    run = write_run(tmp_path / "a", FAST)
    code = (
        "import sys; from nanofuse.train.plot import main; main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, run], check=True, stdout=subprocess.DEVNULL)
