"""Triton for the files of ops; without it, stand-ins that let them be imported.

Triton exists on Linux only. Elsewhere (macOS, Windows) an op's file still gives its reference in
plain PyTorch; a launch of its kernel raises a RuntimeError of one line. Every file of kernels/
takes `triton` and `tl` from here, and TensorDescriptor where it needs it; `gluon`, `gl`, `hopper`,
GluonDescriptor, and load_block and store_block, between a descriptor's matrix and shared memory,
likewise.
"""

import functools

__all__ = [
    "HAS_GLUON", "HAS_TRITON", "MISSING", "GluonDescriptor", "TensorDescriptor", "gl", "gluon",
    "hopper", "load_block", "store_block", "tl", "triton",
]  # fmt: skip

MISSING = "Triton is not installed, and this op's kernel needs it (Linux: pip install triton)"


class _Kernel:
    """Keeps a kernel's function, name and docstring; raises where it is launched or called."""

    def __init__(self, function):
        self.fn = function
        functools.update_wrapper(self, function)

    def __getitem__(self, grid):
        raise RuntimeError(f"{self.__name__}: {MISSING}")

    def __call__(self, *args, **kwargs):
        self[()]


class _Constant:
    """triton.language.constexpr: an annotation, and a value for kernels."""

    def __init__(self, value):
        self.value = value


class _Language:
    """What is read of triton.language when a file is imported: constexpr, and names of dtypes."""

    constexpr = _Constant
    float32, bfloat16 = "fp32", "bf16"


class _Triton:
    """What is read of triton when a file is imported, and what launchers compute before they
    launch."""

    @staticmethod
    def jit(function=None, **options):
        return _Kernel if function is None else _Kernel(function)

    @staticmethod
    def cdiv(x, y):
        return -(-x // y)

    @staticmethod
    def next_power_of_2(n):
        return 1 << max(n - 1, 0).bit_length()


class _TensorDescriptor:
    @staticmethod
    def from_tensor(*args):
        raise RuntimeError(MISSING)


try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    HAS_TRITON = True
except ImportError:
    triton, tl, TensorDescriptor = _Triton, _Language, _TensorDescriptor
    HAS_TRITON = False

try:  # Triton's lower language, in which warps have roles; experimental, so it may change
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    # names before and in Triton 3.9
    load_block = getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared
    store_block = getattr(hopper.tma, "async_store", None) or hopper.tma.async_copy_shared_to_global
    HAS_GLUON = True
except ImportError:
    gluon, gl, hopper, GluonDescriptor = _Triton, _Language, None, _TensorDescriptor
    load_block = store_block = None
    HAS_GLUON = False
