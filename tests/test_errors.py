"""docs/errors.md is what the commands say."""

import re

from tests.errors import PAGE, page


def test_the_page_of_errors_is_what_the_commands_say():
    text = page()
    rows = re.findall(r"^\| `(.+?)` \| (.*) \|$", text, flags=re.MULTILINE)
    assert len(rows) > 100
    for given, message in rows:
        assert message.startswith("error: "), f"{given}: not refused"
    there = PAGE.read_text(encoding="utf-8").splitlines()
    changed = [line for line in text.splitlines() if line not in there]
    assert there == text.splitlines(), f"run python -m tests.errors: {changed[:3]}"
