"""nanochat's files, read and written (karpathy/nanochat at dc54a1a; PR 747 for bigram models).

A checkpoint is model_NNNNNN.pt, a dict of tensors under this project's names, and meta_NNNNNN.json,
whose model_config has this project's field names. What does not fit is refused before anything of
the claimed size is allocated. Under one base directory nanochat keeps

    base_checkpoints/TAG/model_NNNNNN.pt, meta_NNNNNN.json      a folder for each model
    tokenizer/tokenizer.pkl, token_bytes.pt                     one for all of them
"""

import json
import os
import re
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import ValidationError

from nanofuse.kernels.bigram_rows import HASH_CURRENT
from nanofuse.kernels.softcap_cross_entropy import LOGIT_SOFTCAP
from nanofuse.model.config import BIGRAM_FIELDS, NANOCHAT_FIELDS, ROTARY_BASE, GPTConfig
from nanofuse.model.gpt import GPT
from nanofuse.train.checkpoint import load_weights
from nanofuse.train.data.pickled import PICKLE, load_pickled, pickled
from nanofuse.train.disk import saving
from nanofuse.train.errors import UserError
from nanofuse.train.files import atomic_folder
from nanofuse.train.memory import check_inference_memory
from nanofuse.train.schemas import (
    NanochatMeta,
    NanochatSizes,
    check_size,
    first_reason,
    read_json,
)

COMPILED_PREFIX = "_orig_mod."  # torch.compile's, in checkpoints of compiled models
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Fields that forks add, with the values that say what this model does.
OURS = {
    "rope_base": ROTARY_BASE,
    "rope_theta": ROTARY_BASE,
    "rotary_base": ROTARY_BASE,
    "softcap": LOGIT_SOFTCAP,
    "logit_softcap": LOGIT_SOFTCAP,
    "dropout": 0,
    "bias": False,
}
# What nanochat takes for parameters that checkpoints from before they were there lack.
NEUTRAL = {"resid_lambdas": 1.0, "x0_lambdas": 0.0}
TOKEN_BYTES = "token_bytes.pt"
MAX_HASHED = 2**31 // HASH_CURRENT + 1  # tokens whose hash nanochat's int32 holds


class Found(NamedTuple):
    """A checkpoint of nanochat."""

    model: GPT  # in fp32 on the CPU
    step: int
    val_bpb: float | None
    assumed: list[str]  # what it does not say, in words


