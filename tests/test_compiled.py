"""The machine code of every kernel, type and target, made and read on a machine without a GPU.

Code is compiled into Triton's usual cache, not one of the test's own: its key covers everything
that the code depends on, so nothing stale is found there, and a second run takes a fraction of the
first.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from bench import compiled
from bench.compiled import RULES, TARGETS, Code, broken, cuda_tools
from tests.processes import ROOT, python

_MISSING = cuda_tools()
needs_tools = pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING))

# What is launched, and its file.
KERNELS = {
    name: file
    for file in ("reconstruct", "splice")
    for name in re.findall(
        r"^def (_\w+_kernel)\(", (ROOT / "kernels" / f"{file}.py").read_text(), re.MULTILINE
    )
}
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
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_code_keeps_the_rule(report: dict[str, Any], kernel: str, rule: str) -> None:
    found = [f for f in report["findings"] if f["kernel"] == kernel and f["rule"] == rule]
    assert not found, "\n".join(
        f"{f['types']} {f['target']} {f['shape']}: {f['text']}" for f in found
    )


@needs_tools
@pytest.mark.slow
def test_every_kernel_type_and_target_is_compiled_and_on_record(report: dict[str, Any]) -> None:
    made = {(row["kernel"], row["types"], row["target"]) for row in report["rows"]}
    assert made == {
        (kernel, types, target)
        for kernel, file in KERNELS.items()
        for types in TYPES[file]
        for target in TARGETS
    }
    version, budget = compiled.read_record()
    assert budget, "no table: run python -m bench.compiled --write"
    if version == report["triton"]:
        assert made == set(budget)


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
}


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", TOYS)
def test_a_kernel_that_breaks_one_rule_breaks_it_alone(
    toys: dict[str, Any], kernel: str, target: str
) -> None:
    assert set(toys["broken"][kernel][target]) == TOYS[kernel], toys["broken"][kernel][target]


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
    assert bool(compiled.read_ttir(TTIR.format(lines, kind))["narrow"]) == narrow
