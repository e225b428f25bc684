"""Attention backends of libraries: FlashAttention 3 and 4, and Transformer Engine (cuDNN)."""

import functools
import importlib.metadata
import os

import torch

from nanofuse.kernels.common.attention_sums import TILE_COLS, TILE_ROWS, AttentionSums
from nanofuse.model.backends import flash_loading
from nanofuse.model.backends.base import AttentionBackend, take

SUMS_OF = "4.0.0b36"  # flash-attn-4 whose sums kernels/common/attention_sums.py describes
CHECKED_ROWS = 256  # positions of the check of sums, which takes several of the library's tiles


def _left(window, seq_len):
    """The window in the libraries' convention: visible keys to the left, -1 for all of them."""
    return window if window < seq_len - 1 else -1


class FlashAttention3(AttentionBackend):
    """FlashAttention 3 through its public function and autograd: its private forward and backward
    functions differ between versions."""

    def __call__(
        self,
        q,  # (B, T, H, D) bf16
        k,  # (B, T, K, D)
        v,  # (B, T, K, D)
        window,
    ):
        from flash_attn_interface import flash_attn_func

        windows = (_left(window, q.size(1)), 0)
        y = flash_attn_func(
            q, k, v, causal=True, window_size=windows, deterministic=self.deterministic
        )
        return y[0] if isinstance(y, tuple) else y  # some versions also return the logsumexp


def _fa4_window(left):
    """Keyword arguments for the window of FlashAttention 4's forward and backward function."""
    return {
        "causal": True,
        "window_size_left": None if left < 0 else left,
        "window_size_right": 0,
    }


def _fa4_forward(
    q,  # (B, T, H, D) bf16
    k,  # (B, T, K, D)
    v,  # (B, T, K, D)
    left,
):
    """y (B, T, H, D) and the logsumexp (B, H, T) fp32, both contiguous."""
    from flash_attn.cute.interface import _flash_attn_fwd

    return _flash_attn_fwd(q, k, v, return_lse=True, **_fa4_window(left))[:2]


def _fa4_backward(
    grad_y,  # (B, T, H, D) bf16
    q,  # (B, T, H, D)
    k,  # (B, T, K, D)
    v,  # (B, T, K, D)
    y,  # (B, T, H, D)
    lse,  # (B, H, T) fp32
    left,
    deterministic,
):
    """grad_q (B, T, H, D) and grad_k, grad_v (B, T, K, D), contiguous."""
    from flash_attn.cute.interface import _flash_attn_bwd

    grads = [x.new_empty(x.shape) for x in (q, k, v)]
    names = zip(("dq", "dk", "dv"), grads, strict=True)
    _flash_attn_bwd(
        q, k, v, y, grad_y, lse, deterministic=deterministic, **dict(names), **_fa4_window(left)
    )
    return tuple(grads)


def _fa4_sums(
    grad_y,  # (B, T, H, D) bf16
    q,  # (B, T, H, D)
    k,  # (B, T, K, D)
    v,  # (B, T, K, D)
    y,  # (B, T, H, D)
    lse,  # (B, H, T) fp32
    left,
    deterministic,
    grad_q=None,  # (B, T, H, D), contiguous
):
    """grad_q as AttentionSums, which the library is kept from converting, and grad_k, grad_v as of
    `_fa4_backward`. With `grad_q` it converts them into it.

    Raises:
        ValueError: it had no sums to convert.
    """
    from flash_attn.cute import interface

    convert, found = interface._bwd_postprocess_convert, []
    target = q.detach() if grad_q is None else grad_q  # it wants one, which nobody writes
    others = [x.new_empty(x.shape) for x in (k, v)]

    @functools.wraps(convert)  # with its attributes, which the library looks up under this name
    def keep(sums, output, factor, *args, **options):
        if output is target:
            found.append(AttentionSums(sums, factor, q.dtype))
        if output is not target or grad_q is not None:
            convert(sums, output, factor, *args, **options)

    interface._bwd_postprocess_convert = keep
    try:
        names = dict(zip(("dq", "dk", "dv"), (target, *others), strict=True))
        interface._flash_attn_bwd(
            q, k, v, y, grad_y, lse, deterministic=deterministic, **names, **_fa4_window(left)
        )
    finally:
        interface._bwd_postprocess_convert = convert
    (sums,) = found
    return sums, *others


