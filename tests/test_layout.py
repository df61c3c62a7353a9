"""How the package is laid out: imports run one way, private names stay private, the map is true."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

# A room imports from those after it. The last is for every other.
ROOMS = (
    ("__main__",),
    ("cli",),
    ("training", "peft", "search", "vllm"),
    ("transformers", "interchange"),
    ("prompts",),
    ("ops",),
    ("backends",),
    ("kernels",),
    ("storage", "checks", "config", "libraries", "losses", "precision", "reference"),
)
# Leaves of their rooms: types and a table that all others speak in.
FOR_EVERYONE = ("ept_fast.ops.types", "ept_fast.ops.activations")
RANKS = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}


def module_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def rank_of(module: str) -> int:
    if module in FOR_EVERYONE:
        return len(ROOMS) - 1
    return RANKS[module.split(".")[1]]


def sources(root: Path) -> dict[str, ast.Module]:
    found = sorted((root / "ept_fast").rglob("*.py"))
    found += sorted((root / "kernels").rglob("*.py"))  # ept_fast/kernels is a link
    modules = {}
    for path in found:
        name = module_of(path, root)
        name = f"ept_fast.{name}" if name.startswith("kernels") else name
        modules[name] = ast.parse(path.read_text(encoding="utf-8"))
    return modules


def imported(tree: ast.Module, known: dict[str, ast.Module]) -> Iterator[str]:
    """Modules of the package, those that a function imports too; not those for types alone."""
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            within = [part for part in parts if part in known]
            yield from within or ([node.module] if node.module in known else [])


@pytest.fixture(scope="module")
def modules(root: Path) -> dict[str, ast.Module]:
    return sources(root)


def test_imports_run_one_way(modules: dict[str, ast.Module]) -> None:
    wrong = []
    for name, tree in modules.items():
        if name == "ept_fast":
            continue
        for other in imported(tree, modules):
            if other == "ept_fast":  # its version, and the definition by its public name
                continue
            mine, theirs = rank_of(name), rank_of(other)
            same_room = name.split(".")[1] == other.split(".")[1]
            last = mine == theirs == len(ROOMS) - 1
            if mine > theirs or (mine == theirs and not same_room and not last):
                wrong.append(f"{name} imports {other}")
    assert not wrong


def test_imports_have_no_circle(modules: dict[str, ast.Module]) -> None:
    """Of whole modules, by what each imports at its top level or within a function."""
    graph = {
        name: {other for other in imported(tree, modules) if other not in ("ept_fast", name)}
        for name, tree in modules.items()
        if name != "ept_fast"
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(tree: ast.Module) -> set[str]:
    """Private names that a file makes: functions, classes, variables, attributes."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in names if private(name)}


def test_no_file_reads_anothers_private_names(modules: dict[str, ast.Module]) -> None:
    own = {name: defined(tree) for name, tree in modules.items()}
    everyones = set().union(*own.values())
    wrong = []
    for name, tree in modules.items():
        for node in ast.walk(tree):
            read = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ept_fast"):
                read = [alias.name for alias in node.names]
            elif isinstance(node, ast.Attribute):
                read = [node.attr] if node.attr in everyones - own[name] else []
            wrong += [f"{name}: {each}" for each in read if private(each)]
    assert not wrong


def test_the_map_names_files_that_exist(root: Path) -> None:
    text = (root / "docs" / "architecture.md").read_text(encoding="utf-8")
    paths = re.findall(r"`([\w/]+/[\w/]*(?:\.\w+)?)`", text)
    assert len(paths) > 30
    assert [path for path in paths if not (root / path).exists()] == []
