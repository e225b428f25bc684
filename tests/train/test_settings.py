import dataclasses
import io
import itertools
import json
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from nanofuse.kernels import newton_schulz
from nanofuse.model.config import Dials
from nanofuse.model.option import options
from nanofuse.train.errors import UserError
from nanofuse.train.optim.config import EQUILIBRATIONS
from nanofuse.train.plan import make_plan
from nanofuse.train.settings import (
    CPU_PRESET,
    FLAGS,
    TITLES,
    Horizon,
    Job,
    Reports,
    Settings,
    build_parser,
    naming_flags,
    resolve,
    resolve_resumed,
)
from tests.helpers import ranges

NANOCHAT_FLAGS = (
    "--depth --aspect-ratio --head-dim --max-seq-len --window-pattern --num-iterations "
    "--target-flops --target-param-data-ratio --device-batch-size --total-batch-size "
    "--embedding-lr --unembedding-lr --matrix-lr --scalar-lr --weight-decay --warmup-steps "
    "--warmdown-ratio --final-lr-frac --eval-every --eval-tokens --sample-every --save-every "
    "--run --device-type"
)
OWN_FLAGS = (
    "--seed --bigram-embed-factor --bigram-lambda-init --bigram-embedding-lr-mult "
    "--bigram-lambda-lr --muon-plus --no-muon-plus --muon-eq --train-log-every "
    "--skip-initial-eval --backend --compile-mode --fp8 --data --resume"
)


def test_every_promised_flag_is_there_with_help():
    text = build_parser().format_help()
    for flag in f"{NANOCHAT_FLAGS} {OWN_FLAGS}".split():
        assert f"{flag} " in text or f"{flag}\n" in text or f"{flag}," in text, flag
    assert all(f.metadata["help"] for _, f in FLAGS.values())
    for words in ("--depth N ", "--matrix-lr X ", "--muon-eq {", "--data PATH ", "--run NAME "):
        assert words in text, words


def test_every_default_has_one_owner():
    """A field that two parts share would be set in one of them only."""
    names = [f.name for part in TITLES for f in options(getattr(Settings, part))]
    assert len(names) == len(set(names)) == len(FLAGS)
    assert {f.name for f in dataclasses.fields(Settings)} == set(TITLES)
    assert EQUILIBRATIONS == newton_schulz.EQUILIBRATIONS


def test_every_flag_reaches_its_part_and_unknown_ones_none():
    for name, (part, f) in FLAGS.items():
        value = {bool: not f.default, int: 7, float: 0.125, str: "x"}[f.type]
        settings = Settings().replace({name: value})
        assert getattr(getattr(settings, part), name) == settings.flat()[name] == value
        assert settings.replace({name: f.default}) == Settings()
    with pytest.raises(KeyError):
        Settings().replace({"matrix_rate": 0.1})


def test_flags_are_parsed_without_torch():
    code = "import sys; from nanofuse.train.run import main\n"
    code += "try: main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"


def test_errors_of_the_model_name_flags():
    with pytest.raises(UserError, match="--n-kv-head 3 does not divide n_head 8"), naming_flags():
        Dials(n_kv_head=3).config()
    with pytest.raises(UserError, match="--attention fa9 is unknown"), naming_flags("--attention "):
        raise ValueError("fa9 is unknown")
    with pytest.raises(UserError, match="raise --depth or --aspect-ratio"), naming_flags():
        Dials(depth=1, aspect_ratio=8, head_dim=8).config()


def test_defaults_are_the_recipes():
    s = resolve({}, "cuda")
    assert s == Settings()
    assert (s.model.bigram_embed_factor, s.model.bigram_lambda_init) == (5, 0.05)
    assert (s.optim.scalar_lr, s.optim.weight_decay) == (0.3, 0.28)
    assert (s.schedule.warmdown_ratio, s.schedule.final_lr_frac) == (0.65, 0.05)
    assert s.optim.muon_plus and s.optim.muon_eq == "row"
    assert s.horizon.target_param_data_ratio == 8 and s.reports.train_log_every == 50


