"""The interface of attention backends.

A backend computes causal attention with a sliding window: the query at position i sees the keys at
positions j with 0 <= i - j <= window. It takes q (B, T, H, D) and k, v (B, T, K, D) with K dividing
H, which may be strided views of a fused QKV buffer (last dimension contiguous), and returns
(B, T, H, D). Its library is imported by its record (model/providers.py) or the first call, not when
its module is imported.
"""

import torch


class _WithGradient(torch.autograd.Function):
    """Nothing () of y, whose gradient is a given one. Given to torch.autograd.grad itself, a
    gradient has its shape compared by sympy, whose import takes seconds."""

    @staticmethod
    def forward(
        ctx,
        y,  # any shape
        grad_y,  # the same shape
    ):
        ctx.save_for_backward(grad_y)
        return y.new_zeros(())

    @staticmethod
    def backward(
        ctx,
        one,  # ()
    ):
        return *ctx.saved_tensors, None


class AttentionBackend:
    """Base of all backends: a subclass defines `__call__(q, k, v, window) -> y`.

    Args:
        deterministic: require a backward pass with the same bits on every run.

    Attributes:
        any_length: whether it takes other lengths than the one that `prepare` was told.
    """

    any_length = True

    def __init__(self, deterministic=False):
        self.deterministic = deterministic

    def prepare(self, seq_len, windows, device):
        """Prepare for sequences of seq_len tokens and these windows; most backends need nothing."""

    def leave_sums(self, config, device):
        """Have `backward` give grad_q as kernels.common.attention_sums.AttentionSums where the
        library has them: one pass less over it.

        Args:
            config: GPTConfig.
            device: torch.device of what will be computed.

        Returns:
            a line for the log that says whether it will; None of a library without sums.
        """
        return None

    def forward(
        self,
        q,  # (B, T, H, D)
        k,  # (B, T, K, D)
        v,  # (B, T, K, D)
        window,
    ):
        """Forward pass without autograd: y (B, T, H, D), and a list of what `backward` needs."""
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            y = self(*leaves, window)
        return y.detach(), [y, *leaves]

    def backward(
        self,
        saved,  # from `forward`; emptied
        grad_y,  # (B, T, H, D) upstream gradient
    ):
        """Backward pass, once per forward pass: grad_q (B, T, H, D), grad_k and grad_v
        (B, T, K, D), of any strides; after `leave_sums` grad_q may be AttentionSums.

        Raises:
            RuntimeError: a second backward pass of one forward pass.
        """
        y, *leaves = take(saved)
        with torch.enable_grad():
            nothing = _WithGradient.apply(y, grad_y)
        return torch.autograd.grad(nothing, leaves)


def take(saved):
    """The content of the list `saved` as a tuple; empties the list, so that nothing else keeps the
    tensors alive.

    Raises:
        RuntimeError: the list is empty already.
    """
    if not saved:
        raise RuntimeError("this forward pass of attention has had its backward pass")
    content = tuple(saved)
    saved.clear()
    return content
