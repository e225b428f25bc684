"""Making folders, and writing files so that a crash leaves the old one or the new one, never half
of either. Files and folders have the modes that the umask leaves."""

import contextlib
import errno
import hashlib
import itertools
import os
import re
import secrets
import shutil
from contextlib import contextmanager
from pathlib import Path

from nanofuse.train.errors import UserError

# Names of what is being written; one that a killed process left is removed at the next start.
# letters and digits: no word, no date
UNIQUE = r"(?=[a-z_]*\d)(?=\d*[a-z_])[a-z0-9_]{8}"
LEFTOVER = re.compile(rf"\.(step_\d+|[\w+-][\w.+-]*\.jsonl?)\.{UNIQUE}")


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


def temporary_name(path):
    """A name beside `path` that LEFTOVER knows where it is a run's."""
    while not re.fullmatch(UNIQUE, unique := secrets.token_hex(4)):
        pass
    return path.with_name(f".{path.name}.{unique}")


def remove_leftovers(directory):
    """Remove what killed processes left half-written in a run's folder; returns their number."""
    directory = Path(directory)
    names = (*directory.glob(".*"), *directory.glob("step_*/.*"))
    found = [path for path in names if LEFTOVER.fullmatch(path.name)]
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
    return len(found)


def sync(path):
    """Have the system write a file or a folder's entries out, where it can."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text_atomically(path, text):
    """Write UTF-8 text to a temporary file beside `path`, then rename it there."""
    write_atomically(path, text.encode("utf-8"))


def write_atomically(path, content):
    """Write bytes to a temporary file beside `path`, then rename it there."""
    path = Path(path)
    make_folder(path.parent)
    temporary = temporary_name(path)
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):  # the temporary name says nothing to the user
            error.filename = str(path)
        raise


@contextmanager
def atomic_folder(path):
    """Yield a temporary folder that becomes `path` when the block ends without an error.

    A folder that is there already is replaced, and so is a link to one.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = temporary_name(path)
    try:
        temporary.mkdir()
    except OSError as error:
        error.filename = str(path)
        raise
    try:
        yield temporary
        sync(temporary)
        if os.path.lexists(path):
            remove_folder(path)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_folder(path):
    """Remove a folder so that half of it is never seen under its name; of a link the link alone."""
    doomed = temporary_name(Path(path))
    os.replace(path, doomed)
    if doomed.is_symlink():
        doomed.unlink()
    else:
        shutil.rmtree(doomed, ignore_errors=True)


def move_aside(path):
    """Rename what has this name to NAME.aside, or NAME.aside-2, …; returns it."""
    for count in itertools.count(1):
        aside = path.with_name(f"{path.name}.aside" + (f"-{count}" if count > 1 else ""))
        if not os.path.lexists(aside):
            os.rename(path, aside)
            return aside


def not_read(path, error, damage):
    """Words on a file of a checkpoint that could not be read: that it is missing or damaged, and
    the way out; or, where it may be whole, what keeps it from being read.

    Args:
        error: that was met.
        damage: "is missing or …".
    """
    if getattr(error, "errno", None) is None:  # safetensors' own errors have no number
        try:
            with open(path, "rb") as file:
                file.read(1)
        except OSError as found:
            error = found
    number = getattr(error, "errno", None)
    if number in (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        return f"{path} {damage}; {way_out(path.parent)}"
    return f"{path} cannot be read ({os.strerror(number)})"


def way_out(folder):
    """Words on what to do about a checkpoint's folder that is damaged."""
    folder = Path(folder)
    others = [path.name for path in folder.parent.glob("step_*") if path.name != folder.name]
    if any((len(name), name) < (len(folder.name), folder.name) for name in others):
        return f"delete {folder} to use the checkpoint before it"
    return "no checkpoint is before it: put a copy back, or train anew as another --run"


def portable(value):
    """A str that may name a file, as it is under a UTF-8 locale; other values as they are."""
    return os.fsencode(value).decode("utf-8", "replace") if isinstance(value, str) else value


def native(value):
    """What `portable` made, as this locale has it."""
    return os.fsdecode(value.encode("utf-8")) if isinstance(value, str) else value


def sha256_of(path):
    """SHA-256 of a file, hexadecimal."""
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(view[:size])
    return digest.hexdigest()
