"""Launch configurations as data: each op names its default, tuned.json the winners by GPU.

The defaults serve GPUs that nobody has tuned for; they won on an H200 or an H100.

tuned.json maps a GPU's name to {op: {"config": {...}, "us": microseconds, "rows": of the case}};
`python -m bench.tune` writes it. Nothing is tuned at start-up.
"""

import contextlib
import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

TUNED = Path(__file__).with_name("tuned.json")
_forced = {}  # op -> configuration, within `forced`


@dataclass(frozen=True)
class Tile:
    """Block of rows x cols per program, warps per program, stages of the software pipeline."""

    rows: int
    cols: int
    warps: int
    stages: int = 2


@functools.cache
def _winners(gpu):
    if not TUNED.exists():
        return {}
    return json.loads(TUNED.read_text(encoding="utf-8")).get(gpu, {})


@functools.cache
def gpu_name():
    """Name of the current CUDA device; "cpu" without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def sm_count(device):
    """Multiprocessors of a CUDA device; 2 for the interpreter, so that persistent loops turn."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def tuned(op, default, gpu=None):
    """Configuration of `op` (a name): what won on `gpu` (default: this one), else `default`.

    Args:
        default: a frozen dataclass, such as Tile; the entry of tuned.json replaces its fields.
    """
    if op in _forced:
        return _forced[op]
    entry = _winners(gpu or gpu_name()).get(op)
    return default if entry is None else replace(default, **entry["config"])


@contextlib.contextmanager
def forced(op, config):
    """Within the context `op` runs with `config`: for measuring one against another."""
    _forced[op] = config
    try:
        yield
    finally:
        del _forced[op]