def test_defaults_and_bounds_move_on_purpose_only():
    """The rest: tests/model/test_config.py, test_optim_config.py, test_schedules.py."""
    most = 10**12
    assert ranges(Horizon) == {
        "num_iterations": (-1, -1, most),
        "target_flops": (-1.0, -1, 1e40),
        "target_param_data_ratio": (8.0, None, 1e9),
        "device_batch_size": (32, 1, 16_777_216),
        "total_batch_size": (-1, -1, 4_294_967_296),
    }
    assert ranges(Reports) == {
        "eval_every": (250, -1, most),
        "eval_tokens": (80 * 524288, 1, 2**48),
        "skip_initial_eval": (False, None, None),
        "core_every": (-1, -1, most),
        "core_bundle": ("", None, None),
        "core_max_per_task": (500, -1, most),
        "sample_every": (2000, -1, most),
        "save_every": (-1, -1, most),
        "keep": (most, 1, most),
        "train_log_every": (50, 1, most),
        "wandb": (False, None, None),
        "trackio": (False, None, None),
        "tensorboard": (False, None, None),
    }
    numbers = {n: r for n, r in ranges(Job).items() if r[1:] != (None, None)}
    assert numbers == {"seed": (42, 0, 2**63 - 1)}
    assert CPU_PRESET == {
        "depth": 4, "aspect_ratio": 48, "head_dim": 64, "max_seq_len": 256, "vocab_size": 4096,
        "device_batch_size": 8, "total_batch_size": 4096, "num_iterations": 100,
        "warmup_steps": 5, "embedding_lr": 1.0, "unembedding_lr": 0.03, "matrix_lr": 0.08,
        "scalar_lr": 1.0, "eval_every": 50, "eval_tokens": 65536, "train_log_every": 10,
        "sample_every": 0,
    }  # fmt: skip


def test_preset_yields_to_flags():
    s = resolve({"depth": 6}, "cpu")
    assert s.model.depth == 6 and s.model.max_seq_len == CPU_PRESET["max_seq_len"]


def parse_error(*argv):
    err = io.StringIO()
    with redirect_stderr(err), pytest.raises(SystemExit) as stop:
        build_parser().parse_args(argv)
    assert stop.value.code == 2
    assert err.getvalue().startswith("error: ") and err.getvalue().count("\n") == 1
    return err.getvalue()


def test_parse_errors_are_one_line():
    assert "--backend" in parse_error("--backend", "warp")
    assert "--depth" in parse_error("--depth", "four")
    assert "--dept" in parse_error("--dept", "4")  # no abbreviations
    assert "--fp8" in parse_error("--fp8", "yes")
    assert "--muon-eq" in parse_error("--muon-eq", "both")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"device_batch_size": 0}, "--device-batch-size"),
        ({"train_log_every": 0}, "--train-log-every"),
        ({"matrix_lr": -1.0}, "--matrix-lr"),
        ({"matrix_lr": float("nan")}, "--matrix-lr"),
        ({"warmdown_ratio": 1.5}, "--warmdown-ratio"),
        ({"target_param_data_ratio": float("nan")}, "--target-param-data-ratio"),
        ({"matrix_lr": float("inf")}, "--matrix-lr"),
        ({"seed": 2**63}, "--seed"),
        ({"seed": -1}, "--seed"),
        ({"n_kv_head": -1}, "--n-kv-head"),
        ({"depth": 2**63}, "--depth must be at most"),
        ({"total_batch_size": 2**63}, "--total-batch-size must be at most"),
        ({"num_iterations": 2**63}, "--num-iterations must be at most"),
        ({"target_flops": 0.0}, "--target-flops must be above 0"),
        ({"target_flops": -0.5}, "--target-flops must be above 0"),
        ({"bigram_lambda_init": 1e308}, "--bigram-lambda-init must be at most"),
        ({"bigram_lambda_init": -1e308}, "--bigram-lambda-init must be at least"),
    ],
)
def test_impossible_values_name_the_flag(given, message):
    with pytest.raises(UserError, match=message):
        resolve(given, "cpu")


def test_every_number_has_bounds():
    """2**63 of anything is refused, and so is what no step could be made of."""
    for name, (_, f) in FLAGS.items():
        if f.type in (int, float):
            assert f.metadata["most"] is not None, name
            for value in (f.type(1e308), -f.type(1e308)):
                with pytest.raises(UserError):
                    resolve({name: value}, "cpu")
                    make_plan(Settings().replace({name: value}), Settings().model.config())


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ({"bigram_lambda_init": 0.0}, "--bigram-lambda-init"),
        ({"bigram_lambda_init": -0.0}, "--bigram-lambda-init"),
        ({"bigram_lambda_init": 1e-60}, "--bigram-lambda-init"),  # 0 in fp32
        ({"bigram_embedding_lr_mult": 0.0}, "--bigram-embedding-lr-mult"),
    ],
)
def test_a_bigram_table_that_could_not_learn_is_refused(given, flag):
    with pytest.raises(UserError, match=f"{flag} .*--bigram-embed-factor 0"):
        resolve(given, "cpu")
    resolve({**given, "bigram_embed_factor": 0}, "cpu")
    # a run of an older version that did so goes on
    resolve_resumed({}, Settings().replace(given).flat())


