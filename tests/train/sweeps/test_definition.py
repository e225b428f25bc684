"""A sweep's file: what it makes, and what is refused before anything starts."""

import pytest

from nanofuse.train.errors import UserError
from nanofuse.train.sweeps.definition import SHIPPED, arguments, find_sweep, read_sweep

LIST = 'seeds = [1, 2]\n[flags]\ndepth = 4\n[[variants]]\nname = "a"\n[[variants]]\nname = "b"\n'


def read(tmp_path, text, extra=(), gpu=False, name="s"):
    path = tmp_path / f"{name}.toml"
    path.write_text(text)
    return read_sweep(path, dict(extra), gpu)


def test_a_list_runs_seed_by_seed(tmp_path):
    sweep = read(tmp_path, LIST + "muon-plus = false\nscalar-lr = 1\n", {"data": "stdlib"})
    assert [item.run for item in sweep.items] == ["s.a.1", "s.b.1", "s.a.2", "s.b.2"]
    assert sweep.baseline == "a"
    item = sweep.items[3]
    assert item.settings.optim.scalar_lr == 1.0 and not item.settings.optim.muon_plus
    assert item.command(True) == [
        "nanofuse.train.run", "--run", "s.b.2", "--resume", "--depth=4", "--no-muon-plus",
        "--scalar-lr=1.0", "--data=stdlib", "--seed=2",
    ]  # fmt: skip
    assert arguments({"skip_initial_eval": True, "muon_plus": True}) == ["--skip-initial-eval"]


def test_a_grid_is_every_combination(tmp_path):
    text = 'seeds = [1]\nbaseline = "depth-2_matrix-lr-0.5"\n[grid]\ndepth = [1, 2]\n'
    sweep = read(tmp_path, text + "matrix-lr = [0.25, 0.5]\n")
    assert list(sweep.varied) == [f"depth-{d}_matrix-lr-{r}" for d in (1, 2) for r in (0.25, 0.5)]
    assert sweep.varied[sweep.baseline] == {"depth": 2, "matrix_lr": 0.5}


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda path: path.stem)
def test_those_that_come_along_are_sound(path):
    assert find_sweep(path.stem) == path
    sweep = read_sweep(path, {"data": "stdlib"}, True)
    assert sweep.about and sweep.items


def test_the_parts_add_up_one_by_one():
    sweep = read_sweep(find_sweep("parts-d4"), {}, True)
    variants = list(sweep.varied.values())
    for before, after in zip(variants, variants[1:], strict=False):
        assert sum(before[name] != after[name] for name in before) == 1
    plan = sweep.items[0].plan
    assert (plan.num_iterations, plan.total_batch_size, len(sweep.items)) == (352, 262_144, 25)


