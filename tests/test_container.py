"""The Dockerfile and dev/constraints.txt agree with pyproject.toml, and hadolint finds nothing.

Nothing here builds it: that wants a container engine."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
LINES = (ROOT / "dev/constraints.txt").read_text(encoding="utf-8").splitlines()
PINS = dict(
    line.partition(";")[0].split("==") for line in LINES if line and not line.startswith("#")
)
TOOLS = {"setuptools", "wheel"}  # of the build, which has no isolation


def installed():
    """The extras that the Dockerfile installs."""
    return re.search(r"--editable '\.\[([\w,]+)\]'", DOCKERFILE)[1].split(",")


def requirements():
    """{name: Requirement} of the project with those extras, for the image's Python."""
    extras = PROJECT["optional-dependencies"]
    found = PROJECT["dependencies"] + [r for extra in installed() for r in extras[extra]]
    python = re.search(r"python(3\.\d+)-venv", DOCKERFILE)[1]
    image = {"python_version": python, "platform_system": "Linux"}
    made = map(Requirement, found)
    return {
        canonicalize_name(r.name): r for r in made if r.marker is None or r.marker.evaluate(image)
    }


def test_every_requirement_is_pinned_within_its_bounds_and_nothing_else():
    pins = {canonicalize_name(name): version for name, version in PINS.items()}
    assert pins.keys() - TOOLS == requirements().keys()
    for name, requirement in requirements().items():
        assert requirement.specifier.contains(pins[name], prereleases=True), requirement


def test_the_build_tools_are_those_that_torch_takes():
    """torch 2.11 requires setuptools<82; this project's own table of packages needs 77."""
    assert PINS["torch"].startswith("2.11.")
    assert SpecifierSet(">=77,<82").contains(PINS["setuptools"])


def test_what_the_dockerfile_names_is_what_pyproject_says():
    assert f"torch=={PINS['torch']}" in DOCKERFILE
    (engine,) = PROJECT["optional-dependencies"]["fp8"]
    assert f"'{engine}'" in DOCKERFILE
    assert {"fp8", "attention", "products", "energy", "hub"} <= set(installed())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"torch=={PINS['torch']}" in readme


def test_what_it_copies_is_there_and_not_ignored():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored
    copies = re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.M)
    for name in " ".join(copies).split():
        assert (ROOT / name).exists() and f"!{name}" in ignored, name
    rooms = {"nanofuse", "kernels", "model", "train", "bench"}
    assert rooms <= set(" ".join(copies).split())


def test_it_does_not_run_as_root():
    last = re.findall(r"^(?:USER|ENTRYPOINT) .*$", DOCKERFILE, re.M)
    assert last == ["USER 10001", 'ENTRYPOINT ["python", "-m", "train.run"]']
    assert "--uid 10001" in DOCKERFILE


def test_hadolint_finds_nothing():
    lint = Path(sys.executable).with_name("hadolint")
    if not lint.exists():
        pytest.skip("hadolint is not installed; the extra `test` has it on Linux")
    done = subprocess.run([lint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
    bad = DOCKERFILE.replace("--no-install-recommends", "").encode()
    assert subprocess.run([lint, "-"], input=bad, capture_output=True).returncode == 1