def why_no_sums(config, capability):
    """Why FlashAttention 4's gradient of q cannot be taken as AttentionSums, in words; None where
    it can.

    Args:
        config: GPTConfig.
        capability: (major, minor) of the GPU.
    """
    try:
        version = importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        version = "another build"
    if version != SUMS_OF:
        return f"{version}, not {SUMS_OF}"
    if tuple(capability) != (9, 0):
        return f"compute capability {'.'.join(map(str, capability))}, not 9.0"
    if config.head_dim != TILE_COLS or config.sequence_len % TILE_ROWS:
        return f"heads of {config.head_dim} and {config.sequence_len} positions"
    return None


@torch.library.custom_op("nanofuse::fa4_forward", mutates_args=())
def _fa4_forward_op(
    q: torch.Tensor,  # (B, T, H, D) bf16
    k: torch.Tensor,  # (B, T, K, D)
    v: torch.Tensor,  # (B, T, K, D)
    left: int,
    deterministic: bool,  # only for the backward pass
) -> tuple[torch.Tensor, torch.Tensor]:
    return _fa4_forward(q, k, v, left)


@_fa4_forward_op.register_fake
def _(
    q,  # (B, T, H, D)
    k,  # (B, T, K, D)
    v,  # (B, T, K, D)
    left,
    deterministic,
):
    batch, seq_len, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, seq_len), dtype=torch.float32)


@torch.library.custom_op("nanofuse::fa4_backward", mutates_args=())
def _fa4_backward_op(
    grad_y: torch.Tensor,  # (B, T, H, D) bf16
    q: torch.Tensor,  # (B, T, H, D)
    k: torch.Tensor,  # (B, T, K, D)
    v: torch.Tensor,  # (B, T, K, D)
    y: torch.Tensor,  # (B, T, H, D)
    lse: torch.Tensor,  # (B, H, T) fp32
    left: int,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _fa4_backward(grad_y, q, k, v, y, lse, left, deterministic)


@_fa4_backward_op.register_fake
def _(
    grad_y,  # (B, T, H, D)
    q,  # (B, T, H, D)
    k,  # (B, T, K, D)
    v,  # (B, T, K, D)
    y,  # (B, T, H, D)
    lse,  # (B, H, T)
    left,
    deterministic,
):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save_for_backward(ctx, inputs, output):
    q, k, v, ctx.left, ctx.deterministic = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)  # no zeros for the logsumexp, which has no gradient


def _differentiate(
    ctx,
    grad_y,  # (B, T, H, D)
    grad_lse,  # None
):
    grads = _fa4_backward_op(grad_y, *ctx.saved_tensors, ctx.left, ctx.deterministic)
    return *grads, None, None


_fa4_forward_op.register_autograd(_differentiate, setup_context=_save_for_backward)


