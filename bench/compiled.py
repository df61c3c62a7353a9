"""What each Triton kernel compiles to, read from the machine code: ``python -m bench.compiled``.

No GPU is needed. The host functions run on tensors of a CPU whose contents are never looked at, for
one target after the other; Triton specialises every launch as it would there, and a hook takes the
specialisation in place of the launch. What is left after equal ones are put together is compiled,
and the code is read for what would make a kernel slow or wrong: spills, float64 instructions,
addresses in 32 bits, atomics, too much shared memory, too many registers.

``--write`` records the table under ``bench/results/compiled``; its registers are the budget that
later code is held to. Compiled code is kept where Triton keeps it (``TRITON_CACHE_DIR``): its key
covers the sources, the arguments, the options and the compiler, so nothing stale is found there.
"""

from __future__ import annotations

import csv
import importlib
import itertools
import json
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench.environment import commit
from bench.rows import aligned, write_csv
from bench.shapes import Shape
from ept_fast.kernels import launch
from ept_fast.ops.activations import ACTIVATIONS
from ept_fast.ops.types import Flags, Parameters, SpliceInputs

RESULTS = Path(__file__).parent / "results" / "compiled"
# Registers a kernel may gain over its record: ptxas moves by a few on unrelated changes.
MARGIN = 8
# Kernels compiled in a row and then disassembled together.
_CHUNK = 8
_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


# Targets


@dataclass(frozen=True)
class Target:
    """An architecture; ``shared_limit`` is the shared memory a block can have, in bytes.

    ``disassembler``: what NVIDIA's disassembler calls it.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int
    disassembler: str = ""

    @property
    def gpu(self) -> GPUTarget:
        return GPUTarget(self.backend, self.arch, self.warp_size)


TARGETS = {
    t.name: t
    for t in (
        Target("sm_80", "cuda", 80, 32, 163 * 1024, "SM80"),
        Target("sm_90", "cuda", 90, 32, 227 * 1024, "SM90a"),
        Target("sm_100", "cuda", 100, 32, 227 * 1024, "SM100a"),
        Target("gfx942", "hip", "gfx942", 64, 64 * 1024),
    )
}
_devices = itertools.count()


class _Driver:
    """Stands in for the driver of a GPU that Triton has not compiled anything for."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.device = next(_devices)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target.gpu


@contextmanager
def standing_in(target: Target) -> Iterator[None]:
    """Triton takes this machine for one with the target's GPU."""
    before = driver._active
    driver.set_active(_Driver(target))
    try:
        with mock.patch.object(launch, "_forced_target", target.name):
            yield
    finally:
        driver._active = before


# Launches


@dataclass(frozen=True)
class Launch:
    """One specialisation of a kernel; ``data`` is Triton's own description of it, in JSON."""

    module: str
    kernel: str
    target: str
    data: str


@contextmanager
def recorded(target: Target) -> Iterator[list[Launch]]:
    """Launches within are not run: they are listed as Triton specialises them for the target."""
    launches: list[Launch] = []

    def hook(*, fn: Any, compile: dict[str, Any], **rest: Any) -> bool:
        kernel = fn.jit_function
        name = kernel.fn.__qualname__
        launches.append(Launch(kernel.module, name, target.name, compile["specialization_data"]))
        return True  # nothing is compiled or launched

    with standing_in(target), mock.patch.object(knobs.runtime, "jit_cache_hook", hook):
        yield launches


# Reading compiled code


