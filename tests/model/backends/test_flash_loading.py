"""The import of FlashAttention 4: what it needs of a package is there, and the rest when asked."""

import importlib
import sys
from types import ModuleType

import pytest

from nanofuse.model.backends import flash_loading

FILES = {
    "__init__": "import {name}.dsl\nimport {name}.slow\nfrom {name}.slow import rmsnorm",
    "dsl": "CHANGED = []\nCHANGED.append(1)",
    "layout": "import {name}.dsl",
    "slow": "def rmsnorm(): pass",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """package(**files) writes a package that sys.path finds, and gives its name."""

    def write(**files):
        name = "quack_of_the_tests"
        folder = tmp_path / name
        folder.mkdir()
        for file, text in {**FILES, **files}.items():
            if text is not None:
                (folder / f"{file}.py").write_text(text.format(name=name))
        return name

    monkeypatch.syspath_prepend(tmp_path)
    yield write
    for name in [name for name in sys.modules if name.startswith("quack_of_the_tests")]:
        del sys.modules[name]


def test_modules_come_without_the_others(package):
    name = package()
    flash_loading.open_package(name, "dsl")
    assert f"{name}.dsl" in sys.modules
    found = importlib.import_module(name)
    scope = {}
    exec(f"from {name} import layout", scope)
    assert scope["layout"] is sys.modules[f"{name}.layout"] is found.layout
    assert f"{name}.slow" not in sys.modules and not hasattr(found, "__version__")


def test_the_whole_package_comes_when_a_name_of_it_is_asked_for(package):
    name = package()
    flash_loading.open_package(name, "dsl")
    found = importlib.import_module(name)
    scope = {}
    exec(f"from {name} import rmsnorm", scope)
    assert scope["rmsnorm"] is found.slow.rmsnorm and found is sys.modules[name]
    assert found.dsl.CHANGED == [1]
    with pytest.raises(AttributeError):
        found.no_such_name  # noqa: B018


@pytest.mark.parametrize("dsl", [None, "raise RuntimeError"])
def test_a_package_that_is_otherwise_is_left_alone(package, dsl):
    name = package(dsl=dsl, __init__="WHOLE = True")
    flash_loading.open_package(name, "dsl")
    assert name not in sys.modules and importlib.import_module(name).WHOLE
    flash_loading.open_package(name, "dsl")
    flash_loading.open_package("no_such_package_of_the_tests", "dsl")
    assert importlib.import_module(name).WHOLE


@pytest.mark.parametrize("patched", [False, True])
def test_the_cache_on_disk_is_on_before_the_import(monkeypatch, patched):
    opened, variables = [], {"FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": None}
    monkeypatch.delenv(*variables, raising=False)
    monkeypatch.delenv(flash_loading.PTXAS, raising=False)
    if patched:
        monkeypatch.setenv(flash_loading.PTXAS, "/usr/bin/ptxas")
    monkeypatch.delitem(sys.modules, flash_loading.LIBRARY, raising=False)
    monkeypatch.setattr(flash_loading, "open_package", lambda *args, **how: opened.append(args))
    module = ModuleType(flash_loading.LIBRARY)

    def imported(name):
        assert flash_loading.os.environ[next(iter(variables))] == "1"
        return {flash_loading.LIBRARY: module}[name]

    monkeypatch.setattr(flash_loading.importlib, "import_module", imported)
    assert flash_loading.load() is module
    assert opened == ([] if patched else [("quack",)])
