"""The documents' links, read as files and as a site; ``make docs`` builds the whole site."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from markdown_it import MarkdownIt
from markdown_it.token import Token

import ept_fast
from ept_fast.prompts.base import prompt_methods

FOLDERS = ("", "docs", "docs/api", "csrc", "bench/results/accuracy")


def documents(root: Path) -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (root / folder).glob("*.md"))


def tokens(path: Path) -> Iterator[Token]:
    for block in MarkdownIt("commonmark").parse(path.read_text(encoding="utf-8")):
        yield block
        yield from block.children or []


def anchors(path: Path) -> set[str]:
    """Of the headings, as sites that show repositories name them."""
    found: Counter[str] = Counter()
    names = set()
    read = list(tokens(path))
    for one, inline in itertools.pairwise(read):
        if one.type == "heading_open":
            text = "".join(part.content for part in inline.children or [])
            name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            names.add(f"{name}-{found[name]}" if found[name] else name)
            found[name] += 1
    return names


def broken_links(path: Path) -> list[str]:
    broken = []
    for token in tokens(path):
        link = token.attrs.get("href", token.attrs.get("src"))
        if link is None or re.match(r"[a-z]+:", str(link)):
            continue
        name, _, anchor = unquote(str(link)).partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(str(link))
    return broken


def test_links_of_files_lead_somewhere(root: Path) -> None:
    broken = {str(path): broken_links(path) for path in documents(root)}
    assert len(broken) > 30
    assert {path: links for path, links in broken.items() if links} == {}


def test_a_broken_link_of_a_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A `b`: c\n\n# Twice\n\n# Twice\n")
    right = "[](other.md) [](other.md#a-b-c) [](other.md#twice-1) [](#here) <https://x.org/y>"
    wrong = ["none.md", "other.md#b", "other.md#twice-2", "#there", "none.png"]
    text = " ".join(f"[]({link})" for link in wrong[:-1]) + " ![](none.png)"
    (tmp_path / "one.md").write_text(f"# Here\n\n{right} `[](code.md)`\n\n{text}\n")
    assert broken_links(tmp_path / "one.md") == wrong


def test_every_public_name_is_in_the_reference(root: Path) -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (root / "docs/api").glob("*.md"))
    shown = set(re.findall(r"^::: (\S+)$", pages, re.M))
    names = {f"ept_fast.{name}" for name in ept_fast.__all__ if name != "__version__"}
    # The classes of EPT itself are among the public names.
    methods = {method.__module__ for method in prompt_methods().values()} - {"ept_fast.prompts.ept"}
    names |= {name for name in methods if name.startswith("ept_fast.")}
    assert names - shown == set()


def test_first_example_runs(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    (code,) = (token.content for token in tokens(root / "docs/index.md") if token.type == "fence")
    sizes = {"hidden_size": 384, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 11}
    batch = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}
    names = {
        "backbone": transformers.BertModel(transformers.BertConfig(**sizes)),
        "batch": batch | {"attention_mask": torch.ones(2, 3, dtype=torch.long)},
        "labels": torch.tensor([1, 0]),
    }
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/index.md", "exec"), names)
    assert (tmp_path / "my-adapter" / "ept_model.safetensors").is_file()


DOCSTRING = '''
def near(): ...
def add(first, second, third, *rest):
    """As :func:`near` and :func:`~torch.add`, such as::

        add(1, 2)

    Args:
        first, second,
            third: numbers,
            in one unit.
        *rest: further ones.

    Raises:
        TypeError, ValueError: one, or another.

    Example:
        >>> add(1, 2)
        3
    """
'''

REWRITTEN = """\
As <autoref optional identifier="made.near"><code>near</code></autoref> and \
<autoref optional identifier="torch.add"><code>add</code></autoref>, such as:

    add(1, 2)

Args:
    first: numbers,
        in one unit.
    second: numbers,
        in one unit.
    third: numbers,
        in one unit.
    *rest: further ones.

Raises:
    TypeError, ValueError: one, or another.

