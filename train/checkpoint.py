"""Checkpoints: safetensors for tensors, JSON for the rest, a folder renamed into place.

train/run_folder.py has their names and finds them.
"""

import os
from collections.abc import Mapping
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
    remove_leftovers,
    sha256_of,
    sync,
    write_text_atomically,
)
from nanofuse.train.run_folder import LOADER, META, MODEL, OPTIM, digests, load_meta, meta_text
from nanofuse.train.schemas import FORMAT, check_size, tensor_shapes

Tensors = dict[str, torch.Tensor]


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
            sums = pool.map(_digest, [temporary / name for name in files])
            facts = {
                "format": FORMAT,
                "step": step,
                "files": dict(zip(files, sums, strict=True)),
            }
        write_text_atomically(temporary / META, meta_text({**facts, **meta}))


def _digest(path: Path) -> str:
    sync(path)
    return sha256_of(path)


def load_tensors(path: Path | str) -> Tensors:
    """{name: tensor} of a safetensors file, on the CPU.

    Raises:
        UserError: missing or cut short, or another than the meta.json beside it was written with.
    """
    path = Path(path)
    hint = f"delete {path.parent} to use the checkpoint before it"
    digest = digests(path.parent).get(path.name)
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
