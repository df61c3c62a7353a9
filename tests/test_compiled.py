"""The machine code of every kernel, type and target, made and read on a machine without a GPU.

Code is compiled into Triton's usual cache, not one of the test's own: its key covers everything
that the code depends on, so nothing stale is found there, and a second run takes a fraction of the
first.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from bench import compiled, machine_code
from bench.compiled import RULES, Launch, Limits, Splice, Use, broken
from bench.machine_code import TARGETS, Code, cuda_tools
from tests.processes import ROOT, python

_MISSING = cuda_tools()
needs_tools = pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING))


def kernels(folder: Path) -> list[tuple[str, str]]:
    """What is launched, and the operation that its file or its folder is named for."""
    return [
        (name, file.relative_to(folder).with_suffix("").parts[0])
        for file in sorted(folder.rglob("*.py"))
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)
    ]


KERNELS = dict(kernels(ROOT / "kernels"))
GATHER = "splice_gather_backward_kernel"  # compiled at one shape and type
FLOATS = list(compiled.FLOATS)
TYPES = {
    "reconstruct": {*FLOATS, "mixed"},
    "splice": {f"{embeddings}/{parameters}" for embeddings in FLOATS for parameters in FLOATS},
}


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `python -m bench.compiled` found."""
    file = tmp_path_factory.mktemp("compiled") / "report.json"
    done = python("-m", "bench.compiled", "--json", str(file), timeout=1800, OMP_NUM_THREADS="1")
    assert file.is_file(), done.stdout[-4000:] + done.stderr[-4000:]
    result: dict[str, Any] = json.loads(file.read_text())
    return result


@pytest.fixture(scope="session")
def toys() -> dict[str, Any]:
    """The rules that the kernels of `compiled_toys` break."""
    done = python("-m", "tests.compiled_toys", timeout=1800, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


# The kernels


@needs_tools
@pytest.mark.slow
@pytest.mark.minutes
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_code_keeps_the_rule(report: dict[str, Any], kernel: str, rule: str) -> None:
    found = [f for f in report["findings"] if f["kernel"] == kernel and f["rule"] == rule]
    assert not found, "\n".join(
        f"{f['types']} {f['target']} {f['shape']}: {f['text']}" for f in found
    )


@needs_tools
@pytest.mark.slow
@pytest.mark.minutes
def test_every_kernel_type_and_target_is_compiled_and_on_record(report: dict[str, Any]) -> None:
    made = {(row["kernel"], row["types"], row["target"]) for row in report["rows"]}
    first = ("reconstruct_reduce_kernel", "reconstruct_attend_kernel")  # launches before others
    gathered = {(GATHER, "bf16/fp32", target) for target in TARGETS}
    assert (
        made
        == {
            (kernel, types, target)
            for kernel, file in KERNELS.items()
            for types in TYPES[file]
            for target in TARGETS
            if kernel != GATHER and (kernel not in first or types == "fp32" or target == "sm_90")
        }
        | gathered
    )
    record = compiled.read_record()
    assert record, "no table: run python -m bench.compiled --write"
    if report["triton"] in record:
        assert made == set(record[report["triton"]])


@needs_tools
@pytest.mark.slow
@pytest.mark.minutes
def test_every_kernel_of_the_splice_is_compiled_at_every_shape(report: dict[str, Any]) -> None:
    made = {(row["kernel"], row["shape"], row["target"]) for row in report["shapes"]}
    shapes = {shape.name for shape in compiled.SHAPES}
    mine = {kernel for kernel, operation in KERNELS.items() if operation == "splice"} - {GATHER}
    of_splice = {each for each in made if each[0] in mine}
    assert of_splice == {(k, shape, target) for k in mine for shape in shapes for target in TARGETS}
    assert {each[0] for each in made} == {*KERNELS} - {GATHER}
    with (compiled.RESULTS / "shapes.csv").open(newline="") as file:
        recorded = [row for row in csv.DictReader(file) if row["triton"] == report["triton"]]
    if recorded:
        assert made == {(row["kernel"], row["shape"], row["target"]) for row in recorded}


def test_a_kernel_is_known_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("def _first_kernel(\ndef first(\n")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "parts.py").write_text("def _second_kernel(\n")
    assert kernels(tmp_path) == [("_first_kernel", "one"), ("_second_kernel", "two")]
    names = Counter(name for name, _ in kernels(ROOT / "kernels"))
    assert {name for name, number in names.items() if number > 1} == set()
    assert set(compiled.LIMITS) <= set(names)


