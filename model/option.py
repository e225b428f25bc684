"""A dataclass field that says what a command line needs to know of it.

The dataclasses of the model, the optimiser and the schedules own their defaults, and train/settings
makes a flag of every field that was declared here. Nothing here or in those modules loads torch.
"""

from dataclasses import Field, field, fields
from typing import Any


def option(
    default: Any,
    help: str,
    choices: tuple[str, ...] | None = None,
    metavar: str | None = None,
    least: float | None = None,
    most: float | None = None,
    since: str | None = None,
    fixed: str | None = None,
    word: str | None = None,
) -> Any:
    """A field with a default, a line of help, and its bounds or choices.

    Args:
        choices: of a str; None: any.
        metavar: what stands for the value in the help, such as "DIR"; None: by type.
        least, most: bounds of a number, inclusive.
        since: version that brought the field; settings saved before it take the default.
        fixed: why a resumed run keeps its value; None: it may be given anew.
        word: that a command line may have in place of a number, which is found out at the start.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "metavar": metavar,
        "least": least,
        "most": most,
        "since": since,
        "fixed": fixed,
        "word": word,
    }
    return field(default=default, metadata=metadata)


def options(dataclass: Any) -> list[Field[Any]]:
    """The fields of a dataclass (type or object) that were declared as options, in order."""
    return [f for f in fields(dataclass) if "help" in f.metadata]
