"""docs/api.md: signature, docstring and example of every function of nanofuse.ops.

    python -m tests.api_page

A test (tests/test_api_page.py) makes the page anew and compares; tests/test_ops.py runs the
examples.
"""

import inspect
import re
import sys
from pathlib import Path

from nanofuse import ops

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
HEAD = """# The ops as a library

`python -m tests.api_page` writes this page from [nanofuse/ops](../nanofuse/ops); a test compares
it, and another runs every example. What each op computes in full, and how fast, is on the
[page of ops](ops.md); [a kernel in a model of your own](../examples/own_model.py) is an example to
copy.

"""
SECTION = re.compile(r"(Args|Raises):$")
ITEM = re.compile(r"    (\w[\w, ]*): (.*)")


def signature(function):
    """The source of its `def`, whose comments say the shapes."""
    source = inspect.getsource(function)
    code = source.partition('"""')[0].rstrip()
    return code[code.index("def ") :]


def words(line):
    """A line of text, with nothing in it that Markdown takes for something else."""
    line = re.sub(r"(?<!<)(?<!\]\()https?://[^\s),]+[^\s),.]", r"<\g<0>>", line)
    parts = re.split(r"(`[^`]*`|<[^>]*>)", line)
    return "".join(p if p[:1] in "`<" else re.sub(r"([*_^])", r"\\\1", p) for p in parts)


def prose(text):
    """Lines of Markdown for a docstring without its example: the items of Args and Raises become
    lists, what is indented stays code."""
    listing = False
    for line in text.splitlines():
        if match := SECTION.match(line):
            listing = True
            yield from (f"{match[1]}:", "")
        elif listing and (match := ITEM.match(line)):
            yield f"- `{match[1]}`: {words(match[2])}"
        elif listing and line.startswith(8 * " "):
            yield f"  {words(line.strip())}"
        else:
            listing = listing and not line
            yield line if line.startswith("    ") else words(line)


def entry(name):
    """The Markdown of one function."""
    function = getattr(ops, name)
    text, start, example = inspect.getdoc(function).partition(">>>")
    said = "\n".join(prose(text.strip()))
    return (
        f"### {name}\n\n```python\n{signature(function)}\n```\n\n{said}\n\n"
        f"```pycon\n{start}{example}\n```\n"
    )


def page():
    """The text of docs/api.md: the functions by their files, in the order of the alphabet."""
    files = {}
    for name in sorted(ops.__all__):
        files.setdefault(inspect.getmodule(getattr(ops, name)), []).append(name)
    parts = [HEAD + inspect.getdoc(ops) + "\n"]
    for module in sorted(files, key=lambda module: module.__name__):
        title = inspect.getdoc(module).partition("\n")[0].rstrip(".")
        parts += [f"## {title}\n", *map(entry, files[module])]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written to {PAGE}", file=sys.stderr)
