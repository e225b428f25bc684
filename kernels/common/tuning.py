"""Launch configurations as data: a default per op in its file, tuned ones per GPU in tuned.json.

tuned.json maps a GPU's name to {op: {"config": {...}, "us": microseconds, "share": of the roof,
"rows" and "width" of the timed case}}; `python -m bench.tune` writes it. Entries from before
2026-11-28 have no share. A GPU without an entry gets the defaults, which are the winners of an H200
or an H100. Nothing is tuned at start-up.
"""

import contextlib
import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

TUNED = Path(__file__).with_name("tuned.json")
_forced = {}  # op -> configuration, inside a `forced` context
_aims = []  # the Gpu inside an `aimed_at` context


@dataclass(frozen=True)
class Tile:
    """A program's tile of rows x cols, its warps, and the stages of its software pipeline."""

    rows: int
    cols: int
    warps: int
    stages: int = 2


@dataclass(frozen=True)
class Gpu:
    """A GPU for which kernels are compiled where it need not be.

    Fields: name as the driver gives it, compute capability, streaming multiprocessors.
    """

    name: str
    capability: tuple[int, int]
    sms: int


@functools.cache
def _winners(gpu):
    if not TUNED.exists():
        return {}
    return json.loads(TUNED.read_text(encoding="utf-8")).get(gpu, {})


@functools.cache
def _device_name():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def gpu_name():
    """Name of the current CUDA device, or of what is aimed at; "cpu" without one."""
    return _aims[-1].name if _aims else _device_name()


def sm_count(device):
    """Streaming multiprocessors of a CUDA device; 2 in the interpreter, so that the loops of
    persistent kernels take several turns there too."""
    if _aims:
        return _aims[-1].sms
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def tuned(op, default, gpu=None):
    """The launch configuration of `op`: tuned.json's for the GPU, else `default`.

    Args:
        op: name of the op, the key in tuned.json.
        default: a frozen dataclass, such as Tile, whose fields the entry of tuned.json replaces.
        gpu: name of the GPU; None for the current one.
    """
    if op in _forced:
        return _forced[op]
    entry = _winners(gpu or gpu_name()).get(op)
    return default if entry is None else replace(default, **entry["config"])


@contextlib.contextmanager
def aimed_at(gpu):
    """Context in which configurations are those of `gpu`, a Gpu."""
    _aims.append(gpu)
    try:
        yield
    finally:
        _aims.pop()


@contextlib.contextmanager
def forced(op, config):
    """Context in which `tuned(op, ...)` returns `config`: to measure configurations."""
    _forced[op] = config
    try:
        yield
    finally:
        del _forced[op]
