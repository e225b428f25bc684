"""Reading nanochat's checkpoints (karpathy/nanochat at dc54a1a).

They are model_NNNNNN.pt, a dict of tensors under this project's names, and meta_NNNNNN.json, whose
model_config has this project's field names. What does not fit is refused before anything of the
claimed size is allocated.
"""

import re
import warnings
from pathlib import Path

import torch
from pydantic import ValidationError

from nanofuse.kernels.softcap_cross_entropy import LOGIT_SOFTCAP
from nanofuse.model.config import ROTARY_BASE, GPTConfig
from nanofuse.model.gpt import GPT
from nanofuse.train.checkpoint import load_weights
from nanofuse.train.errors import UserError
from nanofuse.train.memory import check_inference_memory
from nanofuse.train.schemas import NanochatMeta, Sizes, check_size, first_reason, read_json

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
    "bigram_embed_factor": 0,
}


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
    """(GPTConfig of a dense model, val_bpb or None) of a meta file.

    Raises:
        UserError: missing, damaged, or of a model with other parts.
    """
    try:
        meta = read_json(path, NanochatMeta)
        known = {name: meta.declared[name] for name in meta.declared if name in Sizes.model_fields}
        sizes = Sizes.model_validate(known)
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
        return GPTConfig(**sizes.model_dump(), bigram_embed_factor=0), meta.val_bpb
    except UserError:
        raise
    except ValidationError as error:
        reason = f"model_config: {first_reason(error)}"
    except ValueError as error:
        reason = str(error)
    raise UserError(f"{path} is missing, damaged or not of nanochat ({reason})") from None


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
    """(a dense GPT in fp32 on the CPU with nanochat's weights, its step, its val_bpb or None).

    Raises:
        UserError: files missing or damaged, or weights that do not fit the architecture.
    """
    directory = Path(directory)
    step = find_step(directory, step)
    weights = directory / f"model_{step:06d}.pt"
    config, val_bpb = read_meta(directory / f"meta_{step:06d}.json")
    tensors = read_tensors(weights)
    check_size(config, {name: tuple(t.shape) for name, t in tensors.items()}, weights)
    check_inference_memory(config, 2 * 4, torch.device("cpu"))  # the weights twice
    model = GPT(config)
    load_weights(model, {name: t.float() for name, t in tensors.items()}, weights)
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(f"{weights}: {name} has values that are no finite numbers")
    return model, step, val_bpb
