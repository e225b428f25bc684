"""Making folders, and writing files so that a crash leaves the old one or the new one, never half
of either."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from nanofuse.train.errors import UserError


def make_folder(path):
    """Make the folder `path` and those above it, where they are missing.

    Raises:
        UserError: something else has its name, or that of one above it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        obstacle = next(p for p in (path, *path.parents) if os.path.lexists(p))
        raise UserError(f"{obstacle} is not a folder; move it away") from None


def write_text_atomically(path, text):
    """Write UTF-8 text to a temporary file beside `path`, then rename it there."""
    path = Path(path)
    make_folder(path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes it private
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@contextmanager
def atomic_folder(path):
    """Yield a temporary folder that becomes `path` when the block ends without an error."""
    path = Path(path)
    make_folder(path.parent)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
