"""Room for checkpoints: how much one takes, how much there is, and errors that say both."""

import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from nanofuse.train.errors import UserError

FILE_OVERHEAD = 65536  # bytes of meta.json and of the headers, about
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


class SaveError(UserError):
    """A checkpoint that cannot be written."""


def in_units(count):
    """A number of bytes for people, such as "12.3 MiB"."""
    size, unit = float(count), 0
    while size >= 1024 and unit + 1 < len(UNITS):
        size, unit = size / 1024, unit + 1
    return f"{size:.1f} {UNITS[unit]}" if unit else f"{count} bytes"


def size_of(*states):
    """Bytes that {name: tensor} dictionaries take in a checkpoint, about; None: no tensors."""
    tensors = [t for state in states if state for t in state.values()]
    return sum(t.numel() * t.element_size() for t in tensors) + FILE_OVERHEAD


def free_bytes(directory):
    """Bytes free where `directory` is or would be, or None where the system does not tell."""
    for path in (Path(directory), *Path(directory).absolute().parents):
        try:
            usage = shutil.disk_usage(path)
        except OSError:
            continue
        return usage.free if usage.total else None
    return None


def room(needed, directory):
    """Words for the size of a checkpoint and the room for it.

    Args:
        needed: bytes of a checkpoint.
    """
    free = free_bytes(directory)
    text = f"checkpoint: {in_units(needed)} each"
    if free is None:
        return text
    text += f"; {in_units(free)} free in {directory}"
    if free < needed:
        text += f"; warning: it does not fit, {needed - free:,} bytes are missing"
    return text


def reason_of(error):
    """Words of the system for an OSError or a SafetensorError."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    number = re.search(r"os error (\d+)", str(error))
    return os.strerror(int(number[1])) if number else str(error).split("\n")[0]


def check_room(path, needed):
    """Refuse a save of `needed` bytes where they are not free.

    Raises:
        SaveError: names the path and the missing bytes.
    """
    free = free_bytes(path)
    if free is not None and free < needed:
        raise SaveError(_cannot(path, "the disk is full", needed, free))


def _cannot(path, reason, needed, free):
    text = f"{path} cannot be saved: {reason}; it takes {needed:,} bytes"
    if free is not None:
        text += f" and {free:,} are free"
        if free < needed:
            text += f", {needed - free:,} bytes are missing"
    return text


@contextmanager
def saving(path, tensors):
    """Within the context {name: tensor} are written as `path`, with errors of one line.

    Raises:
        SaveError: there is no room for them, or a write fails.
    """
    needed = size_of(tensors)
    check_room(path, needed)
    with naming_save_errors(path, needed):
        yield


@contextmanager
def naming_save_errors(path, needed):
    """Within the context a failing write becomes a SaveError of one line about `path`.

    Args:
        needed: bytes that the checkpoint takes.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        free = free_bytes(path)
        raise SaveError(_cannot(path, reason_of(error), needed, free)) from error
