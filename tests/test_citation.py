"""CITATION.cff: what version 1.2.0 of the format asks for, and what the package says of itself."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import ept_fast

# Of the format's definitions, those of what this file has: required keys, and further ones.
SOFTWARE = (
    {"authors", "cff-version", "message", "title"},
    {"abstract", "keywords", "license", "references", "type", "version"},
)
REFERENCE = ({"authors", "title", "type"}, {"identifiers", "url", "year"})
PERSON = ({"family-names", "given-names"}, set[str]())
ENTITY = ({"name"}, set[str]())
IDENTIFIER = ({"type", "value"}, {"description"})


@pytest.fixture(scope="module")
def citation(root: Path) -> dict[str, Any]:
    # As YAML's base types, strings: "0.1" is a version and not a number.
    text = (root / "CITATION.cff").read_text(encoding="utf-8")
    read: dict[str, Any] = yaml.load(text, Loader=yaml.BaseLoader)
    return read


def check(part: dict[str, Any], keys: tuple[set[str], set[str]]) -> None:
    required, further = keys
    assert required <= set(part) <= required | further
    for key, value in part.items():
        assert value, key
        if isinstance(value, str):
            assert value == value.strip(), key
        else:
            assert len({str(each) for each in value}) == len(value), key


def test_has_what_the_format_asks_for(citation: dict[str, Any]) -> None:
    check(citation, SOFTWARE)
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] in {"dataset", "software"}
    for author in citation["authors"]:
        check(author, ENTITY)
    for reference in citation["references"]:
        check(reference, REFERENCE)
        assert reference["type"] == "article"
        assert re.fullmatch(r"https://\S+", reference["url"])
        assert re.fullmatch(r"\d{4}", reference["year"])
        for author in reference["authors"]:
            check(author, PERSON)
        for identifier in reference["identifiers"]:
            check(identifier, IDENTIFIER)
            assert identifier["type"] in {"doi", "other", "swh", "url"}


def test_agrees_with_the_package(root: Path, citation: dict[str, Any]) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["title"] == project["name"]
    assert citation["version"] == ept_fast.__version__
    assert citation["license"] == project["license"]
    assert citation["authors"] == project["authors"]
    assert citation["keywords"] == project["keywords"]


def test_names_the_paper_that_the_documents_name(root: Path, citation: dict[str, Any]) -> None:
    (paper,) = citation["references"]
    assert f"*{paper['title']}*" in (root / "docs" / "method.md").read_text(encoding="utf-8")
    assert paper["url"] in (root / "README.md").read_text(encoding="utf-8")
