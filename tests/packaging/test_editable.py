"""`pip install -e .`: the clone's files, from any folder."""

from pathlib import Path

import pytest

from tests.packaging.checks import QUANTIZE, SPAWN

pytestmark = pytest.mark.packaging


@pytest.fixture(scope="module")
def editable(environment, clone):
    environment.install("--no-deps", "--editable", clone)
    yield environment
    environment.uninstall()


def test_nanofuse_is_the_clones(editable, clone, tmp_path):
    assert Path(editable.python("-c", QUANTIZE, cwd=tmp_path)) == clone / "kernels/quantize.py"


def test_spawned_process_imports_it(editable, clone, tmp_path):
    assert Path(editable.python("-c", SPAWN, cwd=tmp_path)) == clone / "kernels/quantize.py"


def test_kernels_is_hugging_faces(editable, clone, tmp_path):
    for cwd in (tmp_path, clone):
        editable.imports_hugging_face(cwd)
