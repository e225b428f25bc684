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
    move_aside,
    not_read,
    remove_leftovers,
    sha256_of,
    sync,
    way_out,
    write_text_atomically,
)
from nanofuse.train.optim_files import OptimFiles, Rows, rows_text
from nanofuse.train.ranks import ALONE, Alone
from nanofuse.train.run_folder import (
    LOADER,
    META,
    MODEL,
    OPTIM,
    digests,
    is_complete,
    load_meta,
    meta_text,
    optim_files,
    optim_name,
)
from nanofuse.train.schemas import FORMAT, check_size, tensor_shapes

Tensors = dict[str, torch.Tensor]


def save_checkpoint(
    directory: Path | str,
    step: int,
    meta: Mapping[str, Any],
    model: GPT,
    optim_state: Tensors | None = None,
    loader_tensors: Tensors | None = None,
    ranks: Alone = ALONE,
    rows: Rows | None = None,
) -> Path:
    """Write the checkpoint of one step; returns its folder. Every rank calls it at once: each
    writes its own file of the optimiser's state, rank 0 all the rest.

    Where that fails, what killed saves left in the run's folder is removed and it is tried again.

    Args:
        directory: the run's folder, which all ranks see.
        meta: JSON-able dict; "step", "format" and "files", the SHA-256 of each, are added.
        model: GPT; saved with its parameters' names and dtypes.
        optim_state, loader_tensors: flat {name: tensor}, left out where None.
        ranks: those that train.
        rows: which rows of the whole the tensors of optim_state are, MuonAdamW.rows; None: all.

    Raises:
        SaveError: it cannot be written; names the folder and the bytes that are missing. On every
            rank where it happens on one.
    """
    folder = Path(directory) / f"step_{step:06d}"
    own = {} if optim_state is None else {optim_name(ranks.rank, ranks.world): optim_state}
    if ranks.main:
        own = {MODEL: model.state_dict(), **own}
        if loader_tensors is not None:
            own[LOADER] = loader_tensors
    facts = {"format": FORMAT, "step": step}
    save = _Save(folder, ranks, own, rows_text(rows) if rows else None)
    try:
        save.write({**facts, **meta})
    except SaveError:
        if ranks.main:
            remove_leftovers(directory)
        save.write({**facts, **meta})
    return folder


class _Save:
    """One checkpoint on its way to the disk.

    Args:
        folder: its place.
        ranks: those that write it.
        own: {file name: {name: tensor}} of this rank.
        metadata: of this rank's file of the optimiser's state.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Alone,
        own: dict[str, Tensors],
        metadata: dict[str, str] | None,
    ):
        self.folder, self.ranks, self.own, self.metadata = folder, ranks, own, metadata
        self.needed = sum(ranks.collect(size_of(*own.values())))

    def write(self, meta: Mapping[str, Any]) -> None:
        """Write all files; every rank raises where one fails."""
        error = None
        try:
            if self.ranks.main:
                self._lead(meta)
            else:
                self._follow()
        except SaveError as failure:
            error = str(failure)
        errors = [e for e in self.ranks.collect(error) if e is not None]
        if errors:
            raise SaveError(errors[0])

    def _lead(self, meta: Mapping[str, Any]) -> None:
        temporary = None
        try:
            check_room(self.folder, self.needed)
            with naming_save_errors(self.folder, self.needed), atomic_folder(self.folder) as there:
                if os.path.lexists(self.folder) and not is_complete(self.folder):
                    aside = move_aside(self.folder)
                    print(f"run: {self.folder} is not complete; it is {aside} now")
                temporary = self.ranks.share(there)
                files = self._write_own(there)
                write_text_atomically(there / META, meta_text({**meta, "files": files}))
        finally:
            if temporary is None:
                self.ranks.share(None)  # there is nothing to write into

    def _follow(self) -> None:
        temporary = self.ranks.share(None)
        if temporary is not None:
            self._write_own(temporary)

    def _write_own(self, temporary: Path) -> dict[str, str]:
        """Write this rank's files; {name: SHA-256} of those of all ranks."""
        error, sums = None, {}
        try:
            with naming_save_errors(self.folder, self.needed):
                for name, tensors in self.own.items():
                    partial = self.metadata if name not in (MODEL, LOADER) else None
                    write_tensors(temporary / name, tensors, partial)
                with ThreadPoolExecutor() as pool:
                    found = pool.map(_digest, [temporary / name for name in self.own])
                    sums = dict(zip(self.own, found, strict=True))
        except SaveError as failure:
            error = failure
        every = self.ranks.collect((sums, error is None))
        if error is not None:
            raise error
        if not all(written for _, written in every):
            raise SaveError(f"{self.folder} cannot be saved: another rank failed")
        return {name: digest for part, _ in every for name, digest in part.items()}


def write_tensors(path: Path, tensors: Tensors, metadata: dict[str, str] | None) -> None:
    """Write tensors as a safetensors file that has the umask's mode."""
    # copies, as safetensors refuses views of one storage
    plain = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
    path.touch()  # with the umask's mode, which safetensors does not give
    mode = path.stat().st_mode
    save_file(plain, path, metadata)
    os.chmod(path, mode)


def _digest(path: Path) -> str:
    sync(path)
    return sha256_of(path)


def load_tensors(path: Path | str) -> Tensors:
    """{name: tensor} of a safetensors file, on the CPU.

    Raises:
        UserError: missing or cut short, or another than the meta.json beside it was written with.
    """
    path = Path(path)
    check_digest(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(not_read(path, error, "is missing or cut short")) from None


def check_digest(path: Path) -> None:
    """Compare a file of a checkpoint with the sum in the meta.json beside it, where it has one.

    Raises:
        UserError: it is missing, or another.
    """
    digest = digests(path.parent).get(path.name)
    try:
        same = digest is None or sha256_of(path) == digest
    except OSError as error:
        raise UserError(not_read(path, error, "is missing or cut short")) from None
    if not same:
        raise UserError(
            f"{path} is damaged, or of another checkpoint (its SHA-256); {way_out(path.parent)}"
        )


def load_optim(folder: Path) -> Mapping[str, torch.Tensor]:
    """{name: whole tensor} of the optimiser's state of a checkpoint, of any number of ranks.

    Raises:
        UserError: a file is missing, damaged or another checkpoint's.
    """
    paths = [folder / name for name in optim_files(folder) or [OPTIM]]
    if len(paths) == 1 and paths[0].name == OPTIM:
        return load_tensors(paths[0])
    for path in paths:
        check_digest(path)
    return OptimFiles(paths)


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
    hint = "put the tokenizer it was trained with there"
    tokenizer = Tokenizer.load(path, hint)
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
