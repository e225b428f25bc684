"""Which attention backend runs, and why: the one asked for, or the first that works here."""

import torch

from nanofuse.model.backends.flash import (
    FlashAttention3,
    FlashAttention4,
    TransformerEngineAttention,
)
from nanofuse.model.backends.torch_backends import FlexAttention, SDPAttention
from nanofuse.model.config import GPTConfig
from nanofuse.model.errors import UserError

CHECKED_BEYOND_WINDOW = 256  # rows of the self-check are this much longer than the window

BACKENDS = {  # in the order in which "auto" tries them on a GPU
    backend.name: backend
    for backend in (
        FlashAttention3,
        FlashAttention4,
        TransformerEngineAttention,
        FlexAttention,
        SDPAttention,
    )
}


def forward_and_backward(
    backend,
    tensors,  # q (B, T, H, D), k, v (B, T, K, D), grad_y (B, T, H, D)
    window,
    dtype,
):
    """y, grad_q, grad_k, grad_v of the shapes of `tensors`, computed in `dtype`."""
    q, k, v, grad_y = (x.to(dtype) for x in tensors)
    y, saved = backend.forward(q, k, v, window)
    return y, *backend.backward(saved, grad_y)


def _distance(
    got,  # any shape
    exact,  # the same shape, fp64
):
    """||got - exact|| / ||exact||."""
    return ((got.double() - exact).norm() / exact.norm()).item()


def self_check(backend, device, config):
    """Largest relative error of a small bf16 forward and backward pass; SDPA in fp64 is the truth.

    Two cases, the shortest window of a GPTConfig and plain causal attention, with its head size
    and as many query heads to a key head; q, k, v are views of one buffer.

    Raises:
        RuntimeError: an error above twice that of SDPA in bf16, or NaN.
    """
    batch, kv_heads, short = 2, 2, min(config.windows)
    heads = kv_heads * config.n_head // config.n_kv_head
    seq_len = min(config.sequence_len, short + CHECKED_BEYOND_WINDOW)
    counts = (heads, kv_heads, kv_heads, heads)  # of q, k, v and grad_y
    worst = 0.0
    for window in sorted({short, seq_len}):
        generator = torch.Generator(device).manual_seed(0)
        shape = (batch, seq_len, sum(counts), config.head_dim)
        fused = torch.randn(shape, device=device, generator=generator).bfloat16()
        tensors = fused.split(counts, dim=2)
        backend.prepare(seq_len, [window], device)
        exact = forward_and_backward(SDPAttention(), tensors, window, torch.float64)
        base = forward_and_backward(SDPAttention(), tensors, window, torch.bfloat16)
        got = forward_and_backward(backend, tensors, window, torch.bfloat16)
        names = ("y", "grad_q", "grad_k", "grad_v")
        for label, x, reference, truth in zip(names, got, base, exact, strict=True):
            error = _distance(x, truth)
            allowed = 2 * _distance(reference, truth) + 1e-3  # an eighth of bf16's spacing
            if not error <= allowed:
                raise RuntimeError(
                    f"{label} of window {window} is off by {error:.3g}, {allowed:.3g} is allowed"
                )
            worst = max(worst, error)
    return worst


def _check_gpu(backend):
    """Refuse a GPU that the backend's library has no kernels for.

    Raises:
        RuntimeError: naming the compute capability.
    """
    lowest, highest = backend.capabilities
    if lowest == (0, 0):
        return
    capability = torch.cuda.get_device_capability()
    if not lowest <= capability <= highest:
        wanted = f"{lowest[0]}.{lowest[1]}" + ("" if lowest == highest else " or later")
        found = f"{capability[0]}.{capability[1]}"
        raise RuntimeError(f"needs compute capability {wanted}, this GPU has {found}")


def _line(error):
    """The first line of an error's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _first_that_works(device_type, deterministic, compiled, config):
    """The first of BACKENDS that runs and agrees with SDPA, and what became of those before it."""
    reasons = []
    for name, backend_class in BACKENDS.items():
        backend = backend_class(deterministic)
        if compiled and not backend.compilable:
            reasons.append(f"{name} does not run under torch.compile")
            continue
        try:
            backend.load()
            _check_gpu(backend)
            distance = self_check(backend, device_type, config)
        except Exception as error:  # a foreign library may raise anything; the user is told
            missing = isinstance(error, ModuleNotFoundError) and backend.is_part(error.name)
            reasons.append(f"{name} is not installed" if missing else f"{name}: {_line(error)}")
        else:
            reasons.append(f"{name} agrees with SDPA to {distance:.1g}")
            return backend_class(deterministic), "; ".join(reasons)
    raise UserError(f"no attention backend works here: {'; '.join(reasons)}")


def select_attention(name, device_type, deterministic=False, compiled=False, config=None):
    """Attention backend and the reason for it, as (object, str); name "auto" picks by device.

    Args:
        deterministic: ask it for a backward pass that gives the same bits every time.
        compiled: the model around it goes through torch.compile.
        config: GPTConfig whose heads and windows "auto" tries; depth 4 of the recipe if None.

    Raises:
        UserError: an unknown name, or one that cannot run here.
    """
    if name == "auto":
        if device_type != "cuda":
            return SDPAttention(deterministic), f"auto on {device_type}"
        config = config or GPTConfig.from_depth(4)
        backend, why = _first_that_works(device_type, deterministic, compiled, config)
        return backend, f"auto on {device_type}: {why}"
    if name not in BACKENDS:
        raise UserError(f"--attention {name!r} is unknown; choose from auto, {', '.join(BACKENDS)}")
    backend = BACKENDS[name](deterministic)
    if backend.cuda_only and device_type != "cuda":
        raise UserError(f"--attention {name} needs a CUDA GPU; use --attention sdpa")
    if compiled and not backend.compilable:
        raise UserError(
            f"--attention {name} does not run under torch.compile; use --backend eager or "
            "--attention auto"
        )
    try:
        backend.load()
    except Exception as error:  # a damaged library may raise anything; the user is told
        raise UserError(
            f"--attention {name} needs {backend.title}: {backend.install}; or use --attention auto "
            f"({_line(error)})"
        ) from error
    try:
        _check_gpu(backend)
    except RuntimeError as error:
        raise UserError(f"--attention {name} {error}; use --attention auto") from error
    return backend, "asked for"
