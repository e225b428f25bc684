"""Which way an op goes: through its kernel, or through its reference in plain PyTorch."""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["kernel", "eager"]
KERNEL_DTYPES = (torch.bfloat16, torch.float32)


def _has_triton() -> bool:
    """Whether Triton is installed; it is not imported, which would take a second."""
    try:
        return find_spec("triton") is not None
    except ImportError:
        return False


HAS_TRITON = _has_triton()


def runs_kernel(
    op: str,
    backend: Backend,
    tensors: Mapping[str, Tensor | None],
    dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES,
) -> bool:
    """Whether `op` runs its kernel on `tensors` by name (None is skipped), or its reference.

    Raises:
        RuntimeError: the kernel cannot run on this machine or on this device.
        ValueError: an unknown backend; tensors on different devices; a dtype that is not among
            `dtypes`, for a kernel.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"{op}: unknown backend {backend!r}; choose from kernel, eager")
    given = {name: x for name, x in tensors.items() if x is not None}
    first, device = next((name, x.device) for name, x in given.items())
    for name, x in given.items():
        if x.device != device:
            raise ValueError(f"{op}: {name} is on {x.device}, but {first} is on {device}")
    if backend == "eager":
        return False
    if not HAS_TRITON:
        raise RuntimeError(
            f"{op}: Triton is not installed (Linux: pip install triton); "
            'pass backend="eager" to run it in plain PyTorch'
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"{op}: its kernel needs a CUDA GPU, and {first} is on {device}; "
            'pass backend="eager" to run it in plain PyTorch'
        )
    for name, x in given.items():
        if x.is_floating_point() and x.dtype not in dtypes:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{op}: its kernel takes {names}, and {name} is {x.dtype}")
    return True
