"""A console that cannot take a command's output never ends the command."""

import io
import os
import sys


def open_missing():
    """Open the null device in place of stdin, stdout and stderr where they were closed, so that no
    file of the run gets their numbers."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            handle = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def show_every_character():
    """Have stdout and stderr show the characters that their encoding lacks as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush_or_drop():
    """Whether stdout takes what was printed; where not, it is dropped, for the flush at exit."""
    try:
        sys.stdout.flush()
        return True
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False


class _Lossy(io.RawIOBase):
    """A file of which failing writes are dropped."""

    def __init__(self, handle):
        self.handle = handle

    def writable(self):
        return True

    def fileno(self):
        return self.handle

    def isatty(self):
        return os.isatty(self.handle)

    def write(self, content):
        try:
            return os.write(self.handle, content)
        except OSError:
            return len(content)


def drop_failing_output():
    """From now on what stdout and stderr do not take, such as a pipe without a reader or a full
    disk, is dropped without a word."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            try:
                handle = stream.fileno()
                stream.flush()
            except (OSError, ValueError):
                continue
            lossy = io.TextIOWrapper(
                io.BufferedWriter(_Lossy(handle)),
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=True,
            )
            setattr(sys, name, lossy)