Examples:
    >>> add(1, 2)
    3"""


def test_docstrings_are_rewritten_for_the_reference(root: Path, tmp_path: Path) -> None:
    griffe = pytest.importorskip("griffe", reason="it comes with the `docs` extra")
    (tmp_path / "made.py").write_text(DOCSTRING)
    extensions = griffe.load_extensions(root / "docs/docstrings.py")
    made = griffe.load("made", search_paths=[tmp_path], extensions=extensions)
    assert made["add"].docstring.value == REWRITTEN


@dataclass(frozen=True)
class Project:
    """A few pages beside a few files, under the settings and the hook of the real site."""

    root: Path

    def write(self, name: str, text: str = "") -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def build(self) -> tuple[bool, list[str]]:
        """Whether a strict build into ``site`` succeeds, and its warnings."""
        done = subprocess.run(
            [sys.executable, "-m", "mkdocs", "build", "--strict"],
            cwd=self.root,
            env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        lines = (done.stdout + done.stderr).splitlines()
        return done.returncode == 0, [line for line in lines if not line.startswith("INFO")]

    def page(self, name: str) -> Page:
        page = Page()
        page.feed((self.root / "site" / name).read_text(encoding="utf-8"))
        return page


class Page(HTMLParser):
    """What a page loads, what it links to, and the text of its body."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "a":
            self.links.append(values.get("href", ""))
        else:
            self.loads += [values[name] for name in ("src", "href", "data") if name in values]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def project(root: Path, tmp_path: Path) -> Project:
    if find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: it comes with the `docs` extra")
    made = Project(tmp_path / "project")
    pages = ["index.md", "guide/second.md", "repository/README.md"]
    # Without mkdocstrings, which takes most of the real site's time.
    settings = f"INHERIT: {root}/mkdocs.yml\nplugins: [search, offline]\nnav: {pages}\n"
    made.write("mkdocs.yml", settings)
    made.write("docs/index.md", "# First\n")
    made.write("docs/guide/second.md", "# Second\n\n## A heading\n\n[](../index.md#first)\n")
    made.write(
        "NOTES.md",
        "# Notes\n\n## Of `mine`\n\n![](data/two.png) [](docs/guide/second.md) [](docs/)\n",
    )
    made.write("README.md", "# The project\n")
    made.write("own/README.md", "# Of its own\n")
    made.write("data/one.csv", "a,b\n")
    made.write("data/two.png")
    made.write("code/run.py", "x = 1  # [](none.md)\n")
    shutil.copytree(root / "docs/assets", made.root / "docs/assets")
    shutil.copy(root / "docs/hooks.py", made.root / "docs")
    return made


def test_site_holds_what_its_pages_link_to(project: Project) -> None:
    table = [
        ("[](../NOTES.md)", "repository/NOTES.html", "Of mine"),
        ("[](../NOTES.md#of-mine)", "repository/NOTES.html#of-mine", "Of mine"),
        ("[](../data/one.csv)", "repository/data/one.csv", "a,b"),
        ("[](../code/run.py)", "repository/code/run.py.html", "x = 1  # [](none.md)"),
        ("[](../code/)", "repository/code/index.html", "run.py"),
        ("[](../)", "repository/index.html", "The project"),
        ("[](../own/)", "repository/own/index.html", "Of its own"),
        ("[x]\n\n[x]: ../data", "repository/data/index.html", "one.csv"),
        ("[](guide/second.md#a-heading)", "guide/second.html#a-heading", "A heading"),
        ("[](#first)", "#first", ""),
        ("`[](../none.md)`\n\n~~~\n[](none.md)\n~~~\n\n[](index.md)", "index.html", "[](none.md)"),
    ]
    text = "\n\n".join(link for link, _, _ in table)
    project.write("docs/index.md", f"# First\n\n{text}\n\n![](../data/two.png)\n")
    assert project.build() == (True, [])
    index = project.page("index.html")
    for _, link, shown in table:
        assert link in index.links
        assert shown in project.page(link.partition("#")[0] or "index.html").text
    assert "repository/data/two.png" in index.loads
    assert (project.root / "site/repository/data/two.png").is_file()
    notes = project.page("repository/NOTES.html")
    assert {"../guide/second.html", "../index.html"} <= set(notes.links)
    assert "data/two.png" in notes.loads


def test_site_is_not_built_with_a_broken_link(project: Project) -> None:
    table = [
        ("docs/index.md", "[](../none.md)", "a link '../none.md', but the target"),
        ("docs/index.md", "[](../../outside.md)", "a link '../../outside.md', but the target"),
        ("docs/index.md", "[](none.md)", "a link 'none.md', but the target"),
        ("docs/index.md", "![](../data/none.png)", "a link '../data/none.png', but the target"),
        ("docs/index.md", "[](../NOTES.md#none)", "does not contain an anchor '#none'"),
        ("docs/index.md", "[](guide/second.md#nowhere)", "not contain an anchor '#nowhere'"),
        ("docs/index.md", "[](#none)", "there is no such anchor on this page"),
        ("docs/index.md", "[](/guide/second.md)", "an absolute link '/guide/second.md'"),
        ("docs/index.md", "[](guide/)", "an unrecognized relative link 'guide/'"),
        ("NOTES.md", "[](docs/none.md)", "a link 'docs/none.md', but the target"),
        ("NOTES.md", "[](docs/index.md#nothing)", "does not contain an anchor '#nothing'"),
        ("docs/third.md", "A page.", 'are not included in the "nav" configuration'),
    ]
    for file in {file for file, _, _ in table}:
        text = "\n\n".join(link for of, link, _ in table if of == file)
        project.write(file, f"# First\n\n{text}\n")
    project.write("../outside.md")
    built, warnings = project.build()
    assert not built
    for _, _, said in table:
        (found,) = (line for line in warnings if said in line)
        warnings.remove(found)
    assert [line for line in warnings if line.startswith(("WARNING", "ERROR"))] == []


def test_pages_load_nothing_from_another_host(project: Project) -> None:
    assert project.build() == (True, [])
    site = project.root / "site"
    loaded = {
        (page.parent / link.partition("?")[0]).resolve()
        for page in site.rglob("*.html")
        if page.name != "404.html"  # a server's
        for link in project.page(str(page.relative_to(site))).loads
    }
    assert {path.suffix for path in loaded} >= {".css", ".js"}
    assert [path for path in loaded if not path.is_file()] == []
    for path in loaded:
        if path.suffix == ".css":
            urls = re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')]+)", path.read_text())
            assert [url for url in urls if not url.startswith("data:")] == []
