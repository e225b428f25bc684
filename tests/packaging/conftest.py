"""A copy of the clone, the wheel made from it, and an environment to install it in."""

import shutil
import subprocess
import sys

import pytest

from tests.packaging.checks import NEIGHBOURS, NOT_CODE, ROOT, Environment


@pytest.fixture(scope="session")
def clone(tmp_path_factory):
    """A copy of the working tree without what was built in it."""
    copy = tmp_path_factory.mktemp("clone") / "nanofuse"
    return shutil.copytree(ROOT, copy, ignore=NOT_CODE)


@pytest.fixture(scope="session")
def wheel(clone, tmp_path_factory):
    """The wheel, built from the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", folder, clone]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="session")
def environment(wheel, tmp_path_factory):
    """torch, Hugging Face's packages and what our wheel depends on, without the wheel."""
    made = Environment(tmp_path_factory.mktemp("environment") / "venv")
    made.link_torch()
    made.install(*NEIGHBOURS)
    made.imports_hugging_face(made.folder)
    made.install(wheel)
    made.uninstall()
    made.imports_hugging_face(made.folder)
    return made