@dataclass(frozen=True)
class Code:
    """What one compilation came to; ``registers`` are those of a thread.

    Attributes:
        accumulators: AMD's second file of registers, not counted in ``registers``.
        scratch: bytes of a thread in memory that is not the registers'.
        spills: NVIDIA: loads and stores of it; AMD: vector registers kept there.
        scalar_spills: AMD: scalar registers kept in vector ones, which is not memory.
        matrix: the matrix instructions and how many of each.
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
_GCN = re.compile(r"^\t([a-z][a-z0-9_]*)", re.MULTILINE)
_GCN_DOUBLE = re.compile(r"v_.*_f64")
_GCN_ATOMIC = re.compile(
    r"(global|flat|buffer)_atomic|ds_(add|sub|rsub|inc|dec|min|max|and|or|xor|mskor|cmpst|cmpswap"
    r"|wrxchg|condxchg|pk_add)_"
)
_GCN_MATRIX = re.compile(r"v_(mfma|smfmac)_")


def _matching(pattern: re.Pattern[str], opcodes: list[str]) -> list[str]:
    return sorted({opcode for opcode in opcodes if pattern.match(opcode)})


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
        lines = _SASS.findall(_run("nvdisasm", "--binary", target.disassembler, "-ndf", file))
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
        "double": _matching(_GCN_DOUBLE, opcodes),
        "atomics": _matching(_GCN_ATOMIC, opcodes),
    }


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


def _compile(launch: Launch) -> Any:
    """The compiled kernel; the compiler's error if it fails."""
    kernel: Any = importlib.import_module(launch.module)
    for part in launch.kernel.split("."):
        kernel = getattr(kernel, part)
    try:
        with standing_in(TARGETS[launch.target]):
            return kernel.preload(launch.data)
    except Exception as error:
        return error


def problem(launch: Launch) -> str:
    """Compile into Triton's cache and read nothing: why it failed, or nothing."""
    made = _compile(launch)
    return _last_words(made) if isinstance(made, Exception) else ""


def compiled(launches: list[Launch]) -> list[Code]:
    """Compile specialisations for one target and read the code."""
    target = TARGETS[launches[0].target]
    made = [_compile(launch) for launch in launches]
    codes = [Code(error=_last_words(m) if isinstance(m, Exception) else "") for m in made]
    good = {i: m for i, m in enumerate(made) if not isinstance(m, Exception)}
    if target.backend == "hip":
        read = [read_amdgcn(m.asm["amdgcn"]) for m in good.values()]
    elif good and cuda_tools() is None:
        read = read_cubins([m.asm["cubin"] for m in good.values()], target)
    else:
        return codes
    for (i, m), binary in zip(good.items(), read, strict=True):
        own, meta = read_ttir(m.asm["ttir"]), m.metadata
        own["atomics"] += binary.pop("atomics")
        codes[i] = Code(meta.num_warps, shared=meta.shared, **own, **binary)
    return codes


