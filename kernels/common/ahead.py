"""Triton kernels compiled ahead of their first launch, for a GPU that need not be there.

Triton names a cache entry by the kernel's source, the types of its arguments, what it specialises
on (constants, integers that are 1 or divisible by 16, addresses divisible by 16), the options, the
target, and Triton's own build. In `recorded`, launches go Triton's own way up to that name and are
kept instead of run. So a pass over tensors of torch's "meta" device, which have shapes and strides
but no memory, gives exactly the kernels that the pass over real ones launches. `Launch.compile`
writes what the real launch looks up: the cubin and, where this Triton makes one for each kernel,
the C module that launches it.

All of it needs Triton, and does not work in its interpreter.
"""

import functools
import hashlib
import importlib
import os
import pkgutil
import subprocess
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanofuse.kernels.common.jit import HAS_TRITON, triton

if HAS_TRITON:  # parts of it that only a compilation ahead of a launch needs
    from triton import compiler, knobs
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import JITFunction, cache, driver
    from triton.runtime import build as modules

WARP_SIZE = 32


class _Driver:
    """Stands in for Triton's driver of a GPU, as far as a launch asks for it."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", 10 * capability[0] + capability[1], WARP_SIZE)

    def get_current_device(self):
        return self  # what Triton keeps of its launches is kept under this name

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target


class _NotLoaded:
    """In place of a C module of Triton."""

    def __getattr__(self, name):
        return None


class _Nothing:
    """In place of a compiled kernel: its launch does nothing."""

    function, packed_metadata = None, None

    def launch_metadata(self, *args):
        return None

    def run(self, *args):
        return None


@dataclass
class Launch:
    """What a launch would have compiled, as it is handed to Triton's compiler.

    `entries` are names of what it looks up or writes in Triton's cache; known once compiled.
    """

    source: Any  # triton.compiler.ASTSource
    target: Any  # triton.backends.compiler.GPUTarget
    options: dict
    entries: list = field(default_factory=list)

    @property
    def name(self):
        return self.source.name

    def compile(self):
        """Compile it into Triton's cache, unless it is there.

        Returns:
            whether it was there.
        """
        hits = []
        with ExitStack() as stack:
            self.entries = stack.enter_context(_noted_entries())
            stack.enter_context(
                _set(knobs.compilation, "listener", lambda **event: hits.append(event["cache_hit"]))
            )
            kernel = compiler.compile(self.source, target=self.target, options=self.options)
            if hasattr(nvidia, "make_launcher"):  # Triton 3.6 compiles one for each signature
                stack.enter_context(_modules_not_loaded())
                nvidia.CudaLauncher(self.source, kernel.metadata)
        return all(hits)


@contextmanager
def _set(owner, name, value):
    """Within the context the attribute has another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _noted_entries():
    """Names of the entries of the cache that are looked up or written in the context."""
    entries = []

    class Noting(cache.FileCacheManager):
        def __init__(self, key, override=False, dump=False):
            super().__init__(key, override, dump)
            entries.append(key)

    with _set(knobs.cache, "manager_class", Noting):
        yield entries


@contextmanager
def _modules_not_loaded():
    """Within the context Triton's C modules are built, and not loaded, as that needs the GPU's
    driver. Without that driver they are linked to an empty library of its name."""
    with ExitStack() as stack:
        stack.enter_context(
            _set(modules, "_load_module_from_path", lambda name, path: _NotLoaded())
        )
        try:
            nvidia.libcuda_dirs()
        except (AssertionError, OSError, subprocess.SubprocessError):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            stack.enter_context(_set(knobs.nvidia, "libcuda_path", folder))
            library = os.path.join(folder, "libcuda.so.1")
            command = [os.environ.get("CC", "cc"), "-shared", "-x", "c", os.devnull, "-o", library]
            subprocess.run([*command, "-Wl,-soname,libcuda.so.1"], check=True, capture_output=True)
            for function in (nvidia.libcuda_dirs, nvidia.library_dirs):
                function.cache_clear()
                stack.callback(function.cache_clear)
        yield


@contextmanager
def recorded(capability):
    """Context in which no kernel runs: the list it gives gets a Launch for each that would have
    been compiled. Tensors are of the device "meta".

    Args:
        capability: of the GPU, such as (9, 0).
    """
    launches = []

    def keep(source, target, options, **_):
        launches.append(Launch(source, target, options))
        return _Nothing()

    def address(tensor):  # of a tensor whose storage is aligned, as memory of a GPU is
        return tensor.storage_offset() * tensor.element_size()

    torch.Tensor.data_ptr = address
    try:
        with _set(driver, "_active", _Driver(capability)), _set(compiler, "compile", keep):
            yield launches
    finally:
        del torch.Tensor.data_ptr  # it is inherited


class Support:
    """The C module through which Triton talks to the GPU's driver; `entries` as of a Launch."""

    name = "Triton's driver"

    def __init__(self):
        self.entries = []

    def compile(self):
        """Build it into Triton's cache, unless it is there; returns whether it was there."""
        built = []
        with ExitStack() as stack:
            self.entries = stack.enter_context(_noted_entries())
            stack.enter_context(_modules_not_loaded())
            make = modules._build

            def noted(*args, **options):
                built.append(args)
                return make(*args, **options)

            stack.enter_context(_set(modules, "_build", noted))
            nvidia.CudaUtils()
        del nvidia.CudaUtils.instance  # Triton keeps it
        return not built


def cache_folder():
    """Where Triton's entries are, each a folder."""
    return Path(knobs.cache.dir)


@functools.cache
def build():
    """Version and digest of this build of Triton, which is part of every entry's name."""
    digest = hashlib.sha256(cache.triton_key().encode()).hexdigest()
    return f"{triton.__version__}, build {digest[:12]}"


def name_kernels(*packages):
    """Let Triton name the source of every kernel in the modules of `packages`, in one order.

    Triton 3.6 leaves the constants that a called function reads out of the caller's name unless
    that function was named before, so a name depends on what the process named until then.
    Processes that share entries call this first.
    """
    for package in packages:
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            for value in vars(importlib.import_module(found.name)).values():
                if isinstance(value, JITFunction):
                    _ = value.cache_key  # made when it is first read, and kept


def load(capability):
    """Do what Triton does once in a process before it compiles, so that forked ones need not."""
    build()
    compiler.make_backend(_Driver(capability).target).hash()
