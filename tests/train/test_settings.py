import dataclasses
import io
from contextlib import redirect_stderr

import pytest

from nanofuse.model.errors import UserError
from nanofuse.train.settings import CPU_PRESET, Settings, build_parser, resolve, resolve_resumed

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
    assert all(f.metadata["help"] and f.metadata["group"] for f in dataclasses.fields(Settings))


def test_defaults_are_the_recipes():
    s = resolve({}, "cuda")
    assert s == Settings()
    assert (s.bigram_embed_factor, s.bigram_lambda_init, s.train_log_every) == (5, 0.05, 50)
    assert (s.scalar_lr, s.weight_decay, s.warmdown_ratio, s.final_lr_frac) == (
        0.3,
        0.28,
        0.65,
        0.05,
    )
    assert s.muon_plus and s.muon_eq == "row" and s.target_param_data_ratio == 8


def test_preset_yields_to_flags():
    s = resolve({"depth": 6}, "cpu")
    assert s.depth == 6 and s.max_seq_len == CPU_PRESET["max_seq_len"]


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
    ],
)
def test_impossible_values_name_the_flag(given, message):
    with pytest.raises(UserError, match=message):
        resolve(given, "cpu")


def test_resuming_changes_only_what_may_change():
    saved = dataclasses.asdict(resolve({"depth": 2, "run": "a"}, "cpu"))
    again = resolve_resumed({"run": "a", "resume": True, "depth": 2, "save_every": 7}, saved)
    assert again.depth == 2 and again.save_every == 7
    with pytest.raises(UserError, match="--depth 4 differs from the run's 2"):
        resolve_resumed({"depth": 4}, saved)
    with pytest.raises(UserError, match="settings do not fit"):
        resolve_resumed({}, {**saved, "from_the_future": 1})
