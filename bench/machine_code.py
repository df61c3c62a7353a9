"""What stands in compiled code: NVIDIA's machine code, AMD's assembly, Triton's intermediate code.

No GPU is needed, but NVIDIA's tools, which Triton brings along.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


# Targets


@dataclass(frozen=True)
class Target:
    """An architecture.

    Attributes:
        shared_limit: the shared memory that a block can have, in bytes.
        sm_shared: NVIDIA: that of a multiprocessor.
        disassembler: what NVIDIA's disassembler calls it.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int
    sm_shared: int = 0
    disassembler: str = ""

    @property
    def gpu(self) -> GPUTarget:
        return GPUTarget(self.backend, self.arch, self.warp_size)


TARGETS = {
    t.name: t
    for t in (
        Target("sm_80", "cuda", 80, 32, 163 * 1024, 164 * 1024, "SM80"),
        Target("sm_90", "cuda", 90, 32, 227 * 1024, 228 * 1024, "SM90a"),
        Target("sm_100", "cuda", 100, 32, 227 * 1024, 228 * 1024, "SM100a"),
        Target("gfx942", "hip", "gfx942", 64, 64 * 1024),
    )
}


# Figures


@dataclass(frozen=True)
class Code:
    """What one compilation came to; ``registers`` are those of a thread.

    Attributes:
        accumulators: AMD's second file of registers, not counted in ``registers``.
        scratch: bytes of a thread in memory that is not the registers'.
        spills: NVIDIA: loads and stores of it; AMD: vector registers kept there.
        scalar_spills: AMD: scalar registers kept in vector ones, which is not memory.
        matrix: the matrix instructions and how many of each.
        loads, stores: those of global memory by their bits for a thread, and how many of each. A
            copy from there into shared memory is a load.
        double, atomics, narrow: instructions that no kernel may have.
        error: why there is no code.
    """

    num_warps: int = 0
    registers: int = 0
    accumulators: int = 0
    shared: int = 0
    scratch: int = 0
    spills: int = 0
    scalar_spills: int = 0
    instructions: int = 0
    matrix: dict[str, int] = field(default_factory=dict)
    loads: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)
    double: list[str] = field(default_factory=list)
    atomics: list[str] = field(default_factory=list)
    narrow: list[str] = field(default_factory=list)
    error: str = ""


_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_SASS_BYTES = 16  # of an instruction
_SASS_DOUBLE = re.compile(r"D(ADD|MUL|FMA|SETP|SET|MNMX|MMA)\b|.*\.F64|.*64H")
# REDUX and its kin reduce over a warp's registers.
_SASS_ATOMIC = re.compile(r"(U?ATOM[A-Z]*|REDG?|REDS|REDAS|UTMARED[A-Z]*|UBLKRED[A-Z]*)\b")
_SASS_MATRIX = re.compile(r"(UTC[A-Z]*MMA|[HIBQOF]G?MMA)\b")
_SASS_ACCESS = re.compile(r"(LDG|LDGSTS|STG)\b(?:.*\.[US]?(\d+)(?=\.|$))?")
_GCN = re.compile(r"^\t([a-z][a-z0-9_]*)", re.MULTILINE)
_GCN_DOUBLE = re.compile(r"v_.*_f64")
_GCN_ATOMIC = re.compile(
    r"(global|flat|buffer)_atomic|ds_(add|sub|rsub|inc|dec|min|max|and|or|xor|mskor|cmpst|cmpswap"
    r"|wrxchg|condxchg|pk_add)_"
)
_GCN_MATRIX = re.compile(r"v_(mfma|smfmac)_")
_GCN_ACCESS = re.compile(r"(?:global|flat|buffer)_(load|store)_\w*?(byte|short|dword)(?:x(\d))?")
_GCN_BITS = {"byte": 8, "short": 16, "dword": 32}


def _matching(pattern: re.Pattern[str], opcodes: list[str]) -> list[str]:
    return sorted({opcode for opcode in opcodes if pattern.match(opcode)})


def sass_opcodes(text: str) -> list[str]:
    """NVIDIA's instructions with their modifiers, in order."""
    return _SASS.findall(text)


def sass_accesses(opcodes: Iterable[str]) -> dict[str, Counter[int]]:
    """``loads`` and ``stores`` of `Code`, of NVIDIA's instructions."""
    found: dict[str, Counter[int]] = {"loads": Counter(), "stores": Counter()}
    for match in filter(None, map(_SASS_ACCESS.match, opcodes)):
        kind = "stores" if match[1] == "STG" else "loads"
        found[kind][int(match[2] or 32)] += 1
    return found


