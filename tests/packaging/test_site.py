"""The site builds with warnings as errors, all its links lead somewhere, and nothing is fetched."""

import subprocess
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

from tests.packaging.checks import ROOT, Environment

tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
pytestmark = pytest.mark.packaging


class Links(HTMLParser):
    """What a page links to, what it loads, and the places in it."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.places = set(), set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "a":
            self.links.add(given.get("href") or "")
        elif tag != "link" or given.get("rel") in ("stylesheet", "icon"):
            self.loaded |= {given[name] for name in ("src", "href") if given.get(name)}
        self.places |= {given[name] for name in ("id", "name") if name in given}


@pytest.fixture(scope="module")
def mkdocs(tmp_path_factory):
    """mkdocs(folder, *arguments) builds strictly; pinned as in the extra docs."""
    made = Environment(tmp_path_factory.mktemp("docs") / "venv")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    made.install(*project["optional-dependencies"]["docs"])

    def build(folder, out):
        command = [made.folder / "bin/mkdocs", "build", "--strict", "--site-dir", out]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True)

    return build


def test_every_link_leads_somewhere_and_nothing_is_loaded_from_elsewhere(mkdocs, tmp_path):
    done = mkdocs(ROOT, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path: Links(path) for path in tmp_path.glob("**/*.html") if path.name != "404.html"}
    assert tmp_path / "docs/recipe.html" in pages and tmp_path / "records/README.html" not in pages
    assert "relu_squared_ref" in (tmp_path / "kernels/relu_squared.py.html").read_text("utf-8")
    for path, page in pages.items():
        assert not any("//" in x for x in page.loaded), (path, page.loaded)
        for link in page.links | page.loaded:
            if "://" in link or link.startswith("mailto:"):
                continue
            file, _, place = unquote(link).partition("#")
            there = (path.parent / file).resolve() if file else path
            there = there / "index.html" if there.is_dir() else there
            assert there.is_file(), f"{path}: {link}"
            if place and there.suffix == ".html":
                assert place in pages[there].places, f"{path}: {link}"


def test_the_nav_has_every_page_of_the_docs():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    missing = [p.name for p in (ROOT / "docs").glob("*.md") if f": docs/{p.name}\n" not in text]
    assert not missing, missing


def test_a_dead_link_is_an_error(mkdocs, tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "docs").mkdir()
    for name in ("mkdocs.yml", "dev/site.py"):
        text = (ROOT / name).read_text(encoding="utf-8")
        start, end = text.find("nav:"), text.find("theme:")
        cut = text[:start] + "nav: [README.md]\n" + text[end:] if name == "mkdocs.yml" else text
        cut = cut.replace("CONTRIBUTING.md, CHANGELOG.md, dev, records, examples", "dev")
        (tmp_path / name).write_text(cut, encoding="utf-8")
    (tmp_path / "README.md").write_text("# A\n\n[code](dev/site.py) [more](dev/gone.py)\n")
    done = mkdocs(tmp_path, tmp_path / "bad")
    assert done.returncode == 1 and "gone.py" in done.stderr and "site.py" not in done.stderr
