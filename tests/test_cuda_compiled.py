"""The CUDA kernels as machine code: what the compiler says of them, and what stands in them."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine"),
]
ARCHITECTURES = ("sm_80", "sm_90")
KERNELS = (
    "SplicePlanKernel",
    "SpliceForwardKernel",
    "SpliceBackwardKernel",
    "SpliceFinishKernel",
    "ReconstructForwardKernel",
    "BackwardCoreKernel",
    "BackwardExpandKernel",
)
# Registers of a multiprocessor over those of four blocks of 128 threads: what the kernels that move
# memory may have and still hide its latency.
MOST_REGISTERS = 128
ON_RECORD = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '\w+'\n"
    r".*Function properties for (?P=name)\n"
    r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?"
)


def _disassembler() -> str | None:
    """cuobjdump, of the CUDA toolkit or of the one that Triton carries."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        carried = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(carried) if carried.exists() else None
    return found


@dataclass(frozen=True)
class Compiled:
    """One architecture's kernels: their resources by name, and their code if it can be read."""

    resources: dict[str, dict[str, int]]
    code: dict[str, str]


def _compile(architecture: str, csrc: Path, folder: Path) -> Compiled:
    cubin = folder / f"{architecture}.cubin"
    flags = ["-std=c++20", "-O3", "--fmad=true", "-Werror", "all-warnings", "-Xptxas", "-v"]
    command = ["nvcc", *flags, f"-arch={architecture}", "-cubin", "-o", str(cubin)]
    done = subprocess.run([*command, str(csrc / "launch.cu")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    resources = {
        match["name"]: {
            key: int(match[key] or 0) for key in ("stack", "stores", "loads", "registers", "shared")
        }
        for match in ON_RECORD.finditer(done.stderr)
    }
    code: dict[str, str] = {}
    disassembler = _disassembler()
    if disassembler is not None:
        dumped = subprocess.run(
            [disassembler, "-sass", str(cubin)], capture_output=True, text=True, check=True
        )
        for part in dumped.stdout.split("Function : ")[1:]:
            name, _, text = part.partition("\n")
            code[name.strip()] = text
    return Compiled(resources, code)


@pytest.fixture(scope="session")
def compiled(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compiled]:
    folder = tmp_path_factory.mktemp("cubins")
    return {name: _compile(name, root / "csrc", folder) for name in ARCHITECTURES}


def _instructions(text: str) -> set[str]:
    """Names of the instructions, modifiers and all."""
    return set(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", text, re.M))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_is_there(architecture: str, compiled: dict[str, Compiled]) -> None:
    names = compiled[architecture].resources
    for kernel in KERNELS:
        assert any(kernel in name for name in names), kernel
    # Three types, each moved in vectors and element by element.
    for kernel in ("SpliceForwardKernel", "SpliceBackwardKernel"):
        assert sum(kernel in name for name in names) == 6


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_spills_and_no_local_memory(architecture: str, compiled: dict[str, Compiled]) -> None:
    for name, used in compiled[architecture].resources.items():
        print(f"{architecture} {used['registers']:3} registers {used['shared']:5} shared {name}")
        assert used["stores"] == used["loads"] == used["stack"] == 0, name
        assert used["shared"] <= 48 * 1024, name
        assert used["registers"] <= MOST_REGISTERS, name


@pytest.mark.skipif(_disassembler() is None, reason="no cuobjdump on this machine")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_instructions(architecture: str, compiled: dict[str, Compiled]) -> None:
    """No float64, no atomics, no local memory; vectors and matrix units where they are meant."""
    found = compiled[architecture]
    assert found.code.keys() == found.resources.keys()
    for name, text in found.code.items():
        names = _instructions(text)
        assert "EXIT" in names
        bases = {each.split(".")[0] for each in names}
        unwanted = {"DADD", "DMUL", "DFMA", "ATOM", "ATOMG", "ATOMS", "RED", "REDUX", "LDL", "STL"}
        assert not bases & unwanted, name
        if "SpliceForwardKernel" in name:
            in_vectors = "Lb1E" in name
            assert ("STG.E.128" in names) == in_vectors, name
            assert any(each.startswith("LDG.E.128") for each in names) == in_vectors, name
            sixteen_bits = "HalfE" in name or "BFloat16E" in name
            assert any(each.startswith("HMMA") for each in names) == sixteen_bits, name
        elif "SpliceBackwardKernel" in name:
            in_vectors = "Lb1E" in name
            assert any(each.startswith("LDG.E.128") for each in names) == in_vectors, name
            assert any(each.startswith("HMMA") for each in names), name
        if "Splice" not in name:
            assert not any(each.startswith("HMMA") for each in names), name
