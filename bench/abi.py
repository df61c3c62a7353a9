"""Whether a library keeps to torch's stable ABI: ``python -m bench.abi LIBRARY``.

Reads what the library needs and does not have. It may come from the C and C++ libraries and, of
torch, from the functions that its stable C headers declare at the version the package targets. What
only a torch with CUDA has must be weak, so that the library loads beside a torch for CPUs too.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["offences"]

TARGET = "0x020a000000000000"  # torch 2.10, as in ept_fast/backends/cuda/build.py
HEADERS = ("torch/csrc/stable/c/shim.h", "torch/csrc/inductor/aoti_torch/c/shim.h")
# What the C and C++ libraries offer carries their version; these few carry none and are weak.
VERSIONED = re.compile(r".+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\w.]+$")
UNVERSIONED = {
    "_ITM_deregisterTMCloneTable",
    "_ITM_registerTMCloneTable",
    "__cxa_finalize",
    "__gmon_start__",
}
LIBRARIES = re.compile(
    r"(libtorch|libtorch_cpu|libstdc\+\+|libm|libgcc_s|libc|libdl|librt|libpthread|ld-linux[\w-]*)"
    r"\.so(\.\d+)?$"
)


def offences(library: Path) -> list[str]:
    """What the library needs beyond the stable ABI, one sentence per function; empty if nothing."""
    everywhere, with_cuda = _declared(cuda=False), _declared(cuda=True)
    found = [f"it is linked with {name}" for name in _needed(library) if not LIBRARIES.match(name)]
    for name, weak in _undefined(library):
        if VERSIONED.match(name) or name in everywhere or (weak and name in UNVERSIONED):
            continue
        if name in with_cuda:
            if not weak:
                found.append(f"{name} is not weak, and a torch for CPUs has none")
        else:
            found.append(f"{name} is not of the stable ABI")
    return found


def _declared(cuda: bool) -> set[str]:
    """The functions that torch's stable C headers declare at the target's version."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("torch is not installed")
    include = Path(spec.origin).parent / "include"
    source = "".join(f"#include <{name}>\n" for name in HEADERS)
    defines = [f"-DTORCH_TARGET_VERSION={TARGET}", *(["-DUSE_CUDA"] if cuda else [])]
    compiler = _tool("g++")
    text = _output(
        compiler, "-E", "-P", "-xc++", "-std=c++20", *defines, f"-I{include}", "-", given=source
    )
    # Declarations only: `aoti_torch_get_dim(`, whatever attribute or type stands before it.
    return set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", text))


def _undefined(library: Path) -> list[tuple[str, bool]]:
    """Name, with the version of its library, and whether it is weak."""
    rows = [
        line.split() for line in _output(_tool("readelf"), "-W", "--dyn-syms", library).splitlines()
    ]
    return [(row[7], row[4] == "WEAK") for row in rows if len(row) > 7 and row[6] == "UND"]


def _needed(library: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", _output(_tool("readelf"), "-W", "-d", library))


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} was not found on the PATH")
    return found


def _output(*command: str | Path, given: str = "") -> str:
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    if done.returncode or "Error:" in done.stderr:
        raise SystemExit(f"{command[0]} failed: {done.stderr.strip()}")
    return done.stdout


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m bench.abi LIBRARY")
    found = offences(Path(sys.argv[1]))
    if found:
        raise SystemExit("\n".join(found))
    print(f"{sys.argv[1]} keeps to the stable ABI")


if __name__ == "__main__":
    main()
