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
    """Have stdout take what was printed; where it does not, drop it, for the flush at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Output(io.RawIOBase):
    """What a stream writes to.

    Args:
        handle: open file.
        name: that an error of it gets, as a file's would have; None: failing writes are dropped.
    """

    def __init__(self, handle, name=None):
        self.handle, self.name = handle, name

    def writable(self):
        return True

    def fileno(self):
        return self.handle

    def isatty(self):
        return os.isatty(self.handle)

    def write(self, content):
        try:
            return os.write(self.handle, content)
        except OSError as error:
            if self.name is None:
                return len(content)
            error.filename = self.name
            raise


def _put(name, named, **buffering):
    """Have the stream sys.`name` write to an _Output."""
    stream = getattr(sys, name)
    if not isinstance(stream, io.TextIOWrapper):
        return
    try:
        handle = stream.fileno()
        stream.flush()
    except (OSError, ValueError):
        return
    output = io.BufferedWriter(_Output(handle, name if named else None))
    made = io.TextIOWrapper(output, encoding=stream.encoding, errors=stream.errors, **buffering)
    setattr(sys, name, made)


def drop_failing_output(*names):
    """From now on what these streams do not take, as a pipe without a reader or a full disk, is
    dropped without a word."""
    for name in names:
        _put(name, False, line_buffering=True)


def name_stdout():
    """Have errors of stdout say so: they name no file."""
    stream = sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        buffering = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
        _put("stdout", True, **buffering)
