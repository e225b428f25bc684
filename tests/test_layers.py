"""Imports point one way, go by one name, and nobody imports a command."""

import ast
import sys
from pathlib import Path

import pytest

from tests.mirrors import MIRRORS, mirror

ROOT = Path(__file__).parent.parent
ROOMS = ("kernels", "model", "train", "bench")
ALLOWED = {"nanofuse": {"ops", "kernels"}, "kernels": {"kernels"}}
ALLOWED["model"] = ALLOWED["kernels"] | {"model"}
ALLOWED["train"] = ALLOWED["model"] | {"train"}
ALLOWED["bench"] = ALLOWED["train"] | {"bench"}
COMMANDS = {"train.run", "train.generate", "train.convert", "train.data.__main__"}
COMMANDS |= {"train.export", "train.plot", "train.runs", "train.doctor", "train.warm"}
COMMANDS |= {"bench.tune", "bench.step_profile", "bench.first_call", "bench.ops_page"}
COMMANDS |= {"bench.scaling_model", "bench.decode", "train.sweep"}


def imports(path):
    """Modules that a file imports, in full; a name taken out of a package counts as its module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by a relative name"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(path):
    """The modules of this project among them, without the package's name."""
    for name in imports(path):
        if name.startswith("nanofuse."):
            yield name.removeprefix("nanofuse.")


def files(room):
    found = sorted((ROOT / room).glob("**/*.py"))
    assert found
    return found


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_imports_point_one_way(room):
    for path in files(room):
        for name in ours(path):
            assert name.split(".")[0] in ALLOWED[room], f"{path} imports {name}"
        assert not any(name.split(".")[0] == "tests" for name in imports(path)), path


def test_kernels_share_one_room():
    for path in files("kernels/common"):
        for name in ours(path):
            assert name.startswith("kernels.common"), f"{path} imports {name}"


@pytest.mark.parametrize("room", [*ROOMS, "nanofuse", "tests"])
def test_one_import_name(room):
    """`kernels` is Hugging Face's package where that is installed."""
    for path in files(room):
        for name in imports(path):
            assert name.split(".")[0] not in ROOMS, f"{path} imports {name}, not nanofuse.{name}"


def test_kernels_give_way_to_a_package_of_that_name():
    assert not (ROOT / "kernels/__init__.py").exists()


@pytest.mark.parametrize("room", ROOMS)
def test_nobody_imports_a_command(room):
    for path in files(room):
        for name in ours(path):
            assert name not in COMMANDS, f"{path} imports {name}"


def test_train_does_not_name_triton():
    for path in files("train"):
        assert not any(name.split(".")[0] == "triton" for name in imports(path)), path


def test_triton_comes_from_one_file():
    """Without it that file has stand-ins (tests/test_without_triton.py). What compiles ahead of a
    launch takes Triton's inner parts, and is loaded where Triton is."""
    for path in [p for room in ("kernels", "model", "nanofuse") for p in files(room)]:
        if path.name not in ("jit.py", "ahead.py"):
            assert not any(name.split(".")[0] == "triton" for name in imports(path)), path


@pytest.mark.parametrize("room", ROOMS)
def test_no_file_hides_a_standard_module(room):
    """A script that is run as a file finds its neighbours before the standard library."""
    names = {path.stem for path in files(room)} & sys.stdlib_module_names
    assert names <= {"profile"}, names  # the old command, which hands the standard module on


@pytest.mark.parametrize("room", ["kernels", "model", "train"])
def test_every_file_has_a_mirror(room):
    for path in files(room):
        if path.stem != "__init__":
            found = mirror(path.relative_to(ROOT))
            assert (ROOT / found).is_file(), f"{path} has no mirror {found}"
    for name in MIRRORS:
        place = Path(name)
        assert (ROOT / f"{name}.py").is_file(), f"{name} is gone"
        own = ROOT / "tests" / place.parent / f"test_{place.name}.py"
        assert not own.exists(), f"{name} has a mirror of its name"


def test_no_two_test_files_have_one_name():
    """pytest imports them by their name alone, and would not collect the second."""
    names = [path.name for path in ROOT.glob("tests/**/test_*.py")]
    assert sorted(names) == sorted(set(names))
