"""What each Triton kernel compiles to, read from the machine code: ``python -m bench.compiled``.

No GPU is needed. The host functions run on tensors of a CPU whose contents are never looked at, for
one target after the other; Triton specialises every launch as it would there, and a hook takes the
specialisation in place of the launch. What is left after equal ones are put together is compiled,
and the code is read for what would make a kernel slow or wrong: spills, float64 instructions,
addresses in 32 bits, atomics, too much shared memory, too many registers. `LIMITS` asks more:
enough warps on a multiprocessor, matrix units, and of the splice wide loads and stores.

``--write`` records two tables under ``bench/results/compiled``. In ``table.csv`` a row is a kernel
at its types; its registers are the budget that later code is held to, so it is written only if no
rule is broken and nothing is left out by ``--kernel`` or ``--target``. In ``shapes.csv`` a row is a
kernel at a shape, of the splice with a mask. Rows of other versions of Triton stay. Compiled code
is kept where Triton keeps it (``TRITON_CACHE_DIR``): its key covers the sources, the arguments, the
options and the compiler, so nothing stale is found there.
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import click
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench.environment import commit
from bench.machine_code import (
    TARGETS,
    Code,
    Target,
    cuda_tools,
    read_amdgcn,
    read_cubins,
    read_ttir,
    versions,
    warps_per_sm,
)
from bench.rows import aligned, read_csv, write_csv
from bench.shapes import PREDICTED, Shape
from ept_fast.backends import fused
from ept_fast.ops.activations import ACTIVATIONS
from ept_fast.ops.types import Flags, Needs, Parameters, SpliceInputs, Text

RESULTS = Path(__file__).parent / "results" / "compiled"
# Registers a kernel may gain over its record: ptxas moves by a few on unrelated changes.
MARGIN = 8


class Limits(NamedTuple):
    """What a kernel has to be at every named shape, the splice with a mask, on `LIMITED`.

    Attributes:
        registers: of a thread, at most.
        warps_per_sm: resident warps of a multiprocessor, at least.
        matrix: whether it has to use the matrix units.
        wide_loads, wide_stores: the least share, by bytes, of accesses that are 16 bytes wide; not
            asked if the rows of d do not begin at multiples of them.
        types: the columns ``types`` that it holds for.
    """

    registers: int = 128
    warps_per_sm: int = 16
    matrix: bool = True
    wide_loads: float = 0.5
    wide_stores: float = 0.5
    types: tuple[str, ...] = ("bf16/fp32",)


# By kernel.
LIMITS: dict[str, Limits] = {
    "splice_plan_kernel": Limits(matrix=False, wide_loads=0.0, wide_stores=0.0),
    "splice_forward_kernel": Limits(),
    "splice_backward_kernel": Limits(),
    "splice_finish_kernel": Limits(matrix=False, wide_loads=0.0, wide_stores=0.0),
    **{
        f"reconstruct_{name}_kernel": Limits(168, warps, True, 0.0, 0.0, ("fp32",))
        for name, warps in (("reduce", 12), ("attend", 12), ("forward", 12), ("backward", 8))
    },
}
LIMITED = ("sm_80", "sm_90")

# Kernels compiled in a row and then disassembled together.
_CHUNK = 8


# A GPU that is not there

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
        with mock.patch.object(fused, "_forced_target", target.name):
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


# Compiling


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


RULES = [
    "compiles",
    "spills",
    "float64",
    "addresses",
    "atomics",
    "shared",
    "launch",
    "registers",
    "occupancy",
    "matrix",
    "width",
]
_WIDE_BITS = 128


def _registers_of_block(code: Code, target: Target) -> tuple[int, int]:
    """Registers a block takes and the most it can have, in those of one thread of a warp."""
    each = -(-code.registers // 8) * 8
    if target.backend == "cuda":
        return each * 32 * code.num_warps, 65536
    # Of four units that hold 512 each, every one takes a fourth of the warps.
    return each * -(-code.num_warps // 4), 512


def broken(
    code: Code, target: Target, budget: int | None = None, limits: Limits | None = None
) -> dict[str, str]:
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
    if limits is not None and code.registers:
        for rule, text in _beyond(limits, code, target).items():
            found[rule] = "; ".join(filter(None, (found.get(rule), text)))
    return {rule: text for rule, text in found.items() if text}


def _beyond(limits: Limits, code: Code, target: Target) -> dict[str, str]:
    """The limits that the code breaks."""
    warps = warps_per_sm(code, target)
    narrow = [
        f"{share:.0%} of the bytes of {name} are 16 bytes wide, at least {least:.0%} should be"
        for name, accesses, least in (
            ("loads", code.loads, limits.wide_loads),
            ("stores", code.stores, limits.wide_stores),
        )
        if (share := _wide_share(accesses)) < least
    ]
    return {
        "registers": f"{code.registers}, at most {limits.registers}"
        if code.registers > limits.registers
        else "",
        "occupancy": f"{warps} warps on a multiprocessor, at least {limits.warps_per_sm}"
        if warps is not None and warps < limits.warps_per_sm
        else "",
        "matrix": "no matrix instruction" if limits.matrix and not code.matrix else "",
        "width": "; ".join(narrow),
    }


def _wide_share(accesses: dict[int, int]) -> float:
    """The part of the bytes that goes in accesses of 16 bytes or more; 0 if there are none."""
    moved = {bits: bits * number for bits, number in accesses.items()}
    wide = sum(number for bits, number in moved.items() if bits >= _WIDE_BITS)
    return wide / (sum(moved.values()) or 1)


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
# At which the splice is compiled; operation 1 does not depend on the rows.
SHAPES = (BASE, LARGE, BANK, FEW_ROWS, ODD, WIDEST, LONGEST, *PREDICTED)

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIXED = ("fp32", "bf16", "fp16")  # the prompt, the offset, spaces and gate


@dataclass(frozen=True)
class Reconstruct:
    """One call of operation 1 and its backward; types of the prompt, the offset, the subspaces.

    ``halves``: as both operations in one call it, which adds to the gradients of A and B.
    """

    shape: Shape
    types: tuple[str, str, str]
    activation: str = "gelu"
    gate: str = "token"
    offset: bool = True
    spaces: bool = True
    halves: bool = False

    @property
    def label(self) -> str:
        return self.types[0] if len(set(self.types)) == 1 else "mixed"

    def run(self) -> None:
        from ept_fast.backends.triton.calls import (
            path_backward,
            path_forward,
            reconstruct_backward,
            reconstruct_forward,
        )

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
        if self.halves:
            text = Text(inputs_embeds=torch.empty(1, 1, d))
            task_ids = torch.zeros(1, dtype=torch.int64)
            text = text._replace(task_ids=task_ids)
            out, *kept = path_forward(parameters, text, flags, True, None)
            path_backward(out, parameters, text, kept, flags, True, Needs(True, True))
        else:
            out, saved = reconstruct_forward(parameters, flags)
            reconstruct_backward(torch.empty_like(out), parameters, saved, flags)


@dataclass(frozen=True)
class Splice:
    """One call of operation 2 and its backward.

    ``types``: of the embeddings and the parameters; ``places``: with the mask and the positions
    that a module's call has; ``gathered``: each row's prompt from rows that it names.
    """

    shape: Shape
    types: tuple[str, str]
    ids: torch.dtype | None = torch.int64
    mask: torch.dtype | None = torch.int64
    offset: bool = True
    need_prompt: bool = True
    places: bool = False
    gathered: bool = False

    @property
    def label(self) -> str:
        return "/".join(self.types)

    def run(self) -> None:
        from ept_fast.backends.triton.calls import path_forward, splice_backward, splice_forward

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
        if self.gathered:
            rows = torch.zeros(s.batch, s.num_virtual_tokens, dtype=torch.int64)
            inputs = inputs._replace(prompt_rows=rows)
            out, kept = splice_forward(inputs, 0.5)
        else:
            given = (*inputs.parts(), fused.splice_flags(0.5), False)
            out, *kept = path_forward(*given, places=[] if self.places else None)
        splice_backward(torch.empty_like(out), inputs, kept, 0.5, self.need_prompt, self.offset)


Case = Reconstruct | Splice


def cases() -> list[Case]:
    """The calls whose kernels are compiled.

    Every type at the base shape and, of operation 1, at the longest; then each other shape and each
    flag at the types that use it.
    """
    reconstruct = Reconstruct(BASE, ("fp32",) * 3)
    splice = Splice(BASE, ("bf16", "fp32"))
    types: list[Any] = [*((name,) * 3 for name in FLOATS), MIXED]
    return [
        *(replace(reconstruct, types=names) for names in types),
        *(replace(reconstruct, types=names, shape=LONGEST) for names in types),
        *(replace(reconstruct, shape=shape) for shape in (ODD, WIDEST, *PREDICTED)),
        *(replace(reconstruct, activation=name) for name in tuple(ACTIVATIONS)[1:]),
        replace(reconstruct, gate="prompt"),
        replace(reconstruct, halves=True),
        replace(reconstruct, offset=False),
        replace(reconstruct, spaces=False),
        *(replace(splice, types=pair) for pair in itertools.product(FLOATS, FLOATS)),
        *(replace(splice, shape=shape) for shape in SHAPES[1:]),
        replace(splice, mask=None),
        replace(splice, places=True),
        replace(splice, mask=None, places=True),
        replace(splice, ids=None, mask=torch.bool),
        replace(splice, offset=False),
        replace(splice, need_prompt=False),
        replace(splice, gathered=True),
    ]


def targets_of(case: Case) -> tuple[str, ...]:
    """Where a case is compiled.

    Operation 1 is one program each way at the base shape, and three at the longest: these two on
    every target. Other shapes are for the limits, and a flag changes a few operations: one target
    of either maker for these, one for an activation and for the other types of the longest.
    """
    if isinstance(case, Splice):
        return tuple(TARGETS)
    if case.activation != "gelu" or (case.shape == LONGEST and set(case.types) != {"fp32"}):
        return ("sm_90",)
    if case != Reconstruct(case.shape, case.types):
        return ("sm_90", "gfx942")
    return tuple(TARGETS) if case.shape in (BASE, LONGEST) else LIMITED


# The tables

# A row: a kernel at one type and target, the most of each figure over its variants and the fewest
# warps; `largest` is the shape whose variant has the most registers.
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
_READ = ("warps_per_sm", "matrix", "loads", "stores")
COLUMNS = (*_KEY, "variants", *_MOST, *_READ, "largest")
# A row: a kernel at one shape, of the splice with a mask.
_SHAPE_KEY = ("kernel", "types", "shape", "target")
SHAPE_COLUMNS = (*_SHAPE_KEY, "num_warps", "registers", "shared", "scratch", "spills", *_READ)
Row = dict[str, Any]


@dataclass(frozen=True)
class Use:
    """One launch of a case."""

    case: Case
    launch: Launch

    @property
    def types(self) -> str:
        return self.case.label

    @property
    def shape(self) -> str:
        return self.case.shape.name

    @property
    def key(self) -> tuple[str, str, str]:
        """Of the row of ``table.csv`` that the launch belongs to."""
        return self.launch.kernel, self.types, self.launch.target

    @property
    def of_a_shape(self) -> bool:
        """Whether it belongs to ``shapes.csv``: all by default, which is with a mask."""
        if isinstance(self.case, Splice):
            return self.case == Splice(self.case.shape, self.case.types)
        return self.case == Reconstruct(self.case.shape, self.case.types)

    @property
    def constants(self) -> dict[str, Any]:
        """What the kernel is compiled for, by the names of its arguments."""
        data = json.loads(self.launch.data)
        names = list(data.get("signature", ()))
        found = zip(data.get("constant_keys", ()), data.get("constant_vals", ()), strict=True)
        return {names[key[0]]: value for key, value in found if len(key) == 1}


def launches(chosen: Iterable[Case], targets: Iterable[str]) -> list[Use]:
    """The launches of the cases on the targets."""
    importlib.import_module("ept_fast.backends.triton.calls")
    uses: list[Use] = []
    for case in chosen:
        for name in targets:
            if name not in targets_of(case):
                continue
            with recorded(TARGETS[name]) as made:
                case.run()
            if isinstance(case, Reconstruct):  # which may call both operations
                made = [one for one in made if one.kernel.startswith("reconstruct_")]
            uses += [Use(case, one) for one in dict.fromkeys(made)]
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


def _counts(most: Counter[Any], reverse: bool) -> str:
    return " ".join(f"{name}×{most[name]}" for name in sorted(most, reverse=reverse))


def _figures(codes: list[Code], target: Target) -> Row:
    """The most of each figure, and the fewest warps on a multiprocessor."""
    row: Row = {name: max(getattr(code, name) for code in codes) for name in _MOST}
    known = [w for code in codes if (w := warps_per_sm(code, target)) is not None]
    row["warps_per_sm"] = min(known, default="")
    most: dict[str, Counter[Any]] = {"matrix": Counter(), "loads": Counter(), "stores": Counter()}
    for name, counter in most.items():
        for code in codes:
            counter |= Counter(getattr(code, name))
        row[name] = _counts(counter, reverse=name != "matrix")
    return row


def _grouped(
    uses: Iterable[Use], columns: tuple[str, ...], codes: dict[Launch, Code]
) -> Iterator[tuple[Row, dict[Launch, str]]]:
    """For each kernel and what else the columns name: its row, and the launches with a shape."""
    order = list(TARGETS).index
    groups: dict[tuple[str, ...], dict[Launch, str]] = {}
    for use in uses:
        known = {
            "kernel": use.launch.kernel,
            "types": use.types,
            "shape": use.shape,
            "target": use.launch.target,
        }
        groups.setdefault(tuple(known[c] for c in columns), {}).setdefault(use.launch, use.shape)
    for key in sorted(groups, key=lambda k: (k[0], order(k[-1]), *k[1:-1])):
        group = groups[key]
        figures = _figures([codes[launch] for launch in group], TARGETS[key[-1]])
        yield dict(zip(columns, key, strict=True)) | figures, group


def tabulate(uses: list[Use], codes: dict[Launch, Code]) -> list[Row]:
    """One row for each kernel, type and target."""
    return [
        row
        | {
            "variants": len(group),
            "largest": group[max(group, key=lambda launch: codes[launch].registers)],
        }
        for row, group in _grouped(uses, _KEY, codes)
    ]


def tabulate_shapes(uses: list[Use], codes: dict[Launch, Code]) -> list[Row]:
    """One row for each kernel, type, shape and target; of the splice with a mask."""
    shown = [use for use in uses if use.of_a_shape]
    return [
        {name: row[name] for name in SHAPE_COLUMNS} for row, _ in _grouped(shown, _SHAPE_KEY, codes)
    ]


def limits_of(use: Use) -> Limits | None:
    """The limits that hold for a launch."""
    limits = LIMITS.get(use.launch.kernel)
    if limits is None or not use.of_a_shape:
        return None
    if use.launch.target not in LIMITED or use.types not in limits.types:
        return None
    if isinstance(use.case, Reconstruct):
        # All of the backward in one program, and accesses that are not aligned.
        constants = use.constants
        whole = constants.get("CORE", False) and constants.get("EXPAND", False)
        if whole or use.case.shape.hidden_size % 16:
            return limits._replace(registers=255, warps_per_sm=8)
        return limits
    if use.case.shape.rank > 32:  # whose products need more registers
        return None
    if (use.shape, use.launch.kernel) == ("long", "splice_backward_kernel"):
        # It is bound by products, and loads 8 bytes at a time.
        return limits._replace(wide_loads=0.0)
    # Triton takes a size for a multiple of 16 or for any number.
    if use.case.shape.hidden_size % 16:
        return limits._replace(wide_loads=0.0, wide_stores=0.0)
    return limits


def check(
    uses: list[Use], codes: dict[Launch, Code], record: dict[tuple[str, str, str], int]
) -> list[dict[str, str]]:
    """The rules that are broken, each once for a kernel, type, target and shape."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for use in uses:
        code, target = codes[use.launch], TARGETS[use.launch.target]
        for rule, text in broken(code, target, record.get(use.key), limits_of(use)).items():
            one = dict(zip(_KEY, use.key, strict=True))
            one |= {"rule": rule, "shape": use.shape, "text": text}
            found.setdefault((*use.key, rule, use.shape), one)
    return list(found.values())