# The rules themselves

TOYS = {
    "clean": set(),
    "atomics": {"atomics"},
    "float64": {"float64"},
    "narrow_offset": {"addresses"},
    "narrow_product": {"addresses"},
    "spills": {"spills"},
    "shared": {"shared"},
    "no_code": {"compiles"},
    "within_limits": set(),
    "many_registers": {"registers"},
    "few_warps": {"occupancy"},
    "no_product": {"matrix"},
    "scattered_loads": {"width"},
}
LIMIT_RULES = {"registers", "occupancy", "matrix", "width"}


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", TOYS)
def test_a_kernel_that_breaks_one_rule_breaks_it_alone(
    toys: dict[str, Any], kernel: str, target: str
) -> None:
    expected = TOYS[kernel] - (set() if target in compiled.LIMITED else LIMIT_RULES)
    assert set(toys["broken"][kernel][target]) == expected, toys["broken"][kernel][target]


@needs_tools
@pytest.mark.slow
def test_what_is_checked_is_what_a_launch_compiles(toys: dict[str, Any]) -> None:
    assert toys["differing"] == []


GOOD = Code(num_warps=4, registers=128, shared=1024, instructions=100)


@pytest.mark.parametrize(
    ("code", "rule"),
    [
        (replace(GOOD, error="PTXASError"), "compiles"),
        (replace(GOOD, spills=1), "spills"),
        (replace(GOOD, scratch=8), "spills"),
        (replace(GOOD, double=["DADD"]), "float64"),
        (replace(GOOD, narrow=["offset"]), "addresses"),
        (replace(GOOD, atomics=["RED"]), "atomics"),
        (replace(GOOD, shared=228 * 1024), "shared"),
        (replace(GOOD, registers=129, num_warps=16), "launch"),
        (replace(GOOD, registers=128 + compiled.MARGIN + 1), "registers"),
    ],
)
def test_each_figure_breaks_its_rule(code: Code, rule: str) -> None:
    assert set(broken(code, TARGETS["sm_90"], budget=128)) == {rule}


def test_what_is_within_the_rules_breaks_none() -> None:
    for target in TARGETS.values():
        assert broken(GOOD, target) == {}
        assert broken(GOOD, target, budget=GOOD.registers - compiled.MARGIN) == {}
        assert broken(replace(GOOD, scalar_spills=3, matrix={"HMMA": 2}), target) == {}


def test_amd_holds_a_fourth_of_a_block_in_each_unit() -> None:
    code = replace(GOOD, registers=264, num_warps=4)
    assert broken(code, TARGETS["gfx942"]) == {}
    assert set(broken(replace(code, num_warps=8), TARGETS["gfx942"])) == {"launch"}


# Limits


@pytest.mark.parametrize(
    ("registers", "num_warps", "shared", "target", "warps"),
    [
        (128, 4, 0, "sm_90", 16),
        (128, 8, 0, "sm_80", 16),
        (255, 8, 0, "sm_90", 8),
        (255, 8, 0, "sm_100", 8),
        (129, 4, 0, "sm_90", 12),
        (97, 4, 0, "sm_90", 16),  # a warp takes 104 a thread; five of 97 would fit in a fourth
        (96, 1, 0, "sm_90", 20),  # five in each fourth, although 21 would fit in all of them
        (32, 4, 0, "sm_90", 64),
        (16, 4, 0, "sm_90", 64),  # the most there are
        (32, 1, 0, "sm_90", 32),  # 32 blocks
        (32, 4, 40 * 1024, "sm_80", 16),  # 4 blocks in 164 KiB
        (32, 4, 41 * 1024, "sm_80", 12),
        (32, 4, 40 * 1024, "sm_90", 20),  # 5 blocks in 228 KiB
        (32, 8, 227 * 1024, "sm_90", 8),
        (32, 8, 228 * 1024, "sm_90", 0),
        (129, 16, 0, "sm_90", 0),
        (128, 4, 0, "gfx942", None),
    ],
)
def test_warps_that_a_multiprocessor_holds(
    registers: int, num_warps: int, shared: int, target: str, warps: int | None
) -> None:
    code = Code(registers=registers, num_warps=num_warps, shared=shared)
    assert machine_code.warps_per_sm(code, TARGETS[target]) == warps