def find_step(directory, step=None):
    """The step of a checkpoint that is there: the latest unless one is given.

    Raises:
        UserError: there is none, or not that one.
    """
    steps = sorted(
        int(match[1])
        for path in directory.glob("model_*.pt")
        if (match := re.fullmatch(r"model_(\d{1,18})\.pt", path.name))
    )
    if not steps:
        raise UserError(f"{directory} holds no model_NNNNNN.pt; name nanochat's checkpoint folder")
    if step is not None and step not in steps:
        raise UserError(f"{directory} has no step {step}; there are: {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step


def read_meta(path):
    """(GPTConfig, val_bpb or None, whether it says its window_pattern) of a meta file.

    Raises:
        UserError: missing, damaged, or of a model with other parts.
    """
    try:
        meta, fields = read_json(path, NanochatMeta), NanochatSizes.model_fields
        known = {name: meta.declared[name] for name in meta.declared if name in fields}
        sizes = NanochatSizes.model_validate(known)
        other = [
            f"{name} {value!r:.50}"
            for name, value in meta.declared.items()
            if name not in known and (type(value), value) not in _allowed(name)
        ]
        if other:
            raise UserError(
                f"{path}: model_config has {', '.join(other[:5])}, which this model does not do; "
                "it would compute something else"
            )
        config = GPTConfig(**sizes.model_dump())
        check_hash(config, path)
        return config, meta.val_bpb, "window_pattern" in known
    except UserError:
        raise
    except ValidationError as error:
        reason = f"model_config: {first_reason(error)}"
    except ValueError as error:
        reason = str(error)
    raise UserError(f"{path} is missing, damaged or not of nanochat ({reason})") from None


def check_hash(config, source):
    """Refuse a bigram table that nanochat and this project would look up in other rows."""
    if config.bigram_embed_factor and config.vocab_size > MAX_HASHED:
        raise UserError(
            f"{source}: nanochat's bigram hash overflows from {MAX_HASHED + 1:,} tokens on, and "
            f"the vocabulary has {config.vocab_size:,}; such a model cannot be converted"
        )


def _allowed(name):
    """(type, value) of what a field may have that is not nanochat's own."""
    value = OURS.get(name)
    kinds = (type(value),) if isinstance(value, bool) else (int, float)
    return [] if value is None else [(kind, value) for kind in kinds]


def read_tensors(path):
    """{name: tensor} of a weights file, mapped and not read where its format allows.

    Raises:
        UserError: damaged, or something else than real numbers under names.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of storages of old files
            try:
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # a file of before the zip format cannot be mapped
                found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever a damaged or foreign file leads its reader into
        raise UserError(f"{path} is damaged or holds more than tensors; copy it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}, not a dict of tensors")
    tensors = {}
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            kind = type(tensor).__name__
            raise UserError(f"{path} holds a {kind} under {name!r:.50}, not tensors under names")
        if tensor.dtype not in DTYPES:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{path}: {name:.100} is {dtype}; only float32, bfloat16, float16 and float64 are "
                "weights"
            )
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise UserError(f"{path}: {name:.100} is sparse or without values, not a plain tensor")
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: {name:.100} claims more values than the file holds")
        tensors[name.removeprefix(COMPILED_PREFIX)] = tensor
    return tensors


def from_nanochat(directory, step=None):
    """The Found of a checkpoint folder; the latest step unless one is given.

    Raises:
        UserError: files missing or damaged, or weights that do not fit the architecture.
    """
    directory = Path(directory)
    step = find_step(directory, step)
    weights = directory / f"model_{step:06d}.pt"
    config, val_bpb, says_windows = read_meta(directory / f"meta_{step:06d}.json")
    tensors = read_tensors(weights)
    check_size(config, {name: tuple(t.shape) for name, t in tensors.items()}, weights)
    check_inference_memory(config, 2 * 4, torch.device("cpu"))  # the weights twice
    model = GPT(config)
    assumed = [] if says_windows else ["window_pattern L"]
    for name, value in NEUTRAL.items():
        if name not in tensors:
            tensors[name] = torch.full((config.n_layer,), value)
            assumed.append(f"{name} {value:g}")
    if missing := sorted(model.state_dict().keys() - tensors.keys()):
        raise UserError(
            f"{weights} lacks {', '.join(missing[:3])}: it is not whole, or of a nanochat whose "
            "model had other parts, which cannot be converted"
        )
    load_weights(model, {name: t.float() for name, t in tensors.items()}, weights)
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(f"{weights}: {name} has values that are no finite numbers")
    return Found(model, step, val_bpb, assumed)


def tokenizer_folder(directory):
    """Where nanochat has the tokenizer of a checkpoint folder: beside the folder of checkpoints
    that it is in, or else, which is our own way, in itself."""
    directory = Path(os.path.abspath(directory))
    base = directory.parent
    return (base.parent if base.name.endswith("_checkpoints") else directory) / "tokenizer"


def find_pickle(directory):
    """The tokenizer.pkl that belongs to a checkpoint folder, or None."""
    folders = Path(os.path.abspath(directory), "tokenizer"), tokenizer_folder(directory)
    return next((f / PICKLE for f in folders if os.path.lexists(f / PICKLE)), None)


def to_nanochat(target, config, step, val_bpb, tensors, tokenizer=None):
    """Write a checkpoint folder, and the tokenizer where nanochat looks for it; returns the
    latter's folder or None.

    Args:
        tokenizer: of the model; None: none is written.

    Raises:
        UserError: the folder exists or cannot be written, or another tokenizer is there, or the
            hash would overflow.
    """
    check_hash(config, target)
    if os.path.lexists(target):
        raise UserError(f"{target} exists; name a folder to be made")
    fields = NANOCHAT_FIELDS + (BIGRAM_FIELDS if config.bigram_embed_factor else ())
    facts = {
        "step": step,
        "val_bpb": val_bpb,
        "model_config": {name: getattr(config, name) for name in fields},
    }
    place = tokenizer_folder(target) if tokenizer else None
    inside = place == Path(os.path.abspath(target), "tokenizer")
    write = tokenizer and (inside or not _is_there(place, tokenizer))
    with saving(target, tensors), ExitStack() as stack:
        temporary = stack.enter_context(atomic_folder(target))
        _save(tensors, temporary / f"model_{step:06d}.pt")
        text = json.dumps(facts, indent=2, allow_nan=False)
        (temporary / f"meta_{step:06d}.json").write_text(text, encoding="utf-8")
        if write:
            folder = temporary / "tokenizer"
            if not inside:
                folder = stack.enter_context(atomic_folder(place))
            _write_tokenizer(folder, tokenizer)
    return place


def _save(tensors, path):
    """torch.save, whose failing writes are an OSError."""
    try:
        with open(path, "xb") as file:  # torch's own file says nothing about a full disk
            torch.save(tensors, file)
    except RuntimeError as error:  # of the end of the archive, which torch writes all the same
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _is_there(place, tokenizer):
    """Whether a folder holds this tokenizer.

    Raises:
        UserError: it holds something else.
    """
    if not os.path.lexists(place):
        return False
    try:
        same = load_pickled(place / PICKLE).fingerprint == tokenizer.fingerprint
    except UserError:
        same = False
    if not same:
        raise UserError(
            f"{place} does not hold the run's tokenizer, and nanochat has one for all checkpoints "
            "beside it; name a DIR under another folder"
        )
    return True


def _write_tokenizer(folder, tokenizer):
    """tokenizer.pkl and token_bytes.pt: (vocab_size,) int32, whose sums torch makes int64."""
    folder.mkdir(exist_ok=True)
    (folder / PICKLE).write_bytes(pickled(tokenizer))
    torch.save(torch.from_numpy(tokenizer.token_bytes()).int(), folder / TOKEN_BYTES)