def gcn_accesses(opcodes: Iterable[str]) -> dict[str, Counter[int]]:
    """``loads`` and ``stores`` of `Code`, of AMD's instructions."""
    found: dict[str, Counter[int]] = {"loads": Counter(), "stores": Counter()}
    for match in filter(None, map(_GCN_ACCESS.match, opcodes)):
        found[f"{match[1]}s"][_GCN_BITS[match[2]] * int(match[3] or 1)] += 1
    return found


def cuda_tools() -> str | None:
    """Why NVIDIA's code cannot be made and read here; None if it can."""
    missing = [n for n in ("ptxas", "cuobjdump", "nvdisasm") if not (_BINARIES / n).is_file()]
    return f"{', '.join(missing)} not in this build of Triton" if missing else None


def _run(tool: str, *arguments: str | Path) -> str:
    command = [_BINARIES / tool, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _machine_code(cubin: bytes) -> bytes:
    """The instructions in an ELF file: its sections named ``.text.``."""
    (start,) = struct.unpack_from("<Q", cubin, 0x28)
    size, number, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, start + i * size) for i in range(number)]
    code = b""
    for name, _, _, _, offset, length in headers:
        if cubin.startswith(b".text.", headers[names][4] + name):
            code += cubin[offset : offset + length]
    return code


