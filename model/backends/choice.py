"""Selects the attention backend: the one named, or the first that passes a self-check here.

The reason for the choice is returned too, for the training log.
"""

import torch

from nanofuse.model.backends.flash import (
    FlashAttention3,
    FlashAttention4,
    TransformerEngineAttention,
)
from nanofuse.model.backends.torch_backends import FlexAttention, SDPAttention
from nanofuse.model.config import GPTConfig

CHECKED_BEYOND_WINDOW = 256  # the self-check's sequence exceeds the window by so many positions

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
    """Run attention in `dtype`: y, grad_q, grad_k, grad_v, each shaped like its tensor."""
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
    """Largest relative error of `backend` on a small bf16 forward and backward pass.

    The reference is SDPA in fp64. Two cases: the shortest window of `config` (a GPTConfig) and full
    causal attention, both with its head size and its ratio of query to key heads. q, k, v and
    grad_y are non-contiguous views of one buffer.

    Raises:
        RuntimeError: a relative error above twice that of SDPA in bf16, or NaN.
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
    """Check that the backend's library has kernels for this GPU's compute capability.

    Raises:
        RuntimeError: it has none; the message names the capability needed and the one found.
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
    """First line of an error's message; the name of its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _first_that_works(device_type, deterministic, compiled, config):
    """The first of BACKENDS that passes its self-check, and a line on it and each one before it."""
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
        except Exception as error:  # a third-party library may raise anything; goes into the reason
            missing = isinstance(error, ModuleNotFoundError) and backend.is_part(error.name)
            reasons.append(f"{name} is not installed" if missing else f"{name}: {_line(error)}")
        else:
            reasons.append(f"{name} agrees with SDPA to {distance:.1g}")
            return backend_class(deterministic), "; ".join(reasons)
    raise ValueError(f"no attention backend works here: {'; '.join(reasons)}")


def select_attention(name, device_type, deterministic=False, compiled=False, config=None):
    """The attention backend and the reason for its choice, as (object, str).

    Args:
        name: a key of BACKENDS, or "auto": the first that works on a GPU, SDPA elsewhere.
        device_type: "cuda", "cpu", ...
        deterministic: require a backward pass with the same bits on every run.
        compiled: the model that calls it goes through torch.compile.
        config: GPTConfig whose head counts, head size and windows the self-check of "auto" uses;
            None stands for the recipe's depth 4.

    Raises:
        ValueError: an unknown name, or a backend that cannot run here.
    """
    if name == "auto":
        if device_type != "cuda":
            return SDPAttention(deterministic), f"auto on {device_type}"
        config = config or GPTConfig.from_depth(4)
        backend, why = _first_that_works(device_type, deterministic, compiled, config)
        return backend, f"auto on {device_type}: {why}"
    if name not in BACKENDS:
        raise ValueError(f"{name!r} is unknown; choose from auto, {', '.join(BACKENDS)}")
    backend = BACKENDS[name](deterministic)
    if backend.cuda_only and device_type != "cuda":
        raise ValueError(f"{name} needs a CUDA GPU; sdpa does not")
    if compiled and not backend.compilable:
        raise ValueError(f"{name} does not run under torch.compile; it does in eager")
    try:
        backend.load()
    except Exception as error:  # a broken install may raise anything
        raise ValueError(
            f"{name} needs {backend.title}: {backend.install} ({_line(error)})"
        ) from error
    try:
        _check_gpu(backend)
    except RuntimeError as error:
        raise ValueError(f"{name} {error}") from error
    return backend, "asked for"
