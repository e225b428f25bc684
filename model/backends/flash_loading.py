"""The import of FlashAttention 4, without what it does not use.

It takes a few files of the package quack (https://github.com/Dao-AILab/quack), whose __init__ loads
kernels of its own, and with them torch's compiler and sympy: 1,100 modules of 1,300, and a third of
the time or more.
"""

import importlib.util
import os
import sys

LIBRARY = "flash_attn.cute.interface"
PTXAS = "CUTE_DSL_PTXAS_PATH"  # variable with which quack's __init__ changes the compiler


def load():
    """Import the library, which takes seconds; its cache of kernels on disk is turned on before.

    Raises:
        ImportError, or whatever the library raises.
    """
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    if LIBRARY not in sys.modules and not os.environ.get(PTXAS):
        open_package("quack", first="dsl")
    return importlib.import_module(LIBRARY)


def open_package(name, first):
    """Let modules of a package be imported without its __init__, which runs when a name that is no
    module of the package is asked of it. Nothing is done where there is no such package, or it is
    imported.

    Args:
        first: module of the package that its __init__ imports for what that changes elsewhere.
    """
    if name in sys.modules or not (spec := importlib.util.find_spec(name)):
        return
    package = importlib.util.module_from_spec(spec)

    def ask(attribute):
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        if importlib.util.find_spec(f"{name}.{attribute}"):
            return importlib.import_module(f"{name}.{attribute}")
        del package.__getattr__
        spec.loader.exec_module(package)
        return getattr(package, attribute)

    package.__getattr__ = ask
    sys.modules[name] = package
    try:
        importlib.import_module(f"{name}.{first}")
    except Exception:  # another version of it: imported as it is
        del sys.modules[name]