def read_cubins(cubins: list[bytes], target: Target) -> list[dict[str, Any]]:
    """The fields of `Code` that stand in NVIDIA's machine code.

    The disassembler takes longer to start than to read a kernel, so all are read as one.
    """
    codes = [_machine_code(cubin) for cubin in cubins]
    usages = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "code"
        for cubin in cubins:
            file.write_bytes(cubin)
            shown = _run("cuobjdump", "--dump-resource-usage", file)
            usages.append({k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", shown)})
        file.write_bytes(b"".join(codes))
        lines = sass_opcodes(_run("nvdisasm", "--binary", target.disassembler, "-ndf", file))
    if len(lines) != sum(len(code) for code in codes) // _SASS_BYTES:
        raise RuntimeError(f"{target.name}: nvdisasm did not show every instruction")
    out = []
    for code, usage in zip(codes, usages, strict=True):
        number = len(code) // _SASS_BYTES
        opcodes, lines = lines[:number], lines[number:]
        # The allocator of tensor memory keeps its state in shared memory.
        own = ("ATOMS.AND", "ATOMS.OR") if any("UTCATOMSWS" in o for o in opcodes) else ()
        out.append(
            {
                "registers": usage["REG"],
                "scratch": usage["STACK"] + usage["LOCAL"],
                "spills": sum(opcode.split(".")[0] in ("LDL", "STL") for opcode in opcodes),
                "instructions": sum(opcode != "NOP" for opcode in opcodes),
                "matrix": Counter(o for o in opcodes if _SASS_MATRIX.match(o)),
                **sass_accesses(opcodes),
                "double": _matching(_SASS_DOUBLE, opcodes),
                "atomics": _matching(_SASS_ATOMIC, [o for o in opcodes if o not in own]),
            }
        )
    return out


def read_amdgcn(text: str) -> dict[str, Any]:
    """The fields of `Code` that stand in AMD's assembly."""
    code, _, metadata = text.partition(".amdgpu_metadata")
    opcodes = [o for o in _GCN.findall(code) if not o.startswith("s_nop")]
    number = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\b", metadata)}
    return {
        # One file holds both kinds; .vgpr_count is their sum.
        "registers": number["vgpr_count"],
        "accumulators": number["agpr_count"],
        "scratch": number["private_segment_fixed_size"],
        "spills": number["vgpr_spill_count"],
        "scalar_spills": number["sgpr_spill_count"],
        "instructions": len(opcodes),
        "matrix": Counter(o for o in opcodes if _GCN_MATRIX.match(o)),
        **gcn_accesses(opcodes),
        "double": _matching(_GCN_DOUBLE, opcodes),
        "atomics": _matching(_GCN_ATOMIC, opcodes),
    }


def versions() -> dict[str, str]:
    """The compilers that the figures depend on."""
    out = {"triton": triton.__version__}
    for name, tool in (("ptxas", "ptxas"), ("ptxas_sm_100", "ptxas-blackwell")):
        there = tool if (_BINARIES / tool).is_file() else "ptxas"
        (out[name],) = re.findall(r"V(\d[\d.]*)", _run(there, "--version"))
    return out


# Triton's intermediate code

# The type of a scalar, or of a tensor's elements.
_WIDE = re.compile(r"(?:^|x)i64>?$")
_NARROW = re.compile(r"(?:^|x| )i32>?$")
_OPERATION = re.compile(r"(?:%(\w+)(?::\d+)? = )?\"?([\w.]+)\"?\(? ?(.*)")
# A value's number of bits goes on through these, and whether it is a constant or holds a stride.
_SHAPES = {"tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans"}
_WIDENS = {"arith.extsi", "arith.extui"}
_ARITHMETIC = {"arith.addi", "arith.subi", "arith.muli", "arith.shli"}


def _narrow_addresses(ttir: str) -> list[str]:
    """Pointer offsets that are not 64 bits wide, and products that go into one but are not.

    Of those in 32 bits, every sum and product with an argument that is named a stride counts, and
    every product of two values that the compiler does not know, if it is an offset and not the
    number of something that a size is yet to multiply.
    """
    found: list[str] = []
    operands: dict[str, tuple[str, list[str], str]] = {}
    roots: list[str] = []
    constants: set[str] = set()
    strides: set[str] = set()
    for line in ttir.splitlines():
        text = re.sub(r" loc\((?:[^()]|\([^()]*\))*\)$", "", line.strip())
        if "tt.func" in text:
            strides |= {name for name in re.findall(r"%(\w+): i\d+", text) if "stride" in name}
            continue
        match = _OPERATION.match(text)
        if match is None:
            continue
        name, operation, rest = match.groups()
        used = re.findall(r"%([\w]+)", rest.partition(" : ")[0])
        kind = rest.rpartition(" : ")[2]
        if operation == "tt.addptr":
            offset = kind.rpartition(", ")[2]
            if not _WIDE.search(offset):
                found.append(f"offset {used[1]}: {offset}")
            roots.append(used[1])
        if name is None:
            continue
        operands[name] = (operation, used, kind)
        if operation == "arith.constant" or (
            operation in _SHAPES | _WIDENS | _ARITHMETIC and all(u in constants for u in used)
        ):
            constants.add(name)
        if operation in _SHAPES and used[0] in strides:
            strides.add(name)
    # With each value: whether it is an address's offset itself, rather than a factor of one.
    todo = [(root, True) for root in roots]
    seen: set[tuple[str, bool]] = set()
    while todo:
        name, whole = todo.pop()
        if (name, whole) in seen or name not in operands:
            continue
        seen.add((name, whole))
        operation, used, kind = operands[name]
        product = operation in ("arith.muli", "arith.shli")
        if operation in _SHAPES | _WIDENS | _ARITHMETIC | {"arith.select", "arith.index_cast"}:
            # What is taken off makes an offset no larger.
            less = used[1:] if operation == "arith.subi" else []
            todo += [(u, whole and not product and u not in less) for u in used]
        if operation in _ARITHMETIC and _NARROW.search(kind):
            held = any(u in strides for u in used)
            runtime = whole and product and not any(u in constants for u in used)
            if held or runtime:
                found.append(f"{operation} {' '.join(used)}: {kind}")
    return sorted(set(found))


def read_ttir(ttir: str) -> dict[str, list[str]]:
    """Addresses in 32 bits, and atomics, in Triton's own intermediate code."""
    atomics = sorted(set(re.findall(r"tt\.(?:atomic_\w+|descriptor_reduce)", ttir)))
    return {"narrow": _narrow_addresses(ttir), "atomics": atomics}


# Occupancy

# Of a multiprocessor, on every target here: four partitions with as many registers each, which a
# warp takes in units; what the driver keeps of each block's shared memory; its warps and blocks.
_PARTITIONS, _PARTITION_REGISTERS = 4, 16384
_REGISTER_UNIT = 256
_RESERVED_SHARED = 1024
_SM_WARPS, _SM_BLOCKS = 64, 32


def warps_per_sm(code: Code, target: Target) -> int | None:
    """Warps of the kernel that a multiprocessor holds at once, 0 if no block fits.

    None for AMD, and where there is no code.
    """
    if target.backend != "cuda" or not code.registers:
        return None
    taken = -(-code.registers * target.warp_size // _REGISTER_UNIT) * _REGISTER_UNIT
    blocks = min(
        _PARTITIONS * (_PARTITION_REGISTERS // taken) // code.num_warps,
        target.sm_shared // (code.shared + _RESERVED_SHARED),
        _SM_WARPS // code.num_warps,
        _SM_BLOCKS,
    )
    return blocks * code.num_warps
