"""docs/api.md is what nanofuse.ops says."""

import re

import pytest

from nanofuse import ops
from tests.api_page import PAGE, page, prose, words


def test_the_page_is_what_the_docstrings_say():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.api_page"


@pytest.mark.parametrize("name", ops.__all__)
def test_every_function_is_there_with_shapes_and_an_example(name):
    (entry,) = re.findall(rf"^### {name}$(.*?)(?=^##|\Z)", page(), re.M | re.S)
    assert f"```python\ndef {name}(" in entry and ") -> " in entry
    assert ">>> from nanofuse import ops" in entry and f"ops.{name}(" in entry
    assert '"""' not in entry and "Source" in entry


def test_docstrings_become_markdown():
    text = "N = B*T of tok_t.\n\n    y = a*b\n\nArgs:\n    a, b: one\n        x_y more\n\nend"
    assert list(prose(text)) == [
        "N = B\\*T of tok\\_t.", "", "    y = a*b", "",
        "Args:", "", "- `a, b`: one", "  x\\_y more", "", "end",
    ]  # fmt: skip
    assert words("`a*b` at https://x.org/a_b.") == "`a*b` at <https://x.org/a_b>."
