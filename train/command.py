"""What the commands share: one-line errors with exit code 2, and the --data flag."""

import argparse
import difflib
import os
import re
import signal
import sys
import time
import traceback

from nanofuse.train.console import (
    drop_failing_output,
    flush_or_drop,
    name_stdout,
    open_missing,
    show_every_character,
)
from nanofuse.train.errors import RunEnded, UserError
from nanofuse.train.signals import Interrupted

LOADED = time.perf_counter()  # close to the start of the process
UNKNOWN = "unrecognized arguments: "  # as argparse says it
DEBUG_ENV = "NANOFUSE_DEBUG"


class CommandParser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line; abbreviated flags are refused."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        message = re.sub(r"^argument (--\S+): (?=must )", r"\1 ", message)
        if message.startswith(UNKNOWN):
            message += f"; {self.way_out(message.removeprefix(UNKNOWN).split()[0])}"
        self.exit(2, f"error: {' '.join(message.split())}\n")

    def way_out(self, given):
        """Words on what may have been meant by a flag that is not known."""
        flags = {flag.lstrip("-"): flag for flag in self._option_string_actions}
        name = given.partition("=")[0].lstrip("-")
        near = difflib.get_close_matches(name, flags, 1, cutoff=0.7)
        return f"did you mean {flags[near[0]]}?" if near else "--help lists the flags"


def is_out_of_memory(error):
    """Whether an error is Python's or torch's for memory that is not there, on a CPU or a GPU."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "allocate memory" in str(error)


def first_words(error):
    """The first line of an error's message, or its kind."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]


def command_module(unknown="train.run"):
    """Name of the training command's module, for python -m, as this process was started."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec and spec.name.endswith("train.run") else unknown


def exit_code(error):
    """The code that a command ends with for an error, 0 for None."""
    if error is None:
        return 0
    if isinstance(error, RunEnded):
        return error.code
    if isinstance(error, Interrupted):
        return 128 + error.number
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return 2 if isinstance(error, (UserError, OSError)) or is_out_of_memory(error) else 1


def ending(error):
    """The line that a command ends with for an error, without line breaks; '' where there is none
    to say."""
    if isinstance(error, KeyboardInterrupt):
        return ""
    message = str(error)
    if isinstance(error, OSError):
        message = f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}"
    elif not isinstance(error, (UserError, RunEnded)) and is_out_of_memory(error):
        message = f"out of memory ({first_words(error)}); ask for a smaller size"
    elif not isinstance(error, (UserError, RunEnded)):
        message = f"{type(error).__name__}: {first_words(error)}"
    signalled = isinstance(error, RunEnded) and error.code > 128
    return "\\n".join((message if signalled else f"error: {message}").splitlines())


def run_command(main, lossy=False):
    """Call main(); errors that are told in one line become that line on stderr and an exit code: 2
    for a UserError or a file or folder that cannot be read or written.

    A reader of stdout that leaves ends the command without a word. With NANOFUSE_DEBUG=1 there is a
    traceback as well.

    Args:
        lossy: output that cannot be shown is dropped, and the command goes on.
    """
    open_missing()
    show_every_character()
    if lossy:
        drop_failing_output("stdout", "stderr")
    else:
        drop_failing_output("stderr")
        name_stdout()
    try:
        main()
        sys.stdout.flush()
        return
    except SystemExit:  # of the parser
        flush_or_drop()
        raise
    except (UserError, RunEnded, KeyboardInterrupt, OSError) as error:
        failure = error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        failure = error
    flush_or_drop()
    if isinstance(failure, BrokenPipeError):
        sys.exit(0)
    if os.environ.get(DEBUG_ENV):
        traceback.print_exception(failure)
    if message := ending(failure):  # one line, whatever the names in it
        print(message, file=sys.stderr, flush=True)
    sys.exit(exit_code(failure))


def not_empty(text):
    """The value of a flag; '' is refused, which a variable of a shell that is not set gives."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; give it a value, or drop it")
    return text


def add_data_argument(parser):
    """Add --data PATH to a parser."""
    parser.add_argument(
        "--data",
        metavar="PATH",
        type=not_empty,
        help="folder of parquet shards, one shard, or 'stdlib' "
        "(default $NANOFUSE_DIR, ~/.cache/nanofuse)",
    )
