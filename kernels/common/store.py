"""What this project measured on a machine and keeps for the next process: JSON files of the user.

They lie in $NANOFUSE_DIR, else in ~/.cache/nanofuse, beside the data. Everything in them can be
measured anew, so a file that is missing, damaged or cannot be written is no error. A file maps a
section, which names all that its entries depend on (GPU, versions of libraries), to {key: entry}:
what was kept elsewhere or by other versions lies in other sections, and is not looked at.
tuning.py has what comes with the code.
"""

import contextlib
import json
import os
import secrets
from pathlib import Path

PRODUCTS = "products.json"  # which algorithm computes a matrix product fastest


def user_folder():
    """Where this user's files are: $NANOFUSE_DIR or ~/.cache/nanofuse."""
    return Path(os.environ.get("NANOFUSE_DIR") or "~/.cache/nanofuse").expanduser()


def sections_of(path):
    """{section: its content} of a file; {} where it is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class Store:
    """One section of a file.

    Args:
        path: of the JSON file; None: nothing is kept.
        section: text that names all that the entries depend on.
    """

    def __init__(self, path, section):
        self.path, self.section = path and Path(path), section

    def _sections(self):
        return sections_of(self.path) if self.path else {}

    def entries(self):
        """{key: entry} as kept; entries are whatever the file holds, and checked by who reads."""
        found = self._sections().get(self.section)
        return found if isinstance(found, dict) else {}

    def add(self, entries):
        """Put {key: entry} into the section, and leave all else in the file as it is.

        The file is replaced as a whole: a reader sees the old one or the new one. Of two processes
        that write at the same moment one may lose its entries, and measures them again.

        Returns:
            None, or why it could not be written, in words.
        """
        if self.path is None:
            return "no file"
        sections = self._sections()
        sections[self.section] = {**self.entries(), **entries}
        temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(sections, indent=1, sort_keys=True), encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            return f"{error.strerror}: {self.path}"
        return None
