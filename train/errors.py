"""The exceptions that end a command with one line."""


class UserError(ValueError):
    """Bad input; the message is one line that names the flag or file and a way out.

    Commands print it as `error: ...` and exit with code 2.
    """


class RunEnded(Exception):
    """A run that ended before its last step, or not as it should; the message is one line.

    Args:
        code: exit code of the command; above 128: a signal's.
    """

    def __init__(self, message, code):
        super().__init__(message)
        self.code = code


class PeerFailed(RunEnded):
    """Another rank has failed, and all have agreed to end; their state is that of one step."""


class RunBroken(RunEnded):
    """Another rank is gone without a word that all have heard: nothing can be done together any
    more."""


def first_line(error):
    """An exception in one line: its type and the first line of what it says."""
    said = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
