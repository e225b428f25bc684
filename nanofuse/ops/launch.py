"""Calls of kernels, outside of what torch.compile traces.

Ops import this module where they call it: the decorator imports the compiler, which takes a second.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes, of the first element: the widest access of a thread


def _dense(x: Tensor) -> Tensor:
    """x, or a copy of it that is contiguous and aligned."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Launches go to the current GPU, which need not be the one that holds the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@torch.compiler.disable
def launch(
    function: Callable[..., Any],
    x: Tensor,  # says the device
    *args: Any,
    **kwargs: Any,
) -> Any:
    """function(x, *args, **kwargs) of dense tensors."""
    args = tuple(_dense(a) if isinstance(a, Tensor) else a for a in (x, *args))
    kwargs = {name: _dense(a) if isinstance(a, Tensor) else a for name, a in kwargs.items()}
    with _on(x.device):
        return function(*args, **kwargs)


@torch.compiler.disable
@torch.no_grad()
def launch_in_place(
    function: Callable[..., Any],
    written: Sequence[Tensor],
    *read: Tensor,
) -> None:
    """function(*written, *read) of dense tensors; copies of written ones are copied back."""
    dense = [_dense(x) for x in written]
    with _on(written[0].device):
        function(*dense, *(_dense(x) for x in read))
    for x, copy in zip(written, dense, strict=True):
        if copy is not x:
            x.copy_(copy)
