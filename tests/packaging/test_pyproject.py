"""What pyproject.toml says once more than another file does, and agrees with it."""

import re

import pytest

from tests.packaging.checks import ROOMS, ROOT

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_pre_commit_has_the_ruff_of_the_tests():
    (pinned,) = re.findall(r"ruff==(\S+?)['\"]", str(PROJECT["project"]["optional-dependencies"]))
    (hook,) = re.findall(
        r"ruff-pre-commit\n\s+rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text()
    )
    assert hook == pinned


def test_every_folder_with_code_is_a_package():
    folders = {path.parent.relative_to(ROOT) for path in ROOT.glob("nanofuse/**/*.py")}
    packages = {".".join(folder.parts) for folder in folders}
    for room in ROOMS:
        for path in ROOT.glob(f"{room}/**/*.py"):
            packages.add(".".join(["nanofuse", *path.parent.relative_to(ROOT).parts]))
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages
