"""What an attention backend is.

A backend attends with a causal sliding window: the query at position i sees the keys at positions
j with 0 <= i - j <= window. It takes q (B, T, H, D) and k, v (B, T, K, D) with K dividing H, which
may be strided views of one fused projection (last dimension contiguous), and returns (B, T, H, D).
Libraries are imported when a backend is loaded or first called, never with its module.
"""

import importlib

import torch


class AttentionBackend:
    """Base of all backends: a subclass sets `name` and defines `__call__(q, k, v, window) -> y`.

    Args:
        deterministic: ask for a backward pass that gives the same bits every time.
    """

    name = None
    title, install = None, None  # of its library, for the user
    module = None  # to import; None: torch alone
    cuda_only = True
    compilable = True  # torch.compile(fullgraph=True) takes it in
    capabilities = ((0, 0), (99, 0))  # of the GPUs it runs on, lowest and highest

    def __init__(self, deterministic=False):
        self.deterministic = deterministic

    def load(self):
        """Import the library.

        Raises:
            ImportError: it is not installed, or damaged.
        """
        if self.module:
            importlib.import_module(self.module)

    def is_part(self, module):
        """Whether `module` is the library's own or above it: without it, it is not installed."""
        return self.module is not None and f"{self.module}.".startswith(f"{module}.")

    def prepare(self, seq_len, windows, device):
        """Get ready for rows of seq_len tokens and these windows; most need nothing."""

    def forward(
        self,
        q,  # (B, T, H, D)
        k,  # (B, T, K, D)
        v,  # (B, T, K, D)
        window,
    ):
        """y (B, T, H, D) outside any autograd graph, and a list that `backward` empties."""
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            y = self(*leaves, window)
        return y.detach(), [y, *leaves]

    def backward(
        self,
        saved,
        grad_y,  # (B, T, H, D)
    ):
        """grad_q (B, T, H, D), grad_k, grad_v (B, T, K, D), maybe strided; once per forward.

        Raises:
            RuntimeError: a second backward pass of one forward pass.
        """
        y, *leaves = take(saved)
        return torch.autograd.grad(y, leaves, grad_y)


def take(saved):
    """The content of a list, which it then no longer holds.

    Raises:
        RuntimeError: it has been taken before.
    """
    if not saved:
        raise RuntimeError("this forward pass of attention has had its backward pass")
    content = tuple(saved)
    saved.clear()
    return content
