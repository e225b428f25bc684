"""FlashAttention 4's kernels compiled ahead of their first call, for a GPU that need not be there.

The library looks a kernel up in its cache on disk under a key, and compiles it where that is
missing. Under torch's FakeTensorMode its functions go as far as that. `kernels` lists the keys
without compiling; `compile_kernel` compiles one, so that each can have a process of its own:
the library's compiler must not run in two threads.
"""

import getpass
import importlib.metadata
import importlib.util
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch

from nanofuse.model.backends import flash_loading
from nanofuse.model.backends.choice import CHECKED_BEYOND_WINDOW
from nanofuse.model.backends.flash import FlashAttention4

PACKAGES = ("flash-attn-4", "nvidia-cutlass-dsl", "apache-tvm-ffi")  # versions that a cache is of


def versions():
    """Versions of what compiles the kernels, in one line; None where FlashAttention 4 is absent."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            return None
    return ", ".join(found) if importlib.util.find_spec("flash_attn") else None


def expected(name):
    """Whether --attention `name` will be FlashAttention 4 on a GPU that it serves."""
    first = name == "auto" and importlib.util.find_spec("flash_attn_interface") is None
    return (name == "fa4" or first) and versions() is not None


def aim(gpu):
    """Have the library, which is yet to be imported, compile for `gpu`, a tuning.Gpu."""
    major, minor = gpu.capability
    os.environ["FLASH_ATTENTION_ARCH"] = f"{major}{minor}"
    os.environ["FLASH_ATTENTION_NUM_SMS"] = str(gpu.sms)
    os.environ["CUTE_DSL_ARCH"] = f"sm_{major}{minor}a"


def load():
    """Import the library, which takes seconds."""
    _Caches()


class _Caches:
    """The library's caches, by the name of the function that has one."""

    def __init__(self):
        interface = flash_loading.load()
        self.owners = {
            name: owner
            for name, owner in vars(interface).items()
            if hasattr(owner, "compile_cache")
        }
        self.own = {name: owner.compile_cache for name, owner in self.owners.items()}

    @contextmanager
    def replaced(self, make):
        """Within the context each cache is make(its name, the cache)."""
        for name, owner in self.owners.items():
            owner.compile_cache = make(name, self.own[name])
        try:
            yield
        finally:
            for name, owner in self.owners.items():
                owner.compile_cache = self.own[name]


class _Listing:
    """A cache that has everything, and keeps what it was asked for."""

    def __init__(self, name, asked):
        self.name, self.asked = name, asked

    def __contains__(self, key):
        self.asked[self.name, key] = None
        return True


class _One:
    """A cache that lacks at most one key."""

    def __init__(self, name, cache, wanted):
        self.name, self.cache, self.wanted = name, cache, wanted

    def __contains__(self, key):
        return (self.name, key) != self.wanted or key in self.cache

    def __setitem__(self, key, kernel):
        self.cache[key] = kernel


def _pass(config, rows, deterministic):
    """Attention of a training step and of the check before it, on tensors without memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second

    attention = FlashAttention4(deterministic)
    heads, kv_heads, size = config.n_head, config.n_kv_head, config.head_dim
    cases = [(rows, config.sequence_len, window) for window in config.windows]
    short = min(config.windows)
    checked = min(config.sequence_len, short + CHECKED_BEYOND_WINDOW)
    cases += [(2, checked, short), (2, checked, checked)]
    with FakeTensorMode():
        for batch, seq_len, window in dict.fromkeys(cases):
            shape = (batch, seq_len, heads + 2 * kv_heads, size)
            packed = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
            q, k, v = packed.split((heads, kv_heads, kv_heads), dim=2)
            y, saved = attention.forward(q, k, v, window)
            attention.backward(saved, torch.empty_like(y))


def kernels(config, rows, deterministic):
    """Keys of the kernels of a run, to be called after `aim`.

    Args:
        config: GPTConfig.
        rows: of a micro-step.
        deterministic: as of the backend.

    Returns:
        [(name of the library's function, key)].
    """
    asked = {}
    with _Caches().replaced(lambda name, cache: _Listing(name, asked)):
        _pass(config, rows, deterministic)
    return list(asked)


def compile_kernel(kernel, config, rows, deterministic):
    """Compile one of `kernels` into the library's cache, unless it is there.

    Returns:
        whether it was there.
    """
    there = cached_file(kernel).exists()
    with _Caches().replaced(lambda name, cache: _One(name, cache, kernel)):
        _pass(config, rows, deterministic)
    return there


def cached_file(kernel):
    """Path of a kernel in the library's cache, written or not."""
    name, key = kernel
    cache = _Caches().own[name]
    return Path(cache.cache_path) / f"{cache._key_to_hash(key)}.o"


def cache_folder():
    """The root of the library's cache on disk, by the library's rule; does not load it."""
    folder = os.environ.get("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR")
    default = Path(tempfile.gettempdir()) / getpass.getuser() / "flash_attention_cute_dsl_cache"
    return Path(folder) if folder else default