def test_the_flags_of_the_length_are_the_cpu_presets_too():
    assert resolve({}, "cpu").horizon.num_iterations == CPU_PRESET["num_iterations"]
    for given in ({"target_flops": 1e9}, {"target_param_data_ratio": 4.0}):
        assert resolve(given, "cpu").horizon.num_iterations == -1
    assert resolve({"num_iterations": 7, "target_flops": -1.0}, "cpu").horizon.num_iterations == 7


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_two_flags_of_the_length_are_refused(device_type):
    values = {"num_iterations": 3, "target_flops": 1e9, "target_param_data_ratio": 4.0}
    for pair in itertools.combinations(values, 2):
        given = {name: values[name] for name in pair}
        with pytest.raises(UserError) as error:
            resolve(given, device_type)
        with pytest.raises(UserError):
            resolve_resumed(given, resolve({}, device_type).flat())
        assert all("--" + name.replace("_", "-") in str(error.value) for name in pair)


def test_a_resumed_run_takes_new_rates_lengths_and_machines():
    saved = resolve({"depth": 2, "run": "a"}, "cpu").flat()
    changes = {
        "matrix_lr": 0.01, "embedding_lr": 0.5, "weight_decay": 0.0, "warmdown_ratio": 0.5,
        "num_iterations": 200, "device_batch_size": 4, "attention": "flex", "fp8": "off",
        "backend": "eager", "device_type": "cpu", "deterministic": True,
    }  # fmt: skip
    assert resolve_resumed(changes, saved).flat() == {**saved, **changes}
    again = resolve_resumed({"target_flops": 1e12}, saved)
    assert again.horizon.num_iterations == -1 and again.horizon.target_flops == 1e12
    assert resolve_resumed({}, again.flat()) == again


def test_what_cannot_change_says_why():
    saved = resolve({"depth": 2, "run": "a"}, "cpu").flat()
    for name, (_, f) in FLAGS.items():
        if f.metadata["fixed"]:
            value = f.type(saved[name] * 2 + 2) if f.type in (int, float) else "none"
            value = not saved[name] if f.type is bool else value
            with pytest.raises(UserError, match="differs from the run's") as error:
                resolve_resumed({name: value}, saved)
            assert f.metadata["fixed"] in str(error.value) and "--" in str(error.value)


@pytest.mark.parametrize("value", [None, True, "4", 4.0, [], {}, 2**63, -1])
def test_saved_settings_are_checked_as_flags_are(value):
    saved = {**resolve({"depth": 2}, "cpu").flat(), "depth": value}
    with pytest.raises(UserError, match="settings are damaged: --depth"):
        resolve_resumed({}, saved)


def test_resuming_changes_only_what_may_change():
    saved = json.loads(json.dumps(resolve({"depth": 2, "run": "a"}, "cpu").flat()))
    again = resolve_resumed({"run": "a", "resume": True, "depth": 2, "save_every": 7}, saved)
    assert again.model.depth == 2 and again.reports.save_every == 7
    with pytest.raises(UserError, match="--depth 4 differs from the run's 2"):
        resolve_resumed({"depth": 4}, saved)
    with pytest.raises(UserError, match="settings do not fit"):
        resolve_resumed({}, {**saved, "from_the_future": 1})
    del saved["matrix_lr"]
    with pytest.raises(UserError, match="'matrix_lr' is missing"):
        resolve_resumed({}, saved)


def test_settings_of_version_0_1_resume():
    """What 0.1 saved: every flag of then, flat."""
    saved = json.loads((Path(__file__).parent / "settings-0.1.json").read_text())
    settings = resolve_resumed({"resume": True}, saved)
    younger = {name: f.default for name, (_, f) in FLAGS.items() if name not in saved}
    assert {"val_shard", "text_column"} <= younger.keys()
    assert settings.flat() == {**saved, **younger, "resume": True}


def test_only_flags_younger_than_the_run_may_be_missing():
    """A flag that says since when it is there takes its default; one that was always there is
    damage (test_resuming_changes_only_what_may_change)."""
    saved = resolve({"depth": 2, "text_column": "content"}, "cpu").flat()
    assert resolve_resumed({}, saved).job.text_column == "content"
    young = [name for name, (_, f) in FLAGS.items() if f.metadata["since"]]
    settings = resolve_resumed({}, {n: v for n, v in saved.items() if n not in young})
    assert settings.job.text_column == "text" and settings.model.depth == 2
    with pytest.raises(UserError, match="--text-column body differs from the run's content"):
        resolve_resumed({"text_column": "body"}, saved)


@pytest.mark.parametrize("name", ["data", "run", "val_shard", "text_column"])
def test_an_empty_value_is_refused(name):
    flag = "--" + name.replace("_", "-")
    with pytest.raises(UserError, match=f"{flag} is empty"):
        resolve({name: ""}, "cpu")
    with pytest.raises(UserError, match=f"{flag} is empty"):
        resolve_resumed({name: ""}, resolve({}, "cpu").flat())
