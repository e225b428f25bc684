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


def add_data_argument(parser):
    """Add --data DIR to a parser."""
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="folder of parquet shards, or 'stdlib' (default $NANOFUSE_DIR, ~/.cache/nanofuse)",
    )
