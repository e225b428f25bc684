"""Launch configurations as data: a default per op in its file, tuned ones per GPU in tuned.json.

tuned.json maps a GPU's name to {op: [entry, ...]}, an entry per width of a model: {"config": {...},
"us": microseconds, "share": of the roof, "rows" of the timed case, "width" of its model, "cols"
that the op asked for}; `python -m bench.tune` writes it. An op takes the entry whose columns are
nearest to its own. Entries from before 2026-11-28 have no share. A GPU without an entry gets the
defaults, which are the winners of an H200 or an H100. Nothing is tuned at start-up.
"""

import contextlib
import functools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

TUNED = Path(__file__).with_name("tuned.json")
_forced = {}  # op -> (configuration, columns asked for), inside a `forced` context
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


def capability(device):
    """Compute capability of a CUDA device, or of what is aimed at; (0, 0) of another device."""
    if _aims:
        return _aims[-1].capability
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.cache
def _nearest(gpu, op, cols):
    """The configuration of the entry with the nearest columns, by their ratio; None without any."""
    entries = _winners(gpu).get(op, [])

    def distance(entry):
        return abs(math.log(entry["cols"] / cols)) if cols and entry["cols"] else 0.0

    return min(entries, key=distance)["config"] if entries else None


def tuned(op, default, cols=None, gpu=None):
    """The launch configuration of `op`: tuned.json's for the GPU, else `default`.

    Args:
        op: name of the op, the key in tuned.json.
        default: a frozen dataclass, such as Tile, whose fields the entry of tuned.json replaces.
        cols: columns of what the op works on, as they grow with a model's width; None if they do
            not.
        gpu: name of the GPU; None for the current one.
    """
    if op in _forced:
        config, asked = _forced[op]
        asked.append(cols)
        return config
    found = _nearest(gpu or gpu_name(), op, cols)
    return default if found is None else replace(default, **found)


def is_forced(op):
    """Whether a configuration of `op` is being measured, or tested."""
    return op in _forced


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
    """Context in which `tuned(op, ...)` returns `config`: to measure configurations. Its value is
    the list of columns that `op` asks for."""
    _forced[op] = config, []
    try:
        yield _forced[op][1]
    finally:
        del _forced[op]