def test_without_code_no_warps_are_known() -> None:
    assert machine_code.warps_per_sm(Code(error="none"), TARGETS["sm_90"]) is None


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x8] ;
        /*0030*/                   LDG.E.64 R8, desc[UR4][R2.64] ;
        /*0040*/              @P1 LDG.E R8, desc[UR4][R2.64] ;
        /*0050*/                   LDG.E.U16 R8, desc[UR4][R2.64] ;
        /*0060*/                   LDG.E.S8 R8, desc[UR4][R2.64] ;
        /*0070*/                   LDG.E.LTC128B R8, desc[UR4][R2.64] ;
        /*0080*/             @!UP0 LDGSTS.E.BYPASS.LTC128B.128 [R11], desc[UR4][R2.64] ;
        /*0090*/                   LDGDEPBAR ;
        /*00a0*/                   LDS.128 R4, [R2] ;
        /*00b0*/                   STS.64 [R2], R4 ;
        /*00c0*/                   LDG.E.ENL2.256 R4, R8, desc[UR4][R2.64] ;
        /*00d0*/               @P0 STG.E.128 desc[UR4][R2.64], R4 ;
        /*00e0*/                   STG.E desc[UR4][R2.64], R4 ;
        /*00f0*/                   STG.E.U8 desc[UR4][R2.64], R4 ;
