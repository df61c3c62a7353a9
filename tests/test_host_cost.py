"""The host's time without a GPU: what is launched, the rows, and what is said if it
cannot be measured. Each run is a process of its own, since it replaces Triton's driver."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("triton", reason="Triton is not installed")

from bench import host_cost
from bench.compare import Failure
from bench.compiled import cuda_tools
from bench.host_cost import COMPILED, CUDA, DIRECTIONS, FUNCTIONS, MODULE, PEERS, TRITON
from bench.peers import REFERENCE
from tests.processes import python

# With a mask; without one there is no plan, which the CUDA backward makes again.
LAUNCHES = {TRITON: {"forward": 3, "both": 6}, CUDA: {"forward": 3, "both": 9}}
PLANS = {TRITON: {"forward": 1, "both": 1}, CUDA: {"forward": 1, "both": 2}}

_MISSING = cuda_tools() or next(
    (
        f"no compiler of {language}"
        for language, variable, names in (("C", "CC", "gcc clang"), ("C++", "CXX", "g++ clang++"))
        if not any(map(shutil.which, [os.environ.get(variable) or "", *names.split()]))
    ),
    None,
)
needs_tools = pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING))

Rows = list[dict[str, str]]


# A run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Rows, Rows]:
    """The rows of both files of a quick run."""
    folder = tmp_path_factory.mktemp("host")
    done = python("-m", "bench.host_cost", "--quick", "--out", str(folder), timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    paths, launches = (
        list(csv.DictReader((folder / name).read_text(encoding="utf-8").splitlines()))
        for name in (host_cost.PATHS, host_cost.LAUNCHES)
    )
    assert f"\n{FUNCTIONS} " in done.stdout
    return paths, launches


@needs_tools
@pytest.mark.slow
def test_every_row_is_whole(run: tuple[Rows, Rows]) -> None:
    rows, launches = run
    works = [tuple(row[name] for name in ("path", "direction", "mask", "peer")) for row in rows]
    assert len(works) == len(set(works))
    assert set(works) == set(product((FUNCTIONS, MODULE), DIRECTIONS, ("yes", "no"), PEERS))
    for row in rows:
        assert {name for name, text in row.items() if not text} <= {"launches"}
        assert float(row["p50_us"]) > 0
        for column, peer in (("by_reference", REFERENCE), ("by_compiled", COMPILED)):
            middle, low, high = (float(row[column + end]) for end in ("", "_low", "_high"))
            assert 0 < low <= middle <= high
            assert row["peer"] != peer or low == middle == high == 1
        assert int(row["allocations"]) > 0

        made = ""
        if (peer := row["peer"]) in LAUNCHES:
            plans = 0 if row["mask"] == "yes" else PLANS[peer][row["direction"]]
            made = str(LAUNCHES[peer][row["direction"]] - plans)
        assert row["launches"] == made
    counts = LAUNCHES[TRITON]
    assert len(launches) == counts["both"]
    assert [row["direction"] for row in launches].count("forward") == counts["forward"]
    for row in launches:
        assert float(row["front_us"]) > float(row["launcher_us"]) > 0


_COUNT = """
import json, torch
from dataclasses import replace
from bench import host_cost, peers, shapes
from bench.inputs import make_inputs
from ept_fast.ops import splice
from ept_fast.backends import fused

torch.set_num_threads(1)
found = []
checked = splice.values_are_checked
with host_cost.stubbed() as launched:
    for shape in (host_cost.SHAPE, replace(shapes.NAMED[0], vocabulary=100)):
        (inputs,) = make_inputs(shape, torch.bfloat16, torch.device("cpu"), 1)
        for backend in host_cost.KERNELS:
            forward = peers.operation_of("prompt path", backend)
            counts = [launched()]
            out = forward(inputs)
            counts.append(launched())
            torch.autograd.grad(out, list(inputs.parameters.values()), torch.ones_like(out))
            found.append([counts[1] - counts[0], launched() - counts[0]])
assert fused._forced_target is None and splice.values_are_checked is checked
errors = []
for backend in host_cost.KERNELS:
    try:
        peers.operation_of("prompt path", backend)(inputs)
    except RuntimeError as error:
        errors.append(str(error))
print(json.dumps([found, errors]))
"""


@needs_tools
@pytest.mark.slow
def test_tiny_sizes_are_launched_as_real_ones() -> None:
    """The same number of launches as at t5-base; afterwards the backends refuse a CPU again."""
    done = python("-c", _COUNT, timeout=600, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    found, errors = json.loads(done.stdout)
    assert found == [list(counts.values()) for counts in LAUNCHES.values()] * 2
    of_triton, of_cuda = errors
    assert "CPU tensors" in of_triton
    assert "not on an NVIDIA GPU" in of_cuda


# What cannot be measured


@pytest.mark.parametrize(
    ("variable", "compile_it", "names", "what"),
    [
        ("CC", host_cost.compile_stub, "gcc or clang", "the stub of libcuda"),
        ("CXX", host_cost.compile_binding, r"g\+\+ or clang\+\+", "the stub of the CUDA library"),
    ],
)
@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        ("", "expected a compiler, got no {names}"),
        ("no-such-compiler", "expected a compiler, got no no-such-compiler"),
        ("false", ".*false failed"),
    ],
)
def test_a_missing_compiler_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compiler: str,
    said: str,
    variable: str,
    compile_it: Callable[[Path], Path],
    names: str,
    what: str,
) -> None:
    monkeypatch.setenv(variable, compiler)
    if not compiler:
        monkeypatch.setenv("PATH", "")
    with pytest.raises(Failure, match=f"^{what}: {said.format(names=names)}"):
        compile_it(tmp_path)


@pytest.mark.usefixtures("one_thread")
def test_another_build_of_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for missing, said in ((None, "TRITON_INTERPRET: expected it not"), ("ptxas", "without: ptxas")):
        monkeypatch.setattr(host_cost, "cuda_tools", lambda missing=missing: missing)
        done = CliRunner().invoke(host_cost.main, ["--quick"])
        assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)
        assert said in done.stderr


def test_launches_that_miss_the_stub_are_an_error() -> None:
    with pytest.raises(Failure, match="this process has another libcuda"):
        host_cost._counts(TRITON, lambda: None, lambda: 0)


# Turns


def test_peers_take_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = host_cost.in_turns(calls, 4, 2)
    assert "".join(order) == "aabbcc" + "aabbcc" + "bbccaa" + "ccaabb" + "aabbcc"
    assert all(len(found) == 4 and min(found) > 0 for found in times.values())
