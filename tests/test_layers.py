"""Imports point one way, and no command hides another package's name."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"kernels", "model", "train", "bench", "tests"}
ALLOWED = {"kernels": {"kernels"}, "model": {"kernels", "model"}}
ALLOWED["train"] = {"kernels", "model", "train"}
ALLOWED["bench"] = {"kernels", "model", "train", "bench"}
# A command of model/ that needs a run's checkpoint and tokenizer; nothing may import it.
COMMANDS = {Path("model/generate.py")}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_point_one_way(package):
    files = sorted((ROOT / package).glob("**/*.py"))
    assert files
    for path in files:
        relative = path.relative_to(ROOT)
        for name in imports(path):
            top = name.split(".")[0]
            assert name != "model.generate", f"{relative} imports a command"
            if top in OURS and relative not in COMMANDS:
                assert top in ALLOWED[package], f"{relative} imports {name}"


def test_train_does_not_name_triton():
    for path in (ROOT / "train").glob("*.py"):
        assert not any(name.split(".")[0] == "triton" for name in imports(path)), path
