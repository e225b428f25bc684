"""The part of the site that mkdocs.yml cannot say: pages keep their places in the repository.

README.md is /, docs/recipe.md is docs/recipe, so a link means the same here as on GitHub. What a
page links to comes along: Markdown as a page of its own, code and folders as pages that show them,
everything else as a file. mkdocs calls the functions; a dead link is its warning.
"""

import os.path
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)#\s]+)")
CODE = {".py": "python", ".sh": "bash", ".toml": "toml", ".yml": "yaml", "Dockerfile": "docker"}


def named(entry):
    """Paths of the pages in a part of mkdocs.yml's nav."""
    if isinstance(entry, str):
        yield entry
    else:
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from named(part)


def language(path):
    """What a file is shown as, or None if it is not shown on a page."""
    return CODE.get(path.suffix or path.name)


def page_of(uri):
    """The Markdown, there or made, that stands for a file or folder of the repository."""
    path = ROOT / uri
    if path.is_dir():
        return f"{uri}/README.md"
    return f"{uri}.md" if path.is_file() and language(path) else uri


def target(page, link):
    """The path, from the root, that a link of a page leads to."""
    return os.path.normpath(os.path.join(os.path.dirname(page), link))


def shown(uri):
    """The Markdown of a page that shows a file of code, or what a folder has."""
    path = ROOT / uri
    head = f"---\nsearch:\n  exclude: true\n---\n# {uri}\n\n"
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir() if p.is_file() and language(p))
        return head + "".join(f"- [{name}]({name})\n" for name in names)
    return f"{head}````{language(path)}\n{path.read_text(encoding='utf-8')}````\n"


def on_files(files, config):
    """The pages of the nav and all that they lead to, in place of what is in docs/."""
    found, waiting = {}, [*named(config.nav)]
    while waiting:
        uri = waiting.pop()
        page = page_of(uri)
        if page in found or not (ROOT / uri).exists():
            continue
        if (ROOT / page).is_file():
            found[page] = File(page, str(ROOT), config.site_dir, config.use_directory_urls)
        else:
            found[page] = File.generated(config, page, content=shown(uri))
        if page.endswith(".md") and not language(ROOT / uri):
            links = LINK.findall(found[page].content_string)
            waiting += [target(page, link) for _, link in links]
    theme = [file for file in files if file.generated_by or not file.src_uri.endswith(".md")]
    return Files([*found.values(), *(f for f in theme if f.src_dir != config.docs_dir)])


def on_page_markdown(markdown, page, **_):
    """Links to files and folders become links to the pages that show them."""

    def mended(match):
        uri = target(page.file.src_uri, match[2])
        return match[1] + os.path.relpath(page_of(uri), os.path.dirname(page.file.src_uri) or ".")

    return LINK.sub(mended, markdown)
