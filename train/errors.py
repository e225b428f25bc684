"""The one exception for bad input."""


class UserError(ValueError):
    """Bad input; the message is one line that names the flag or file and a way out.

    Commands print it as `error: ...` and exit with code 2.
    """