def _last_words(error: Exception) -> str:
    lines = [line for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
    return " ".join([*lines[:1], *lines[1:][-2:]])


# Rules


RULES = ["compiles", "spills", "float64", "addresses", "atomics", "shared", "launch", "registers"]


def _registers_of_block(code: Code, target: Target) -> tuple[int, int]:
    """Registers a block takes and the most it can have, in those of one thread of a warp."""
    each = -(-code.registers // 8) * 8
    if target.backend == "cuda":
        return each * 32 * code.num_warps, 65536
    # Of four units that hold 512 each, every one takes a fourth of the warps.
    return each * -(-code.num_warps // 4), 512


def broken(code: Code, target: Target, budget: int | None = None) -> dict[str, str]:
    """The rules that the code breaks, and by what; ``budget``: registers on record."""
    if code.error:
        return {"compiles": code.error}
    taken, most = _registers_of_block(code, target)
    found = {
        "spills": f"{code.spills} spills, {code.scratch} bytes of scratch"
        if code.spills or code.scratch
        else "",
        "float64": ", ".join(code.double),
        "addresses": "; ".join(code.narrow),
        "atomics": ", ".join(code.atomics),
        "shared": f"{code.shared} bytes, {target.name} has {target.shared_limit}"
        if code.shared > target.shared_limit
        else "",
        "launch": f"{taken} registers in a block, {target.name} has {most}" if taken > most else "",
        "registers": f"{code.registers}, on record are {budget} (+ {MARGIN})"
        if budget is not None and code.registers > budget + MARGIN
        else "",
    }
    return {rule: text for rule, text in found.items() if text}


# Cases


def _shape(
    name: str,
    batch: int,
    length: int,
    d: int,
    m: int,
    n: int,
    r: int,
    k: int,
    h: int,
    tasks: int = 0,
) -> Shape:
    return Shape(name, batch, length, d, m, n, r, k, h, vocabulary=32128, tasks=tasks)


BASE = _shape("base", 32, 128, 768, 40, 256, 30, 4, 8)
LARGE = _shape("7B", 8, 512, 4096, 60, 512, 24, 4, 16)
BANK = replace(BASE, name="bank", batch=64, tasks=64)
FEW_ROWS = replace(BANK, name="bank-few-rows", batch=8)
ODD = _shape("odd", 3, 29, 771, 13, 37, 5, 3, 7)
WIDEST = _shape("limits-rank", 2, 64, 16384, 512, 4096, 256, 8, 64)
LONGEST = _shape("limits-length", 1, 32768, 1024, 512, 32768, 32, 4, 16)

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIXED = ("fp32", "bf16", "fp16")  # the prompt, the offset, spaces and gate


@dataclass(frozen=True)
class Reconstruct:
    """One call of operation 1 and its backward; types of the prompt, the offset, the subspaces."""

    shape: Shape
    types: tuple[str, str, str]
    activation: str = "gelu"
    gate: str = "token"
    offset: bool = True
    spaces: bool = True

    @property
    def label(self) -> str:
        return self.types[0] if len(set(self.types)) == 1 else "mixed"

    def run(self) -> None:
        from ept_fast.kernels.reconstruct import reconstruct_backward, reconstruct_forward

        s, t, d = self.shape, self.shape.tasks or 1, self.shape.hidden_size
        k, h = s.num_spaces, s.space_dim
        prompt, offset, space = (FLOATS[name] for name in self.types)
        parameters = Parameters(torch.empty(t, s.num_virtual_tokens, d, dtype=prompt))
        if self.offset:
            parameters = parameters._replace(
                offset_a=torch.empty(t, s.max_length, s.rank, dtype=offset),
                offset_b=torch.empty(t, s.rank, d, dtype=offset),
            )
        if self.spaces:
            parameters = parameters._replace(
                space_down=torch.empty(t, k, d, h, dtype=space),
                space_up=torch.empty(t, k, h, d, dtype=space),
                gate_weight=torch.empty(t, d, k, dtype=space),
                gate_bias=torch.empty(t, k, dtype=space),
            )
        flags = Flags(0.5, self.activation, self.gate, 1.5)
        out, saved = reconstruct_forward(parameters, flags)
        reconstruct_backward(torch.empty_like(out), parameters, saved, flags)


@dataclass(frozen=True)
class Splice:
    """One call of operation 2 and its backward; ``types``: of the embeddings and the parameters."""

    shape: Shape
    types: tuple[str, str]
    ids: torch.dtype | None = torch.int64
    mask: torch.dtype | None = torch.int64
    offset: bool = True
    need_prompt: bool = True

    @property
    def label(self) -> str:
        return "/".join(self.types)

    def run(self) -> None:
        from ept_fast.kernels.splice import splice_backward, splice_forward

        s, t, d = self.shape, self.shape.tasks or 1, self.shape.hidden_size
        embeddings, parameters = (FLOATS[name] for name in self.types)
        inputs = SpliceInputs(torch.empty(t, s.num_virtual_tokens, d, dtype=parameters))
        text = s.batch, s.length
        if self.ids is None:
            embeds = torch.empty(*text, d, dtype=embeddings)
            inputs = inputs._replace(inputs_embeds=embeds)
        else:
            weight = torch.empty(s.vocabulary, d, dtype=embeddings)
            ids = torch.zeros(text, dtype=self.ids)
            inputs = inputs._replace(input_ids=ids, weight=weight)
        if self.offset:
            inputs = inputs._replace(
                offset_a=torch.empty(t, s.max_length, s.rank, dtype=parameters),
                offset_b=torch.empty(t, s.rank, d, dtype=parameters),
            )
        if self.mask is not None:
            inputs = inputs._replace(attention_mask=torch.ones(text, dtype=self.mask))
        if s.tasks:
            inputs = inputs._replace(task_ids=torch.zeros(s.batch, dtype=torch.int64))
        out = splice_forward(inputs, 0.5)
        splice_backward(torch.empty_like(out), inputs, 0.5, self.need_prompt, self.offset)


Case = Reconstruct | Splice


def cases() -> list[Case]:
    """The calls whose kernels are compiled.

    Every type at the base shape, then each other shape and each flag at the types that use it.
    """
    reconstruct = Reconstruct(BASE, ("fp32",) * 3)
    splice = Splice(BASE, ("bf16", "fp32"))
    types: list[Any] = [*((name,) * 3 for name in FLOATS), MIXED]
    return [
        *(replace(reconstruct, types=names) for names in types),
        *(replace(reconstruct, shape=shape) for shape in (LARGE, BANK, ODD, WIDEST, LONGEST)),
        *(replace(reconstruct, activation=name) for name in tuple(ACTIVATIONS)[1:]),
        replace(reconstruct, gate="prompt"),
        replace(reconstruct, offset=False),
        replace(reconstruct, spaces=False),
        *(replace(splice, types=pair) for pair in itertools.product(FLOATS, FLOATS)),
        *(replace(splice, shape=s) for s in (LARGE, BANK, FEW_ROWS, ODD, WIDEST, LONGEST)),
        replace(splice, mask=None),
        replace(splice, ids=None, mask=torch.bool),
        replace(splice, offset=False),
        replace(splice, need_prompt=False),
    ]


# On one target of either maker: another activation changes a few elementwise operations.
_ACTIVATION_TARGETS = ("sm_90", "gfx942")


# The table

# A row: a kernel at one type and target, the most of each figure over its variants; `largest` is
# the shape whose variant has the most registers.
_KEY = ("kernel", "types", "target")
_MOST = (
    "num_warps",
    "registers",
    "accumulators",
    "shared",
    "scratch",
    "spills",
    "scalar_spills",
    "instructions",
)
COLUMNS = (*_KEY, "variants", *_MOST, "matrix", "largest")
Row = dict[str, Any]


@dataclass(frozen=True)
class Use:
    """One launch of a case."""

    types: str
    shape: str
    launch: Launch

    @property
    def key(self) -> tuple[str, str, str]:
        """Of the row that the launch belongs to."""
        return self.launch.kernel, self.types, self.launch.target


def launches(chosen: Iterable[Case], targets: Iterable[str]) -> list[Use]:
    """The launches of the cases on the targets."""
    importlib.import_module("ept_fast.kernels.reconstruct")
    importlib.import_module("ept_fast.kernels.splice")
    uses: list[Use] = []
    for case in chosen:
        plain = isinstance(case, Splice) or case.activation == "gelu"
        for name in targets:
            if not plain and name not in _ACTIVATION_TARGETS:
                continue
            with recorded(TARGETS[name]) as made:
                case.run()
            uses += [Use(case.label, case.shape.name, one) for one in dict.fromkeys(made)]
    return uses


def compile_all(todo: list[Launch], jobs: int, chunk: int = _CHUNK) -> dict[Launch, Code]:
    """Compile and read each launch, ``jobs`` at a time, ``chunk`` in a row by one of them.

    If NVIDIA's code cannot be read here, a code says no more than that it compiles.
    """
    codes: dict[Launch, Code] = {}
    chunks: list[list[Launch]] = []
    for target in TARGETS:
        mine = [one for one in todo if one.target == target]
        chunks += [mine[i : i + chunk] for i in range(0, len(mine), chunk)]
    # Spawned: torch's threads do not live through a fork.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for some, read in zip(chunks, pool.map(compiled, chunks), strict=True):
            codes |= zip(some, read, strict=True)
            if sys.stderr.isatty():
                print(f"\r{len(codes)} of {len(todo)}", end="", file=sys.stderr)
    return codes


def tabulate(uses: list[Use], codes: dict[Launch, Code]) -> list[Row]:
    """One row for each kernel, type and target."""
    groups: dict[tuple[str, str, str], dict[Launch, str]] = {}
    for use in uses:
        groups.setdefault(use.key, {}).setdefault(use.launch, use.shape)
    rows = []
    order = list(TARGETS).index
    for key in sorted(groups, key=lambda k: (k[0], order(k[2]), k[1])):
        found = {launch: codes[launch] for launch in groups[key]}
        matrix: Counter[str] = Counter()
        for code in found.values():
            matrix |= Counter(code.matrix)  # the most of each
        row = dict(zip(_KEY, key, strict=True)) | {"variants": len(found)}
        row |= {name: max(getattr(code, name) for code in found.values()) for name in _MOST}
        row["matrix"] = " ".join(f"{name}×{count}" for name, count in sorted(matrix.items()))
        row["largest"] = groups[key][max(found, key=lambda launch: found[launch].registers)]
        rows.append(row)
    return rows


def check(
    uses: list[Use], codes: dict[Launch, Code], record: dict[tuple[str, str, str], int]
) -> list[dict[str, str]]:
    """The rules that are broken, each once for a kernel, type, target and shape."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for use in uses:
        target = TARGETS[use.launch.target]
        for rule, text in broken(codes[use.launch], target, record.get(use.key)).items():
            one = dict(zip(_KEY, use.key, strict=True))
            one |= {"rule": rule, "shape": use.shape, "text": text}
            found.setdefault((*use.key, rule, use.shape), one)
    return list(found.values())


def versions() -> dict[str, str]:
    """The compilers that the figures depend on."""
    out = {"triton": triton.__version__}
    for name, tool in (("ptxas", "ptxas"), ("ptxas_sm_100", "ptxas-blackwell")):
        there = tool if (_BINARIES / tool).is_file() else "ptxas"
        (out[name],) = re.findall(r"V(\d[\d.]*)", _run(there, "--version"))
    return out


def read_record(path: Path = RESULTS / "table.csv") -> tuple[str, dict[tuple[str, str, str], int]]:
    """The Triton version of the committed table and its registers."""
    if not path.is_file():
        return "", {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    budget = {(r["kernel"], r["types"], r["target"]): int(r["registers"]) for r in rows}
    return (rows[0]["triton"] if rows else ""), budget


@click.command()
@click.option("--target", "targets", multiple=True, type=click.Choice(list(TARGETS)))
@click.option("--kernel", "wanted", default="", help="Only kernels whose name contains this.")
@click.option("--jobs", default=2, show_default=True, help="Compilations at a time.")
@click.option("--json", "target_json", type=click.Path(path_type=Path), help="Write all here.")
@click.option("--write", "record", is_flag=True, help="Record the table and its budget.")
def main(
    targets: tuple[str, ...],
    wanted: str,
    jobs: int,
    target_json: Path | None,
    record: bool,
) -> None:
    """Compile the kernels for every target and check the code."""
    if knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set: kernels cannot be compiled in this process")
    if record and (targets or wanted):
        raise SystemExit("--write is of the whole table: no --target, no --kernel")
    uses = launches(cases(), targets or TARGETS)
    uses = [use for use in uses if wanted in use.launch.kernel]
    todo = list(dict.fromkeys(use.launch for use in uses))

    codes = compile_all(todo, jobs)
    rows = tabulate(uses, codes)
    version, budget = read_record()
    if version != triton.__version__ or record:
        budget = {}
    findings = check(uses, codes, budget)
    if target_json is not None:
        content = {
            "compilations": len(todo),
            "triton": triton.__version__,
            "rows": rows,
            "findings": findings,
        }
        target_json.write_text(json.dumps(content, indent=1))
    click.echo("\n".join(aligned(COLUMNS, (row.values() for row in rows))))
    click.echo(f"{len(todo)} compilations, Triton {triton.__version__}")
    for f in findings:
        click.echo("{kernel} {types} {target} {shape}: {rule}: {text}".format(**f))
    if record and not findings:
        stamp = {**versions(), "date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": commit()}
        write_csv(RESULTS / "table.csv", (*COLUMNS, *stamp), [row | stamp for row in rows])
    if findings:
        raise SystemExit(f"{len(findings)} findings")


if __name__ == "__main__":
    main()
