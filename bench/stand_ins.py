"""Stand-ins for NVIDIA's libraries: ``python -m bench.stand_ins``.

PyTorch's CUDA build does not start without libraries of 1.9 GB to load and 2.8 GB on disk, none of
which does anything on a machine without a GPU. Here each of them is made as a small library of that
name in torch's own folder. All its functions return ``cudaErrorNoDevice``, so torch starts and
finds no GPU; those that name an error return a text, which torch then raises. A C compiler and
binutils are needed. torch is not imported, since it would not start.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

_NO_DEVICE = 100
# These return a text; the driver's own, cuGetErrorString, has it as an argument.
_TEXTS = re.compile(r"(?!cu[A-Z])\w+Error(String|Name)")
_NVIDIA = re.compile(r"lib(cu|nv|nccl)\w*\.so\.")


def _run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def functions(libraries: Iterable[Path]) -> dict[str, dict[str, list[str]]]:
    """The functions that these want from each of NVIDIA's libraries, by the symbols' version.

    A symbol without a version may come from any of them: those are listed under the first.
    """
    wanted: dict[str, dict[str, list[str]]] = {}
    undefined: set[str] = set()
    defined: set[str] = set()
    for path in libraries:
        for name in re.findall(r"\(NEEDED\).*\[(.*)\]", _run("readelf", "-d", path)):
            if _NVIDIA.match(name):
                wanted.setdefault(name, {})
        name = ""
        for file, version in re.findall(r"File: (\S+)|Name: (\S+)", _run("readelf", "-VW", path)):
            name = file or name
            if version and name in wanted:
                wanted[name].setdefault(version, [])
        for line in _run("nm", "-D", path).splitlines():
            *_, kind, symbol = line.split()
            (undefined if kind == "U" else defined).add(symbol)
    owner = {version: name for name in wanted for version in wanted[name]}
    for symbol in sorted(undefined - defined):
        name, _, version = symbol.partition("@")
        if version in owner:
            wanted[owner[version]][version].append(name)
        elif not version and re.match(r"cu|nv|nccl", name):
            next(iter(wanted.values())).setdefault("", []).append(name)
    return wanted


def _function(symbol: str) -> str:
    if _TEXTS.fullmatch(symbol):
        return f'const char *{symbol}(void) {{ return "no CUDA device: a stand-in"; }}'
    return f"int {symbol}(void) {{ return {_NO_DEVICE}; }}"


def build(library: Path, versions: dict[str, list[str]]) -> None:
    """Compile one stand-in."""
    symbols = [symbol for names in versions.values() for symbol in names]
    script = "".join(
        f"{version} {{ {' '.join(f'{name};' for name in names)} }};\n"
        for version, names in versions.items()
        if version
    )
    with tempfile.TemporaryDirectory() as folder:
        source, versioned = Path(folder, "source.c"), Path(folder, "versions")
        source.write_text("".join(f"{_function(symbol)}\n" for symbol in symbols))
        versioned.write_text(script)
        options = ["-shared", "-fPIC", "-w", f"-Wl,-soname,{library.name}"]
        if script:
            options.append(f"-Wl,--version-script,{versioned}")
        _run("cc", *options, "-o", library, source)


def _folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("torch is not installed")
    return Path(spec.origin).parent / "lib"


def present() -> list[str]:
    """The stand-ins that torch here has; NVIDIA's own libraries lie in other folders."""
    return sorted(path.name for path in _folder().glob("lib*") if _NVIDIA.match(path.name))


def main() -> None:
    folder = _folder()
    wanted = functions(sorted(folder.glob("*.so")))
    for name, versions in wanted.items():
        build(folder / name, versions)
    print(f"{len(wanted)} stand-ins for NVIDIA's libraries in {folder}")


if __name__ == "__main__":
    main()
