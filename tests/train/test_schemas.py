"""What meta.json may hold."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nanofuse.model.config import GPTConfig
from nanofuse.train.errors import UserError
from nanofuse.train.schemas import (
    MAX_FILE_BYTES,
    NanochatMeta,
    check_size,
    read_json,
    read_meta,
    tensor_shapes,
)

OLD = Path(__file__).parent / "meta-0.1.json"  # as 0.1 wrote it
REMOVED = object()


@pytest.fixture
def edited(tmp_path):
    """Writes 0.1's meta.json with one value replaced or removed."""

    def write(place, value):
        meta = holder = json.loads(OLD.read_text())
        *path, key = place.split(".")
        for part in path:
            holder = holder[part]
        if value is REMOVED:
            del holder[key]
        else:
            holder[key] = value
        file = tmp_path / "meta.json"
        file.write_text(json.dumps(meta))
        return file

    return write


def test_a_meta_of_version_0_1_is_read_as_it_is():
    assert read_meta(OLD) == json.loads(OLD.read_text())


def test_a_converted_checkpoint_has_no_training(edited):
    meta = json.loads(OLD.read_text())
    path = edited("step", 2)
    path.write_text(json.dumps({name: meta[name] for name in ("format", "step", "model_config")}))
    assert set(read_meta(path)) == {"format", "step", "model_config"}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((f"model_config.{name}", value)
          for name in ("n_layer", "n_head", "n_kv_head", "n_embd", "sequence_len", "vocab_size")
          for value in (0, -1, 2**63, 10**9, 1e308, 2.0, "2", None, True, [], REMOVED)),
        *((name, value)
          for name in ("step", "num_iterations", "optimizer_steps", "loader.unit", "loader.epoch")
          for value in (-1, 2**63, 2.0, float("nan"), "2", None, False, [], REMOVED)),
        *((name, value)
          for name in ("progress.train_seconds", "progress.loss", "val_bpb")
          for value in (float("nan"), float("inf"), "1", [], True)),
        ("format", 2),
        ("step", 3),  # progress and steps of the optimiser are others
        ("optimizer_steps", 3),
        ("progress", REMOVED),
        ("loader", None),
        ("settings", []),
        ("settings.depth", 3),
        ("settings.depth", "2"),
        ("settings.max_seq_len", 128),
        ("model_config.window_pattern", "L"),
        ("model_config.window_pattern", "S" * 10**5),
        ("model_config.sequence_len", 128),
        ("model_config.bigram_lambda_init", float("inf")),
        ("model_config.rope_base", 1),
        ("loader.corpus", 7),
    ],
)  # fmt: skip
def test_what_it_may_not_hold_is_named(edited, place, value):
    with pytest.raises(ValueError) as error:
        read_meta(edited(place, value))
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b"{", b"[" * 10**6, b'{"a":' * 10**6, b"\xff\xfe\x00", b"9" * 10**5],
    ids=lambda content: repr(content[:5]),
)
@pytest.mark.parametrize("read", [read_meta, lambda path: read_json(path, NanochatMeta)])
def test_what_is_no_json_of_that_kind(tmp_path, content, read):
    path = tmp_path / "meta.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read(path)
    assert "\n" not in str(error.value)


def test_what_is_no_file_or_too_large_is_not_read(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_meta(tmp_path / "none.json")
    with pytest.raises(ValueError, match="not a regular file"):
        read_meta(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    with pytest.raises(ValueError, match="not a regular file"):
        read_meta(tmp_path / "pipe")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ValueError, match="bytes"):
        read_meta(tmp_path / "large")


def test_sizes_are_those_of_the_header(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, path)
    assert tensor_shapes(path) == {"a": (2, 3), "b": (4,)}
    config = GPTConfig.from_depth(12)
    with pytest.raises(UserError, match=r"claims [\d,]+ parameters, the file holds 10$"):
        check_size(config, tensor_shapes(path), path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match="cut short"):
        tensor_shapes(path)