"""


def test_loads_and_stores_of_nvidia_are_told_by_their_width() -> None:
    assert machine_code.sass_accesses(machine_code.sass_opcodes(SASS)) == {
        "loads": {256: 1, 128: 3, 64: 1, 32: 2, 16: 1, 8: 1},
        "stores": {128: 1, 32: 1, 8: 1},
    }


def test_loads_and_stores_of_amd_are_told_by_their_width() -> None:
    opcodes = (
        "global_load_dwordx4 buffer_load_dwordx4 buffer_load_dwordx2 global_load_dword"
        " global_load_ushort global_load_short_d16_hi buffer_load_sbyte s_load_dwordx8"
        " ds_read_b128 scratch_load_dword global_store_dwordx3 buffer_store_byte"
    )
    assert machine_code.gcn_accesses(opcodes.split()) == {
        "loads": {128: 2, 64: 1, 32: 1, 16: 2, 8: 1},
        "stores": {96: 1, 8: 1},
    }


WITHIN = Code(
    num_warps=4, registers=128, matrix={"HMMA": 1}, loads={128: 1, 64: 2}, stores={128: 1}
)


@pytest.mark.parametrize(
    ("code", "rule"),
    [
        (replace(WITHIN, registers=129, num_warps=1), {"registers", "occupancy"}),
        (replace(WITHIN, registers=160), {"registers", "occupancy"}),
        (replace(WITHIN, shared=100 * 1024), {"occupancy"}),
        (replace(WITHIN, matrix={}), {"matrix"}),
        (replace(WITHIN, loads={128: 1, 64: 3}), {"width"}),
        (replace(WITHIN, loads={}), {"width"}),
        (replace(WITHIN, stores={16: 8}), {"width"}),
        (replace(WITHIN, loads={256: 1}), set()),
        (WITHIN, set()),
    ],
)
def test_each_figure_breaks_its_limit(code: Code, rule: set[str]) -> None:
    assert set(broken(code, TARGETS["sm_90"], limits=Limits())) == rule
    assert broken(code, TARGETS["sm_90"]) == {}


def test_what_a_kernel_need_not_do_breaks_no_limit() -> None:
    plan = Limits(matrix=False, wide_loads=0.0, wide_stores=0.0)
    code = replace(WITHIN, matrix={}, loads={64: 1}, stores={})
    assert broken(code, TARGETS["sm_90"], limits=plan) == {}


def test_code_that_cannot_be_read_breaks_no_limit() -> None:
    assert broken(Code(), TARGETS["sm_90"], limits=Limits()) == {}


def test_registers_can_be_too_many_twice() -> None:
    found = broken(replace(WITHIN, registers=160), TARGETS["sm_90"], 100, Limits(warps_per_sm=0))
    assert found == {"registers": "160, on record are 100 (+ 8); 160, at most 128"}


def use(case: compiled.Case, target: str = "sm_90", data: str = "{}") -> Use:
    return Use(case, Launch("ept_fast.kernels.some", "_forward_kernel", target, data))


SPLICE = Splice(compiled.BASE, ("bf16", "fp32"))


@pytest.mark.parametrize(
    ("one", "held"),
    [
        (use(SPLICE), True),
        (use(SPLICE, "sm_80"), True),
        (use(replace(SPLICE, shape=compiled.BANK)), True),
        (use(SPLICE, "sm_100"), False),
        (use(SPLICE, "gfx942"), False),
        (use(replace(SPLICE, mask=None)), False),
        (use(replace(SPLICE, offset=False)), False),
        (use(replace(SPLICE, types=("fp32", "fp32"))), False),
        (use(compiled.Reconstruct(compiled.BASE, ("fp32",) * 3)), False),
    ],
)
def test_limits_hold_for_the_splice_with_a_mask(
    monkeypatch: pytest.MonkeyPatch, one: Use, held: bool
) -> None:
    limits = Limits(registers=64)
    monkeypatch.setattr(compiled, "LIMITS", {"_forward_kernel": limits})
    assert compiled.limits_of(one) == (limits if held else None)
    found = compiled.check([one], {one.launch: WITHIN}, {})
    assert [f["rule"] for f in found] == (["registers"] if held else [])
    monkeypatch.setattr(compiled, "LIMITS", {"_other_kernel": limits})
    assert compiled.limits_of(one) is None


@pytest.mark.parametrize(
    ("core", "expand", "shape", "registers"),
    [
        (True, False, compiled.BASE, 64),
        (False, True, compiled.BASE, 64),
        (True, True, compiled.BASE, 255),
        (True, False, compiled.ODD, 255),
    ],
)
def test_limits_hold_for_operation_1(
    monkeypatch: pytest.MonkeyPatch,
    core: bool,
    expand: bool,
    shape: compiled.Shape,
    registers: int,
) -> None:
    """More registers if all of the backward is one program, and if d is odd."""
    signature = {"sizes": ["i32", "constexpr"], "CORE": "constexpr", "EXPAND": "constexpr"}
    constants = {"constant_keys": [[0, 1], [1], [2]], "constant_vals": [1, core, expand]}
    data = json.dumps({"signature": signature, **constants})
    monkeypatch.setattr(
        compiled, "LIMITS", {"_forward_kernel": Limits(registers=64, types=("fp32",))}
    )
    limits = compiled.limits_of(use(compiled.Reconstruct(shape, ("fp32",) * 3), data=data))
    assert limits is not None
    assert limits.registers == registers


def test_rows_that_cannot_be_read_16_bytes_at_a_time_need_not_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiled, "LIMITS", {"_forward_kernel": Limits()})
    limits = compiled.limits_of(use(replace(SPLICE, shape=compiled.ODD)))
    assert limits == Limits(wide_loads=0.0, wide_stores=0.0)


# The tables


def test_a_row_has_the_most_of_each_figure_and_the_fewest_warps() -> None:
    small, large = use(SPLICE), use(replace(SPLICE, mask=None))
    large = replace(large, launch=replace(large.launch, data="[]"))
    codes = {
        small.launch: replace(WITHIN, registers=64, shared=8),
        large.launch: replace(WITHIN, matrix={"IMMA": 2}, loads={64: 1, 8: 4}, stores={}),
    }
    (row,) = compiled.tabulate([small, large], codes)
    assert (row["variants"], row["registers"], row["shared"]) == (2, 128, 8)
    assert row["warps_per_sm"] == 16
    assert row["matrix"] == "HMMA×1 IMMA×2"
    assert (row["loads"], row["stores"]) == ("128×1 64×2 8×4", "128×1")
    (row,) = compiled.tabulate_shapes([small, large], codes)  # of the one with a mask
    assert tuple(row) == compiled.SHAPE_COLUMNS
    assert (row["shape"], row["registers"], row["warps_per_sm"]) == ("base", 64, 32)
    assert row["loads"] == "128×1 64×2"


def test_shapes_are_rows_of_their_own() -> None:
    uses = [use(replace(SPLICE, shape=s), t) for s in compiled.SHAPES for t in ("sm_90", "gfx942")]
    rows = compiled.tabulate_shapes(uses, {one.launch: WITHIN for one in uses})
    made = [(row["shape"], row["target"]) for row in rows]
    assert sorted(made) == sorted((s.name, t) for s in compiled.SHAPES for t in ("sm_90", "gfx942"))
    assert {row["warps_per_sm"] for row in rows if row["target"] == "gfx942"} == {""}


def test_rows_of_other_versions_of_triton_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, columns = tmp_path / "table.csv", ("kernel", "types", "target", "registers")

    def record(version: str, whole: bool = True, **registers: int) -> None:
        monkeypatch.setattr(compiled, "versions", lambda: {"triton": version})
        rows = [
            {"kernel": kernel, "types": "bf16", "target": "sm_90", "registers": number}
            for kernel, number in registers.items()
        ]
        compiled.record_rows(file, columns, rows, whole)

    record("3.7.1", a=1, gone=2)
    record("3.6.0", a=3)
    record("3.7.1", a=4)
    record("3.6.0", a=5)
    record("3.7.1", whole=False, b=6)
    record("3.7.1", whole=False, b=7)
    assert compiled.read_record(file) == {
        "3.6.0": {("a", "bf16", "sm_90"): 5},
        "3.7.1": {("a", "bf16", "sm_90"): 4, ("b", "bf16", "sm_90"): 7},
    }
    assert compiled.read_record(tmp_path / "none.csv") == {}


# Addresses

TTIR = """
  tt.func public @k(%x_ptr: !tt.ptr<f32> loc("x"(#loc)), %stride_x: i32 loc("s"(#loc)), %d: i32) {{
    %c8 = arith.constant 8 : i32 loc(#loc1)
    %row = tt.get_program_id x : i32 loc(#loc1)
    {} loc(#loc1)
    %p = tt.addptr %x_ptr, %offset : !tt.ptr<f32>, {} loc("p"(#loc2))
"""


@pytest.mark.parametrize(
    ("lines", "kind", "narrow"),
    [
        ("%offset = arith.extsi %row : i32 to i64", "i64", False),
        ("%offset = arith.muli %row, %c8 : i32", "i32", True),
        ("%a = arith.muli %row, %d : i32\n%offset = arith.extsi %a : i32 to i64", "i64", True),
        ("%a = arith.muli %row, %c8 : i32\n%offset = arith.extsi %a : i32 to i64", "i64", False),
        (
            "%a = arith.addi %row, %stride_x : i32\n%offset = arith.extsi %a : i32 to i64",
            "i64",
            True,
        ),
        (
            "%a = arith.extsi %row : i32 to i64\n%b = arith.extsi %stride_x : i32 to i64\n"
            "%offset = arith.muli %a, %b : i64",
            "i64",
            False,
        ),
        # the number of a part, which the size of a part is yet to multiply
        (
            "%a = arith.muli %row, %d : i32\n%b = arith.extsi %a : i32 to i64\n"
            "%e = arith.extsi %d : i32 to i64\n%offset = arith.muli %b, %e : i64",
            "i64",
            False,
        ),
    ],
)
def test_addresses_are_followed_to_what_they_are_made_of(
    lines: str, kind: str, narrow: bool
) -> None:
    assert bool(machine_code.read_ttir(TTIR.format(lines, kind))["narrow"]) == narrow
