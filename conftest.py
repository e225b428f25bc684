"""Without a GPU the kernels run under Triton's interpreter, which must be on before an import."""

import os

# The interpreter's products are NumPy's, of small tiles: a second thread costs more than it brings,
# many times more where another process wants the core. To be set before NumPy is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import operator
from functools import cache
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

    from triton.language import block_type, pointer_type, tensor
    from triton.runtime import interpreter

    semantics = interpreter.TritonSemantic
    patch_language, numpy_dtype = interpreter._patch_lang, interpreter._get_np_dtype
    broadcast, dtypes = semantics.broadcast_impl_value, {}
    make_type, types = block_type.__init__, {}
    make_tensor, tensors = tensor.__init__, {}

    @cache
    def patch_for_good(fn):
        """As the interpreter's own, which replaces what `fn` sees of the language anew at each call
        and puts it back: half the time of a small kernel."""
        patch_language(fn)
        return SimpleNamespace(restore=lambda: None)

    def known_dtype(kind):
        """NumPy's dtype of a type, for which the interpreter makes a table at each call."""
        scalar = kind.scalar
        name = "pointer" if isinstance(scalar, pointer_type) else scalar.name
        if name not in dtypes:
            dtypes[name] = numpy_dtype(scalar)
        return dtypes[name]

    def known_type(self, element, shape):
        """As Triton's own, which writes the name of a block's type anew at each operation."""
        key = element.name, *[getattr(size, "value", size) for size in shape]
        if key not in types:
            make_type(self, element, shape)
            types[key] = dict(vars(self))
        vars(self).update(types[key])

    def tensor_of_known_shape(self, handle, kind):
        """As Triton's own, which makes the shape of constexprs anew at each operation."""
        if kind.name not in tensors:
            make_tensor(self, None, kind)
            tensors[kind.name] = dict(vars(self))
        vars(self).update(tensors[kind.name], handle=handle)

    def broadcast_if_needed(semantic, a, b):
        """As the interpreter's own, which copies two operands of one shape as well."""
        if a.type.is_block() and b.type.is_block() and list(a.type.shape) == list(b.type.shape):
            return a, b
        return broadcast(semantic, a, b)

    def check_overflow(semantic, a, b, operation):
        """As the interpreter's own, which takes some twenty calls, and says nothing unless
        TRITON_DEBUG is set.

        Raises:
            AssertionError: a sum, difference or product is too large for its integers.
        """
        kind, name = a.type.scalar, operation.__name__
        if kind.int_bitwidth < 64:
            exact = getattr(operator, name)(*(x.handle.data.astype(np.int64) for x in (a, b)))
            least, most = kind.get_int_min_value(), kind.get_int_max_value()
            assert least <= exact.min() and exact.max() <= most, f"{kind} overflow in {name}"

    interpreter._patch_lang = patch_for_good
    block_type.__init__, tensor.__init__ = known_type, tensor_of_known_shape
    interpreter._get_np_dtype = known_dtype
    semantics.broadcast_impl_value = broadcast_if_needed
    semantics.binary_op_sanitize_overflow_impl = check_overflow


def pytest_configure(config):
    """Refuses versions that do not go together, each test of which would fail."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        triton = version("triton")
        if triton.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
            raise pytest.UsageError(
                f"without a GPU Triton {triton} does not work with numpy {np.__version__}; "
                "pip install 'numpy<2.4', or torch 2.13, which brings a newer Triton"
            )
