"""Checkpoints: safetensors for tensors, JSON for the rest, a folder renamed into place.

runs/NAME/tokenizer.json, metrics.jsonl
runs/NAME/step_000500/model.safetensors, optim.safetensors, loader.safetensors, meta.json
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanofuse.model.backends.torch_backends import SDPAttention
from nanofuse.model.config import GPTConfig
from nanofuse.model.gpt import GPT
from nanofuse.train.data.tokenizer import FILE_NAME, Tokenizer
from nanofuse.train.errors import UserError
from nanofuse.train.files import atomic_folder

FORMAT = 1
META, MODEL, OPTIM, LOADER = (
    "meta.json",
    "model.safetensors",
    "optim.safetensors",
    "loader.safetensors",
)
RUNS_DIR = Path("runs")
Tensors = dict[str, torch.Tensor]


def run_dir(name: str) -> Path:
    """Folder of a run.

    Raises:
        UserError: a name that is not a plain folder name.
    """
    if not re.fullmatch(r"[\w][\w.+-]*", name):
        raise UserError(f"--run {name!r} must be letters, digits and . _ + - only")
    return RUNS_DIR / name


def save_checkpoint(
    directory: Path | str,
    step: int,
    meta: Mapping[str, Any],
    model: GPT,
    optim_state: Tensors | None = None,
    loader_tensors: Tensors | None = None,
) -> Path:
    """Write the checkpoint of one step; returns its folder.

    Args:
        directory: the run's folder.
        meta: JSON-able dict; "step" and "format" are added.
        model: GPT; saved with its parameters' names and dtypes.
        optim_state, loader_tensors: flat {name: tensor}, left out where None.
    """
    folder = Path(directory) / f"step_{step:06d}"
    files = {MODEL: model.state_dict(), OPTIM: optim_state, LOADER: loader_tensors}
    with atomic_folder(folder) as temporary:
        for name, tensors in files.items():
            if tensors is not None:
                # copies, as safetensors refuses views of one storage
                plain = {
                    k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()
                }
                save_file(plain, temporary / name)
        text = json.dumps({"format": FORMAT, "step": step, **meta}, indent=2)
        (temporary / META).write_text(text + "\n", encoding="utf-8")
    return folder


def find_checkpoint(directory: Path | str, step: int | None = None) -> Path:
    """Folder of a run's latest checkpoint, or of `step`.

    Raises:
        UserError: the run or the step does not exist.
    """
    directory = Path(directory)
    folders = sorted(directory.glob("step_*"))
    if not folders:
        there = ", ".join(sorted(p.parent.name for p in RUNS_DIR.glob("*/step_*"))) or "none"
        raise UserError(f"no checkpoint in {directory}; runs that have one: {there}")
    if step is None:
        return folders[-1]
    folder = directory / f"step_{step:06d}"
    if folder not in folders:
        names = ", ".join(str(int(f.name.removeprefix("step_"))) for f in folders)
        raise UserError(f"{directory} has no checkpoint of step {step}; there are: {names}")
    return folder


def load_meta(folder: Path | str) -> dict[str, Any]:
    """meta.json of a checkpoint.

    Raises:
        UserError: missing, damaged or of another format.
    """
    path = Path(folder) / META
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] == FORMAT and isinstance(meta["model_config"], dict):
            return meta
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} is missing, damaged or of another format; delete {folder}")


def load_tensors(path: Path | str) -> Tensors:
    """{name: tensor} of a safetensors file, on the CPU.

    Raises:
        UserError: missing or cut short.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        raise UserError(
            f"{path} is missing or cut short; delete {Path(path).parent} to use the checkpoint "
            "before it"
        ) from None


def load_weights(model: GPT, tensors: Tensors, source: Path | str) -> None:
    """Copy {name: tensor} into a model, casting to its dtypes.

    Raises:
        UserError: names or shapes differ; nothing is copied then.
    """
    mine = model.state_dict()
    for name in sorted(mine.keys() | tensors.keys()):
        shapes = [tuple(d[name].shape) if name in d else None for d in (tensors, mine)]
        if shapes[0] != shapes[1]:
            there, here = (str(s) if s else "missing" for s in shapes)
            raise UserError(f"{source}: {name} is {there}, the model's is {here}")
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])


def load_tokenizer(directory: Path | str, config: GPTConfig) -> Tokenizer:
    """The tokenizer kept with a run.

    Raises:
        UserError: missing, or of another vocabulary than the model.
    """
    path = Path(directory) / FILE_NAME
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"{path} has {tokenizer.vocab_size} tokens, the model {config.vocab_size}; "
            "put the tokenizer it was trained with there"
        )
    return tokenizer


def config_of(meta: Mapping[str, Any], source: Path | str) -> GPTConfig:
    """GPTConfig of a checkpoint's meta.

    Raises:
        UserError: fields missing or unknown, or sizes that do not fit together.
    """
    try:
        return GPTConfig(**meta["model_config"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: model_config does not fit this version ({error})") from None


def load_model(
    folder: Path | str, device: torch.device, dtype: torch.dtype
) -> tuple[GPT, dict[str, Any]]:
    """The model of a checkpoint, ready for generation, and its meta."""
    meta = load_meta(folder)
    model = GPT(config_of(meta, folder), dtype, SDPAttention(), device)
    load_weights(model, load_tensors(Path(folder) / MODEL), Path(folder) / MODEL)
    return model.eval(), meta
