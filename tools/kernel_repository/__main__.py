"""Write the Triton kernels as a repository of Hugging Face's ``kernels`` library.

    python -m tools.kernel_repository --out FOLDER [--repo-id OWNER/ept-prompt]

Every file of code is taken from the package: what ``entry.py`` imports, and what that does. Imports
become relative, operators are registered under a name that only this build has, and of the modules
in ``REDUCED`` only what others import is kept. ``torch-ext/`` is the source as ``kernel-builder``
reads it, ``build/`` what ``kernels`` loads (docs/kernels.md).
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PACKAGE = "ept_fast"
NAME = "ept-prompt"
MODULE = NAME.replace("-", "_")
VERSION = 0  # of the kernel's interface; 0: it may change
LICENSE = "Apache-2.0"
BACKENDS = ("cpu", "cuda")
# The module that nobody imports, and the one that has fewer backends than the package.
OWN = {PACKAGE: HERE / "entry.py", f"{PACKAGE}.ops.dispatch": HERE / "dispatch.py"}
REDUCED = (f"{PACKAGE}.config", f"{PACKAGE}.storage.untrusted")

# As kernel-builder writes it for kernels without compiled code, where it builds them itself.
OPS = '''\
import torch

_NAMESPACE = "{namespace}"

ops = getattr(torch.ops, _NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """The name of an operator in this build's namespace."""
    return f"{{_NAMESPACE}}::{{op_name}}"
'''


def file_of(module: str) -> Path | None:
    """The module's file; None for a folder without one."""
    if module in OWN:
        return OWN[module]
    path = ROOT.joinpath(*module.split("."))
    found = [p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()]
    return found[0] if found else None


def imports_of(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """The modules of the package from which names are imported, and the names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if file_of(inner) or ROOT.joinpath(*inner.split(".")).is_dir():
                    yield inner, ""
                else:
                    yield str(node.module), alias.name


def closure() -> dict[str, set[str]]:
    """Every module that is needed, and the names that are imported from it."""
    needed: dict[str, set[str]] = {PACKAGE: set()}
    sources: dict[str, str] = {}
    while changed := [m for m in needed if sources.get(m) != source_of(m, needed[m])]:
        for module in changed:
            sources[module] = source_of(module, needed[module])
            for other, name in imports_of(ast.parse(sources[module])):
                needed.setdefault(other, set()).add(name)
    return needed


def source_of(module: str, names: set[str]) -> str:
    """The module's code as it is, or, if it is one of ``REDUCED``, what these names need of it."""
    path = file_of(module)
    source = path.read_text(encoding="utf-8") if path else ""
    return reduced(source, names) if module in REDUCED else source


def reduced(source: str, names: set[str]) -> str:
    """Docstring, imports and definitions that the names need, in their order."""
    tree = ast.parse(source)
    lines = source.splitlines()
    made: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            made[node.name] = node
        elif isinstance(node, ast.Assign):
            made |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    kept: set[str] = set()
    left = sorted(names & set(made))
    read: set[str] = set()
    while left:
        name = left.pop()
        kept.add(name)
        read |= {n.id for n in ast.walk(made[name]) if isinstance(n, ast.Name)}
        left += sorted((read & set(made)) - kept - set(left))
    pieces = []
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
            used = [
                a
                for a in node.names
                if future or (a.asname or a.name.split(".")[0]) in read | names
            ]
            if used:
                node.names = used
                pieces.append(ast.unparse(node))
        elif node is tree.body[0] or any(made[name] is node for name in kept):
            decorators = getattr(node, "decorator_list", [])
            first = min([node.lineno, *(d.lineno for d in decorators)])
            gap = "\n\n" if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else ""
            pieces.append(gap + "\n".join(lines[first - 1 : node.end_lineno]))
    return "\n".join(pieces) + "\n"


def place_of(module: str) -> Path:
    """Where a module lies in the repository's package."""
    parts = module.split(".")[1:]
    path = file_of(module)
    if not parts or path is None or path.name == "__init__.py":
        return Path(*parts, "__init__.py")
    return Path(*parts).with_suffix(".py")


def rewritten(module: str, source: str) -> str:
    """With imports relative to the package, and operators under the build's own name."""
    dots = "." * len(place_of(module).parts)

    def relative(match: re.Match[str]) -> str:
        return f"{match[1]}from {dots}{(match[2] or '').removeprefix('.')} import"

    source = re.sub(rf"^(\s*)from {PACKAGE}((?:\.\w+)*) import", relative, source, flags=re.M)
    named, count = re.subn(rf'"{PACKAGE}::(\w+)"', r'add_op_namespace_prefix("\1")', source)
    if not count:
        return source
    first = re.search(r"^from \.", named, re.M)
    assert first is not None
    line = f"from {dots}_ops import add_op_namespace_prefix\n"
    return named[: first.start()] + line + named[first.start() :]


def code() -> dict[Path, str]:
    """The package's files by their places, with an ``__init__.py`` in every folder."""
    files = {
        place_of(module): rewritten(module, source_of(module, names))
        for module, names in closure().items()
    }
    for folder in {parent for path in files for parent in path.parents}:
        files.setdefault(folder / "__init__.py", "")
    return files


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def metadata(identifier: str, backend: str, files: dict[Path, str]) -> str:
    """What ``kernels`` reads of a variant, with a digest of each file."""
    digests = {
        path.as_posix(): base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for path, text in sorted(files.items())
    }
    values = {
        "id": identifier,
        "name": NAME,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    return json.dumps(values, indent=2) + "\n"


def build_toml(repo_id: str) -> str:
    """What ``kernel-builder`` builds from."""
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    return (
        "[general]\n"
        f'name = "{NAME}"\nversion = {VERSION}\nedition = 5\nlicense = "{LICENSE}"\n'
        f"backends = [{backends}]\n\n"
        f'[general.hub]\nrepo-id = "{repo_id}"\n\n'
        "[torch-noarch]\n"
    )


def write_repository(out: Path, repo_id: str) -> None:
    """Write the repository into a folder that is empty or does not exist.

    Raises:
        FileExistsError: the folder has something in it.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"out: expected an empty folder, got {out}")
    files = code()
    parts = (f"{path.as_posix()}\0{text}\0" for path, text in sorted(files.items()))
    unique = hashlib.sha256("".join(parts).encode()).hexdigest()[:12]
    for path, text in files.items():
        write(out / "torch-ext" / MODULE / path, text)
    for backend in BACKENDS:
        identifier = f"_{MODULE}_{backend}_{unique}"
        variant = {**files, Path("_ops.py"): OPS.format(namespace=identifier)}
        for path, text in variant.items():
            write(out / "build" / f"torch-{backend}" / path, text)
        described = metadata(identifier, backend, variant)
        write(out / "build" / f"torch-{backend}" / "metadata.json", described)
    card = (HERE / "CARD.md").read_text(encoding="utf-8")
    write(out / "CARD.md", card)
    for name, value in (("repo_id", repo_id), ("version", str(VERSION))):
        card = card.replace(f"{{{{{name}}}}}", value)
    write(out / "README.md", card)
    write(out / "build.toml", build_toml(repo_id))
    shutil.copyfile(HERE / "flake.nix", out / "flake.nix")
    shutil.copyfile(ROOT / "LICENSE", out / "LICENSE")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="an empty or missing folder")
    parser.add_argument("--repo-id", default=f"OWNER/{NAME}", help="where it is to be uploaded")
    args = parser.parse_args()
    write_repository(args.out, args.repo_id)
    print(args.out)


if __name__ == "__main__":
    main()
