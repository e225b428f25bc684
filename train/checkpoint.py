"""Checkpoints: safetensors for tensors, JSON for the rest, a folder renamed into place.

runs/NAME/tokenizer.json, metrics.jsonl
runs/NAME/step_000500/model.safetensors, optim.safetensors, loader.safetensors, meta.json
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanofuse.model.backends.torch_backends import SDPAttention
from nanofuse.model.config import GPTConfig
from nanofuse.model.gpt import GPT
from nanofuse.train.data.tokenizer import FILE_NAME, Tokenizer
from nanofuse.train.disk import SaveError, check_room, naming_save_errors, size_of
from nanofuse.train.errors import UserError
from nanofuse.train.files import (
    atomic_folder,
    remove_folder,
    remove_leftovers,
    sha256_of,
    sync,
    write_text_atomically,
)
from nanofuse.train.schemas import check_size, read_meta, tensor_shapes

FORMAT = 1
META, MODEL, OPTIM, LOADER = (
    "meta.json",
    "model.safetensors",
    "optim.safetensors",
    "loader.safetensors",
)
RUNS_DIR = Path("runs")
STEP_NAME = re.compile(r"step_(\d{6}|[1-9]\d{6,})")
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

    Where that fails, what killed saves left in the run's folder is removed and it is tried again.

    Args:
        directory: the run's folder.
        meta: JSON-able dict; "step", "format" and "files", the SHA-256 of each, are added.
        model: GPT; saved with its parameters' names and dtypes.
        optim_state, loader_tensors: flat {name: tensor}, left out where None.

    Raises:
        SaveError: it cannot be written; names the folder and the bytes that are missing.
    """
    folder = Path(directory) / f"step_{step:06d}"
    files = {MODEL: model.state_dict(), OPTIM: optim_state, LOADER: loader_tensors}
    files = {name: tensors for name, tensors in files.items() if tensors is not None}
    try:
        _write(folder, step, meta, files)
    except SaveError:
        remove_leftovers(directory)
        _write(folder, step, meta, files)
    return folder


def _write(folder: Path, step: int, meta: Mapping[str, Any], files: dict[str, Tensors]) -> None:
    needed = size_of(*files.values())
    check_room(folder, needed)
    with naming_save_errors(folder, needed), atomic_folder(folder) as temporary:
        for name, tensors in files.items():
            # copies, as safetensors refuses views of one storage
            plain = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
            path = temporary / name
            path.touch()  # with the umask's mode, which safetensors does not give
            mode = path.stat().st_mode
            save_file(plain, path)
            os.chmod(path, mode)
        with ThreadPoolExecutor() as pool:
            digests = pool.map(_digest, [temporary / name for name in files])
            facts = {
                "format": FORMAT,
                "step": step,
                "files": dict(zip(files, digests, strict=True)),
            }
        write_text_atomically(temporary / META, meta_text({**facts, **meta}))


def _digest(path: Path) -> str:
    sync(path)
    return sha256_of(path)


def meta_text(meta: Mapping[str, Any]) -> str:
    """meta.json's content."""
    return json.dumps(meta, indent=2) + "\n"


def amend_meta(folder: Path, values: Mapping[str, Any]) -> None:
    """Change values of a checkpoint's meta.json."""
    write_text_atomically(folder / META, meta_text({**load_meta(folder), **values}))


def _peek(folder: Path) -> dict[str, Any] | None:
    """meta.json as it is, or None where it cannot be read as JSON."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return meta if isinstance(meta, dict) else None


def _digests(folder: Path) -> dict[str, str]:
    """{file name: SHA-256} that meta.json gives; empty where it gives none, as up to 0.1."""
    files = (_peek(folder) or {}).get("files")
    return files if isinstance(files, dict) else {}


def is_complete(folder: Path) -> bool:
    """Whether every file of a checkpoint is there."""
    names = {META, MODEL, *(name for name in _digests(folder) if name in (OPTIM, LOADER))}
    return all((folder / name).is_file() for name in names)


def checkpoints(directory: Path | str) -> dict[int, Path]:
    """{step: folder} of a run's complete checkpoints, ascending; other names are not looked at."""
    found = {}
    for path in Path(directory).glob("step_*"):
        match = STEP_NAME.fullmatch(path.name)
        if match and is_complete(path):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def prune(directory: Path | str, keep: int) -> list[Path]:
    """Remove all but the last `keep` checkpoints and the best by validation BPB; returns them."""
    found = checkpoints(directory)
    if len(found) <= keep:
        return []
    bpbs = {step: (_peek(folder) or {}).get("val_bpb") for step, folder in found.items()}
    known = [(b, step) for step, b in bpbs.items() if isinstance(b, float) and b < math.inf]
    kept = {*list(found)[-keep:], *(step for _, step in sorted(known)[:1])}
    doomed = [folder for step, folder in found.items() if step not in kept]
    for folder in doomed:
        remove_folder(folder)
    return doomed