class FlashAttention4(AttentionBackend):
    """FlashAttention 4 (CuTe). `__call__` goes through custom ops, for autograd and torch.compile;
    `forward` and `backward` call the library directly. Constructing one raises whatever the import
    raises.

    Attributes:
        sums: whether `backward` gives grad_q as AttentionSums; `leave_sums` says so.
    """

    def __init__(self, deterministic=False):
        super().__init__(deterministic)
        flash_loading.load()
        self.sums = False

    def __call__(
        self,
        q,  # (B, T, H, D) bf16
        k,  # (B, T, K, D)
        v,  # (B, T, K, D)
        window,
    ):
        return _fa4_forward_op(q, k, v, _left(window, q.size(1)), self.deterministic)[0]

    def forward(
        self,
        q,  # (B, T, H, D) bf16
        k,  # (B, T, K, D)
        v,  # (B, T, K, D)
        window,
    ):
        """See AttentionBackend.forward."""
        left = _left(window, q.size(1))
        with torch.no_grad():
            y, lse = _fa4_forward(q, k, v, left)
        return y, [q, k, v, y, lse, left]

    def backward(
        self,
        saved,
        grad_y,  # (B, T, H, D)
    ):
        """See AttentionBackend.backward; all three gradients are contiguous."""
        run = _fa4_sums if self.sums and grad_y.size(1) % TILE_ROWS == 0 else _fa4_backward
        with torch.no_grad():
            return run(grad_y, *take(saved), self.deterministic)

    def leave_sums(self, config, device):
        """See AttentionBackend.leave_sums. Where the library's own conversion of random sums gives
        other bits than `AttentionSums.rows`, it goes on converting them."""
        reason = why_no_sums(config, torch.cuda.get_device_capability(device))
        if reason is None:
            try:
                same = self._check_sums(config, device)
                reason = None if same else "its sums lie in another order"
            except Exception as error:  # of what a private function of the library became
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
        self.sums = reason is None
        how = "read as it sums it, checked" if self.sums else f"converted by it ({reason})"
        return f"gradient of q: {how}"

    def _check_sums(self, config, device):
        """Whether AttentionSums of a backward pass give the bits that the library makes of them:
        within a window and over whole rows, whichever the model has."""
        seq_len = min(config.sequence_len, CHECKED_ROWS)
        whole = {_left(window, config.sequence_len) < 0 for window in config.windows}
        heads, kv_heads = config.n_head, config.n_kv_head
        generator = torch.Generator(device).manual_seed(0)
        shape = (2, seq_len, 2 * (heads + kv_heads), config.head_dim)
        packed = torch.randn(shape, device=device, generator=generator).bfloat16()
        q, k, v, grad_y = packed.split((heads, kv_heads, kv_heads, heads), dim=2)
        for window in (seq_len if each else seq_len // 2 for each in whole):
            _, saved = self.forward(q, k, v, window)
            converted = q.new_empty(q.shape)
            with torch.no_grad():
                sums, *_ = _fa4_sums(grad_y, *take(saved), self.deterministic, converted)
            if not (torch.equal(sums.rows(), converted) and converted.any()):
                return False
        return True


def _te_layout(
    q,  # (B, T, H, D)
    k,  # (B, T, K, D)
    v,  # (B, T, K, D)
):
    """q, k, v in a memory layout that Transformer Engine recognises; copies of them if needed.

    It reads q, k and v in place if they are the three slices of one (B, T, 3, H, D) buffer. Others
    must be contiguous from the start of their storage: it may misread other strides as contiguous.
    """
    _, seq_len, heads, size = q.shape
    width = heads * size
    packed = all(
        x.shape == q.shape
        and x.untyped_storage().data_ptr() == q.untyped_storage().data_ptr()
        and x.stride() == (seq_len * 3 * width, 3 * width, size, 1)
        and x.storage_offset() == i * width
        for i, x in enumerate((q, k, v))
    )
    if packed:
        return q, k, v
    return tuple(
        x
        if x.is_contiguous() and x.storage_offset() == 0
        else x.clone(memory_format=torch.contiguous_format)
        for x in (q, k, v)
    )


class TransformerEngineAttention(AttentionBackend):
    """cuDNN's attention through Transformer Engine, whose modules torch.compile cannot trace. The
    library is restricted to cuDNN before it is imported: an input that cuDNN refuses is an error,
    not a reason for another backend."""

    def __init__(self, deterministic=False):
        super().__init__(deterministic)
        self.modules = {}
        os.environ |= {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "1", "NVTE_UNFUSED_ATTN": "0"}
        if deterministic:
            os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"

    def _build(self, heads, kv_heads, head_dim, left):
        """The library's attention module for these sizes and this window."""
        from transformer_engine.pytorch import DotProductAttention

        return DotProductAttention(
            num_attention_heads=heads,
            kv_channels=head_dim,
            num_gqa_groups=kv_heads,
            attention_dropout=0.0,
            qkv_format="bshd",
            attn_mask_type="causal",
            window_size=(left, 0),
        )

    def __call__(
        self,
        q,  # (B, T, H, D) bf16
        k,  # (B, T, K, D)
        v,  # (B, T, K, D)
        window,
    ):
        key = (q.size(2), k.size(2), q.size(3), _left(window, q.size(1)))
        if key not in self.modules:
            self.modules[key] = self._build(*key)
        return self.modules[key](*_te_layout(q, k, v)).view(q.shape)
