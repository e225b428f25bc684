"""What the commands share: one-line errors with exit code 2, and the --data flag."""

import argparse
import sys

from nanofuse.train.errors import UserError


class CommandParser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line; abbreviated flags are refused."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        self.exit(2, f"error: {message}\n")


def run_command(main):
    """Call main(); a UserError, or a file or folder that cannot be read or written, becomes one
    line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        message = str(error)
    except OSError as error:
        if not error.filename:
            raise
        message = f"{error.filename}: {error.strerror}"
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


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
