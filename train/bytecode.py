"""Compiled Python modules are kept where the libraries come without them.

Python compiles a module when it is imported, and keeps the result beside it for the next process.
Some installations have none (`uv pip install` without --compile-bytecode, images made with
PYTHONDONTWRITEBYTECODE) in folders that take none: then every start compiles 2,000 modules of torch
and others anew, which takes as long as all the rest. Nothing here loads torch.
"""

import importlib.util
import os
import sys
from pathlib import Path

from nanofuse.kernels.common.store import user_folder

FOLDER = "bytecode"  # of the user's folder
HEADER = 16  # bytes: magic number, flags, modification time, size
BY_HASH = 1  # a flag: the file is not compared by time and size


def is_kept(source):
    """Whether the compiled module of a source file is where Python looks for it, and not older."""
    try:
        header = Path(importlib.util.cache_from_source(source)).read_bytes()[:HEADER]
        stat = Path(source).stat()
    except (OSError, NotImplementedError):
        return False
    magic, flags, time, size = (header[i : i + 4] for i in range(0, HEADER, 4))
    if magic != importlib.util.MAGIC_NUMBER or len(header) < HEADER:
        return False
    words = [int.from_bytes(word, "little") for word in (flags, time, size)]
    return bool(words[0] & BY_HASH) or words[1:] == [
        int(stat.st_mtime) & 0xFFFFFFFF,
        stat.st_size & 0xFFFFFFFF,
    ]


def is_writable(folder):
    """Whether files can be made in a folder, which may have to be made itself."""
    folder = Path(folder).absolute()
    try:
        while not folder.exists():
            folder = folder.parent
    except OSError:  # above it one that may not be read
        return False
    return os.access(folder, os.W_OK)


def keep_bytecode(library="torch"):
    """Keep compiled modules in the user's folder, in this process and those that it starts, where a
    library has none and its folder gets none.

    Returns:
        a line that says so, or None.
    """
    spec = importlib.util.find_spec(library)
    if spec is None or not spec.has_location or sys.pycache_prefix:
        return None
    beside = Path(importlib.util.cache_from_source(spec.origin)).parent
    will_be = not sys.dont_write_bytecode and is_writable(beside)
    try:
        folder = str(user_folder().absolute() / FOLDER)
    except RuntimeError:  # a user without a home
        return None
    if is_kept(spec.origin) or will_be or not is_writable(folder):
        return None
    sys.pycache_prefix, sys.dont_write_bytecode = folder, False
    os.environ["PYTHONPYCACHEPREFIX"] = folder
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    return f"python: {library} came without compiled modules; those are kept in {folder}"