def runs_with_checkpoints() -> Iterator[str]:
    """Names of the runs that have a checkpoint, in order."""
    for directory in sorted(RUNS_DIR.glob("*")):
        if checkpoints(directory):
            yield directory.name


def find_checkpoint(directory: Path | str, step: int | None = None) -> Path:
    """Folder of a run's latest complete checkpoint, the one of the largest number, or of `step`.

    Raises:
        UserError: the run or the step does not exist.
    """
    found = checkpoints(directory)
    if not found:
        there = ", ".join(runs_with_checkpoints()) or "none"
        raise UserError(f"no checkpoint in {directory}; runs that have one: {there}")
    if step is None:
        return found[max(found)]
    if step not in found:
        names = ", ".join(map(str, found))
        raise UserError(f"{directory} has no checkpoint of step {step}; there are: {names}")
    return found[step]


def load_meta(folder: Path | str) -> dict[str, Any]:
    """meta.json of a checkpoint.

    Raises:
        UserError: missing, damaged or of another format.
    """
    path = Path(folder) / META
    try:
        return read_meta(path)
    except ValueError as error:
        raise UserError(
            f"{path} is missing, damaged or of another format ({error}); delete {folder} to use "
            "the checkpoint before it"
        ) from None


def load_tensors(path: Path | str) -> Tensors:
    """{name: tensor} of a safetensors file, on the CPU.

    Raises:
        UserError: missing or cut short, or another than the meta.json beside it was written with.
    """
    path = Path(path)
    hint = f"delete {path.parent} to use the checkpoint before it"
    digest = _digests(path.parent).get(path.name)
    try:
        if digest is not None and sha256_of(path) != digest:
            raise UserError(f"{path} is damaged, or of another checkpoint (its SHA-256); {hint}")
        return load_file(path)
    except (OSError, SafetensorError):
        raise UserError(f"{path} is missing or cut short; {hint}") from None


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


def load_tokenizer(
    directory: Path | str, config: GPTConfig, meta: Mapping[str, Any] | None = None
) -> Tokenizer:
    """The tokenizer kept with a run.

    Args:
        meta: of the checkpoint that it is to serve; None: only the sizes are compared.

    Raises:
        UserError: missing, of another vocabulary than the model, or not the checkpoint's.
    """
    path = Path(directory) / FILE_NAME
    tokenizer = Tokenizer.load(path)
    hint = "put the tokenizer it was trained with there"
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"{path} has {tokenizer.vocab_size} tokens, the model {config.vocab_size}; {hint}"
        )
    if (meta or {}).get("tokenizer") not in (None, tokenizer.fingerprint):
        raise UserError(f"{path} is another tokenizer than the checkpoint's; {hint}")
    return tokenizer


def config_of(meta: Mapping[str, Any], folder: Path | str) -> GPTConfig:
    """GPTConfig of a checkpoint's meta, of the size of its weights.

    Raises:
        UserError: fields missing or unknown, sizes that do not fit together, or not the weights.
    """
    try:
        config = GPTConfig(**meta["model_config"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder}: model_config does not fit this version ({error})") from None
    check_size(config, tensor_shapes(Path(folder) / MODEL), folder)
    return config


def load_model(
    folder: Path | str, device: torch.device, dtype: torch.dtype
) -> tuple[GPT, dict[str, Any]]:
    """The model of a checkpoint, ready for generation, and its meta."""
    meta = load_meta(folder)
    model = GPT(config_of(meta, folder), dtype, SDPAttention(), device)
    load_weights(model, load_tensors(Path(folder) / MODEL), Path(folder) / MODEL)
    return model.eval(), meta
