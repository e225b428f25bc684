"""Without a GPU the kernels run under Triton's interpreter, which must be on before an import."""

import os

# The interpreter's products are NumPy's, of small tiles: a second thread costs more than it brings,
# many times more where another process wants the core. To be set before NumPy is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import inspect
from functools import cache

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @cache
    def builtins_of(package):
        """[(name, member)] that the interpreter replaces in a module or class of the language."""
        return [pair for pair in inspect.getmembers(package) if is_builtin(pair[1])]

    def patch_builtins(package, *more):
        """As the interpreter's own, which looks for them again at each call of each function: a
        third of the time of a small kernel."""
        for name, member in builtins_of(package):
            if getattr(package, name) is member:  # not yet replaced
                interpreter._patch_attr(package, name, member, *more)

    interpreter._patch_builtin = patch_builtins
