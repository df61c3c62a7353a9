"""What the site takes over from outside of docs/, so that links which lead there work in it.

A file of the repository is ``repository/<its path>`` in the site: Markdown and Python files as
pages, a folder as its README or as a page that lists it, and everything else as it is. Files are
found by following the links from docs/ and from the Markdown files beside it. A link to what does
not exist is left alone, and MkDocs reports it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from posixpath import join, normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

HOME = "repository"  # of what is taken over
UNSEARCHED = "---\nsearch:\n  exclude: true\n---\n"
# Code first, so that nothing in it is taken for a link.
LINK = re.compile(
    r"^(?P<fence>```|~~~).*?^(?P=fence)|(?P<tick>`+).*?(?P=tick)"
    r"|(?P<before>\]\(|^\[[^\]]+\]:\s+)(?P<target>[^\s)#]+)",
    re.M | re.S,
)
EXTERNAL = re.compile(r"[a-z]+:|/", re.I)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file that links lead to, and those that links in it lead to."""
    root, docs = _places(config)
    # Paths within the repository.
    waiting = [path.name for path in root.glob("*.md")]
    for page in files.documentation_pages():
        waiting += _targets(page.content_string, join(docs, page.src_uri))
    seen: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in seen or _within(path, docs) or not _found(path, root):
            continue
        seen.add(path)
        if (root / path / "README.md").is_file():
            waiting.append(normpath(f"{path}/README.md"))
            continue
        added = _file(path, root, config)
        files.append(added)
        if path.endswith(".md") or (root / path).is_dir():
            waiting += _targets(added.content_string, _path(added.src_uri, docs))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead the links between docs/ and the rest of the repository to their places in the site."""
    root, docs = _places(config)
    source = _path(page.file.src_uri, docs)
    if source.endswith(".py.md"):
        return markdown

    def place(match: re.Match[str]) -> str:
        target = match["target"]
        if not target or EXTERNAL.match(target):
            return match[0]
        path = normpath(join(os.path.dirname(source), target))
        if not _found(path, root) or (_within(path, docs) and _within(source, docs)):
            return match[0]
        uri = _uri(path, root, docs)
        return match["before"] + relpath(uri, os.path.dirname(page.file.src_uri) or ".")

    return LINK.sub(place, markdown)


def _places(config: MkDocsConfig) -> tuple[Path, str]:
    docs = Path(config.docs_dir)
    return docs.parent, docs.name


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def _found(path: str, root: Path) -> bool:
    """Whether it is in the repository."""
    return not _within(path, "..") and (root / path).exists()


def _targets(text: str, source: str) -> Iterator[str]:
    """The paths in the repository that a Markdown file links to, there or not."""
    for match in LINK.finditer(text):
        target = match["target"]
        if target and not EXTERNAL.match(target):
            yield normpath(join(os.path.dirname(source), target))


def _path(uri: str, docs: str) -> str:
    """The path in the repository of a source file of the site."""
    return uri.removeprefix(f"{HOME}/") if uri.startswith(f"{HOME}/") else join(docs, uri)


def _uri(path: str, root: Path, docs: str) -> str:
    """The source file of the site that shows a file or folder of the repository."""
    if path == docs:
        return "index.md"
    if _within(path, docs):
        return path.removeprefix(f"{docs}/")
    if (root / path).is_dir():
        own = (root / path / "README.md").is_file()
        return normpath(f"{HOME}/{path}/{'README' if own else 'index'}.md")
    return f"{HOME}/{path}.md" if path.endswith(".py") else f"{HOME}/{path}"


def _file(path: str, root: Path, config: MkDocsConfig) -> File:
    uri = _uri(path, root, Path(config.docs_dir).name)
    found, hidden = root / path, InclusionLevel.NOT_IN_NAV
    if found.is_dir():
        return File.generated(config, uri, content=_listing(path, found), inclusion=hidden)
    if path.endswith(".py"):
        code = f"{UNSEARCHED}# {path}\n\n~~~~python\n{found.read_text(encoding='utf-8')}~~~~\n"
        return File.generated(config, uri, content=code, inclusion=hidden)
    return File.generated(config, uri, abs_src_path=str(found), inclusion=hidden)


def _listing(path: str, folder: Path) -> str:
    names = sorted(
        each.name + "/" * each.is_dir()
        for each in folder.iterdir()
        if not each.name.startswith((".", "__pycache__"))
    )
    return "\n".join([f"{UNSEARCHED}# {path}/", "", *(f"- [{name}]({name})" for name in names), ""])