REFUSED = [
    ("seeds = [1]\n[flags\n", "s.toml is no TOML file"),
    ('seeds = "1"\n', "s.toml: seeds: Input should be a valid list"),
    ("seeds = []\n", "s.toml: seeds: List should have at least 1 item"),
    ("seeds = [1]\nsedes = 1\n", "s.toml: 'sedes' is not known; did you mean 'seeds'"),
    ("seeds = [1]\nqqqq = 1\n", "s.toml: 'qqqq' is not known; keys are about, seeds, "),
    ("seeds = [1]\nmatrix-lr = 1\n", r"'matrix-lr' is a flag of train.run; put it under \[flags"),
    ("[grid]\ndepth = [1]\n", r"s.toml has no seeds; give it some, such as seeds = \[1, 2, 3\]"),
    ("seeds = [-1]\n[grid]\ndepth=[1]\n", "seeds: -1 must be from 0"),
    ("seeds = [1, 1]\n[grid]\ndepth=[1]\n", "seeds: 1 is there twice"),
    (f"seeds = {list(range(101))}\n[grid]\ndepth = {list(range(1, 101))}", "makes 10,100 runs"),
    ("seeds = [1]\n", r"give either \[\[variants\]\], each with a name, or a \[grid\]"),
    (LIST + "[grid]\ndepth = [1]\n", "give either"),
    ("seeds = [1]\n[grid]\ndepth = []\n", r"\[grid\]: 'depth' has no values"),
    ("seeds = [1]\n[grid]\ndepth = [1, 0]\n", r"\[grid\]: --depth must be at least 1, got 0"),
    ("seeds = [1]\n[grid]\ndepth = [1, 1]\n", r"\[grid\]: 'depth-1' is there twice"),
    ('seeds = [1]\n[grid]\ndata = ["/x"]\n', "name 'data-/x' must be letters"),
    (LIST + "dept = 1\n", "s.toml, 'b': 'dept' is no flag of train.run; did you mean 'depth'"),
    (LIST + "matrix_lr = 1\n", "'matrix_lr' is no flag of train.run; did you mean 'matrix-lr'"),
    (LIST + "qqqq = 1\n", "see python -m train.run --help"),
    (LIST + 'matrix-lr = "x"\n', "'b': --matrix-lr must be a number, got 'x'"),
    (LIST + 'device-batch-size = "many"\n', "--device-batch-size must be a whole number"),
    ('corpus = "5-a"\n' + LIST, r"corpus says what .expected. is of, and there is none"),
    (LIST + 'fp8 = "fp4"\n', "'b': --fp8 must be one of"),
    (LIST + 'data = ""\n', "'b': --data is empty"),
    (LIST + "seed = 1\n", "'seed' cannot be set here, as give the file seeds"),
    (LIST + "gpus = 2\n", "'gpus' cannot be set here, as each run is on one GPU"),
    (LIST + "head-dim = 15\n", "s.toml, 'b': --head-dim 15 is odd"),
    (LIST + "num-iterations = 3\ntarget-flops = 1\n", "'b': .* both set the length of the run"),
    (LIST + "[[variants]]\ndepth = 1\n", "variant 3 has no name"),
    (LIST + '[[variants]]\nname = "b"\n', "variant 3: 'b' is there twice"),
    ('baseline = "c"\n' + LIST, "baseline 'c' is none of a, b"),
    ("tolerance = 1.0\n" + LIST, "tolerance and .expected. need each other"),
    (LIST + "[expected.b]\n1 = 2.0\n", "tolerance and .expected. need each other"),
    ("tolerance = 1.0\n" + LIST + "[expected.c]\n1 = 2.0\n", "no such variant; there are a, b"),
    ("tolerance = 1.0\n" + LIST + "[expected.a]\nx = 2.0\n", "a step must be a whole number"),
    ("tolerance = 1.0\n" + LIST.replace("4", "4\nnum-iterations = 9\neval-every = 4")
     + "[expected.a]\n0 = 3.0\n8 = 2.0\n9 = 2.0\n7 = 2.0\n",
     r"s.toml, \[expected.a\]: step 7 is not evaluated, of 9 with --eval-every 4; name another"),
    ("tolerance = 1.0\n" + LIST.replace("4", "4\nnum-iterations = 9\neval-every = 4")
     + "[expected.b]\n12 = 2.0\n", "step 12 is not evaluated, of 9"),
    ("tolerance = 1.0\n" + LIST.replace("4", "4\nskip-initial-eval = true")
     + "[expected.b]\n0 = 3.0\n",
     "step 0 is not evaluated"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_is_one_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"run": "x"}, "--run cannot be given to a sweep, as the sweep names its runs"),
        ({"scalar_lr": 0.5}, "--scalar-lr is what variants of .* differ in"),
        ({"depth": 0}, "--depth must be at least 1"),
    ],
)
def test_flags_of_the_command_line(tmp_path, extra, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, LIST + "scalar-lr = 0.25\n", extra)


def test_too_many_runs_are_refused_before_they_are_made(tmp_path):
    values = ", ".join(f"0.{i:03}" for i in range(1, 99))
    grid = "".join(f"{name}-lr = [{values}]\n" for name in ("matrix", "scalar", "embedding"))
    with pytest.raises(UserError, match="makes 941,192 runs, 10,000 are the most; take fewer"):
        read(tmp_path, f"seeds = [1]\n[grid]\n{grid}")
    with pytest.raises(UserError, match="makes 100,000 runs"):
        read(tmp_path, f"seeds = {list(range(100_000))}\n[grid]\ndepth = [1]\n")


def test_a_file_of_windows_begins_with_a_mark(tmp_path):
    assert len(read(tmp_path, "\ufeff" + LIST).varied) == 2


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="nowhere is no file, and no sweep that comes along; .*fp8"):
        find_sweep("nowhere")
    with pytest.raises(UserError, match="the name of a sweep's file must be letters"):
        read(tmp_path, LIST, name="a.b")