def _rows_of(path: Path) -> list[Row]:
    return read_csv(path) if path.is_file() else []


Budget = dict[tuple[str, str, str], int]


def read_record(path: Path = RESULTS / "table.csv") -> dict[str, Budget]:
    """The registers of the committed table, by version of Triton."""
    budgets: dict[str, Budget] = {}
    for r in _rows_of(path):
        key = r["kernel"], r["types"], r["target"]
        budgets.setdefault(r["triton"], {})[key] = int(r["registers"])
    return budgets


def record_rows(path: Path, columns: tuple[str, ...], rows: list[Row], whole: bool) -> None:
    """Write rows of this version of Triton.

    ``whole``: they are all there are; else those of other kernels and targets stay. Rows of other
    versions stay in any case.
    """
    stamp = {**versions(), "date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": commit()}
    made = {(row["kernel"], row["target"]) for row in rows}

    def stays(row: Row) -> bool:
        if row["triton"] != stamp["triton"]:
            return True
        return not whole and (row["kernel"], row["target"]) not in made

    every = [*filter(stays, _rows_of(path)), *(row | stamp for row in rows)]
    write_csv(path, (*columns, *stamp), sorted(every, key=lambda row: row["triton"]))


@click.command()
@click.option("--target", "targets", multiple=True, type=click.Choice(list(TARGETS)))
@click.option(
    "--kernel", "wanted", default="", help="Only kernels whose module or name contains this."
)
@click.option("--jobs", default=2, show_default=True, help="Compilations at a time.")
@click.option("--json", "target_json", type=click.Path(path_type=Path), help="Write all here.")
@click.option("--write", "record", is_flag=True, help="Record the tables.")
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
    uses = launches(cases(), targets or TARGETS)
    uses = [use for use in uses if wanted in f"{use.launch.module}.{use.launch.kernel}"]
    todo = list(dict.fromkeys(use.launch for use in uses))

    codes = compile_all(todo, jobs)
    rows = tabulate(uses, codes)
    shapes = tabulate_shapes(uses, codes)
    budget = {} if record else read_record().get(triton.__version__, {})
    findings = check(uses, codes, budget)
    if target_json is not None:
        content = {
            "compilations": len(todo),
            "triton": triton.__version__,
            "rows": rows,
            "shapes": shapes,
            "findings": findings,
        }
        target_json.write_text(json.dumps(content, indent=1))
    for columns, table in ((COLUMNS, rows), (SHAPE_COLUMNS, shapes)):
        lines = aligned(columns, ([row[name] for name in columns] for row in table))
        click.echo("\n".join([*lines, ""]))
    click.echo(f"{len(todo)} compilations, Triton {triton.__version__}")
    for f in findings:
        click.echo("{kernel} {types} {target} {shape}: {rule}: {text}".format(**f))
    if record:
        whole = not (targets or wanted)
        record_rows(RESULTS / "shapes.csv", SHAPE_COLUMNS, shapes, whole)
        if whole and not findings:
            record_rows(RESULTS / "table.csv", COLUMNS, rows, whole)
    if findings:
        raise SystemExit(f"{len(findings)} findings")


if __name__ == "__main__":
    main()
