"""Launch configurations as data: defaults here, measured winners by GPU in tuned.json.

tuned.json maps a GPU's name to {op: {"config": {...}, "us": microseconds, "shape": [...]}};
`python -m bench.tune` writes it. Nothing is tuned at start-up.
"""

import functools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

TUNED = Path(__file__).with_name("tuned.json")


@dataclass(frozen=True)
class Tile:
    """Block of rows x cols per program, warps per program, stages of the software pipeline."""

    rows: int
    cols: int
    warps: int
    stages: int = 2


DEFAULTS = {
    "bigram_residual": Tile(32, 128, 8),
    "bigram_residual_bwd": Tile(32, 128, 8),
    "residual_gradients": Tile(8, 1024, 8),
    "quantize": Tile(64, 128, 8),
    "smear": Tile(4, 1024, 4),
}


@functools.cache
def _tuned(gpu):
    if not TUNED.exists():
        return {}
    return json.loads(TUNED.read_text(encoding="utf-8")).get(gpu, {})


def gpu_name():
    """Name of the current CUDA device; "cpu" without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


@functools.cache
def tile(op, gpu=None):
    """Tile of a kernel: the winner measured on `gpu` (default: this one), else the default.

    Raises:
        KeyError: an op without a default.
    """
    default = DEFAULTS[op]
    entry = _tuned(gpu or gpu_name()).get(op)
    if entry is None:
        return default
    return replace(default, **{k: v for k, v in entry["config"].items() if k in asdict(default)})
