"""The first contact with a GPU: no process that fails takes what others found along."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bench import first_contact
from bench.first_contact import Case, Facts, Run
from bench.shapes import QUICK

RESULTS = "bench/results/nvidia-h200/first_contact.jsonl"

# A case's shape says what happens to the process that does it.
STAND_IN = """
import ctypes, os, sys, time
from dataclasses import asdict
from bench import first_contact

def act(what):
    if what == "error":
        raise ValueError("the sizes differ")
    if what == "dead":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if what == "dead in Triton":
        raise RuntimeError("Triton Error [CUDA]: misaligned address")
    if what == "exit":
        print("the last words", flush=True)
        os._exit(7)
    if what == "silent exit":
        os._exit(7)
    if what == "signal":
        os.kill(os.getpid(), 11)
    if what == "hang":
        time.sleep(600)
    if what == "slow":
        time.sleep(0.5)

def step(facts, work, case):
    act(case.shape)
    if work.cases:
        facts.add(work.step, **asdict(case), ok=True, error=0.5, by=os.getpid())

first_contact._STEPS = dict.fromkeys(first_contact._STEPS, step)
sys.exit(first_contact.child(sys.argv[1]))
"""


def cases(*what: str) -> list[Case]:
    return [Case("splice", "triton", one, f"mask {i}") for i, one in enumerate(what)]


@pytest.fixture
def do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Does stand-in cases: whether all is done, and the facts of each case."""
    monkeypatch.setattr(first_contact, "_CHILD", (sys.executable, "-c", STAND_IN))

    def done(*what: str, seconds: float = 60) -> tuple[bool, list[dict[str, Any]]]:
        facts = Facts(tmp_path / "facts.jsonl")
        whole = Run(facts, True, time.time() + seconds).part("parity", cases(*what))
        return whole, [fact for fact in facts.read() if fact["step"] == "parity"]

    return done


def of_shape(facts: list[dict[str, Any]], shape: str) -> dict[str, Any]:
    (fact,) = (fact for fact in facts if fact.get("shape") == shape)
    return fact


# Processes


def test_no_failure_takes_other_cases_along(do: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a crash or a CUDA error another process goes on, behind another error the same one.

    Each is noted once, with its case; no case is done twice.
    """
    monkeypatch.setattr(first_contact, "_CRASHES", 9)
    bad = ("exit", "error", "signal", "dead", "dead in Triton")
    whole, facts = do("fine", *(what for one in bad for what in (one, "fine")))
    assert whole
    assert [fact["mask"] for fact in facts] == [f"mask {i}" for i in range(11)]
    for what, status, words in (("exit", 7, "the last words"), ("signal", -11, "")):
        crash = of_shape(facts, what)
        assert (crash["crashed"], crash["words"].strip()) == (status, words)
    assert of_shape(facts, "error")["failed"] == "ValueError: the sizes differ"
    assert all("CUDA" in of_shape(facts, what)["failed"] for what in bad[3:])
    processes = [fact["by"] for fact in facts if "by" in fact]
    assert [a != b for a, b in pairwise(processes)] == [True, False, True, True, True]


def test_a_part_that_crashes_over_and_over_is_given_up(do: Any) -> None:
    whole, facts = do(*["exit"] * 5)
    assert not whole
    assert [fact["mask"] for fact in facts if "crashed" in fact] == ["mask 0", "mask 1", "mask 2"]
    assert facts[-1]["problem"] == "given up after 3 crashes"


def test_a_process_that_hangs_is_killed(do: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_contact, "_CASE_SECONDS", 2)
    whole, facts = do("fine", "hang", "fine")
    assert whole
    assert of_shape(facts, "hang")["crashed"] == -9
    assert [fact["mask"] for fact in facts] == ["mask 0", "mask 1", "mask 2"]


def test_at_the_deadline_what_is_left_is_noted(do: Any) -> None:
    """A process stops by itself some seconds before."""
    began = time.monotonic()
    whole, facts = do(*["slow"] * 20, seconds=6)
    assert time.monotonic() - began < 6
    assert not whole
    assert [fact["mask"] for fact in facts] == [f"mask {i}" for i in range(20)]
    done = ["by" in fact for fact in facts]
    assert done == sorted(done, reverse=True)
    assert all(fact["left_out"] for fact in facts if "by" not in fact)
    assert 0 < sum(done) < 20


def test_a_process_is_killed_at_the_deadline(do: Any) -> None:
    began = time.monotonic()
    whole, facts = do("hang", "fine", seconds=6)
    assert time.monotonic() - began < 8
    assert not whole
    assert of_shape(facts, "hang")["crashed"] == -9
    assert facts[-1]["problem"] == "not run: no time left"


# The whole


@pytest.fixture
def main(do: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command line with stand-in cases."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(first_contact, "time_cases", lambda rehearse: [])

    def run(*arguments: str, what: tuple[str, ...]) -> int:
        monkeypatch.setattr(first_contact, "parity_cases", lambda rehearse: cases(*what))
        return first_contact.main(["--rehearse", "--out", str(tmp_path), *arguments])

    return run


def test_the_exit_status_says_whether_all_is_well(
    main: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(what=("fine", "fine")) == 0
    capsys.readouterr()
    assert main(what=("fine", "silent exit", "error")) == 1
    printed = capsys.readouterr().out
    for line in (
        "parity: ended with status 7: without a word",
        "parity: ValueError: the sizes differ",
        "triton splice silent exit mask 1: CRASHED",
        "triton splice error mask 2: FAILED",
    ):
        assert f"\n{line}\n" in printed


def test_again_repeats_only_what_was_not_passed(main: Any, tmp_path: Path) -> None:
    what = ("fine", "exit", "error", "fine")
    assert main(what=what) == 1
    earlier = str(tmp_path / first_contact.FILE)
    assert main("--again", earlier, what=what) == 1
    repeated = Facts(tmp_path / "again.jsonl").read()
    assert [f["mask"] for f in repeated if f["step"] == "parity"] == ["mask 1", "mask 2"]
    # With that mended:
    assert main("--again", str(tmp_path / "again.jsonl"), what=("fine",)) == 0


def test_a_line_that_is_cut_off_loses_no_other(tmp_path: Path) -> None:
    facts = Facts(tmp_path / "facts.jsonl")
    assert facts.read() == []
    for number in range(3):
        facts.add("parity", number=number, words='of a {"step": "time"} line\n')
    whole = facts.path.read_bytes()
    for length in range(1, len(whole)):
        facts.path.write_bytes(whole[:length])
        complete = list(range(whole[:length].count(b"\n")))
        lacks_its_end = whole[length : length + 1] == b"\n"
        numbers = [*complete, len(complete)] if lacks_its_end else complete
        assert [fact["number"] for fact in facts.read()] == numbers
        facts.add("parity", number=9)
        assert [fact["number"] for fact in facts.read()] == [*complete, 9]


SMALL = """
import sys
from dataclasses import replace
from bench import compiled, first_contact

def few(*arguments):
    return [use for use in launches(*arguments) if use.launch.kernel == "splice_forward_kernel"]

launches, compiled.launches = compiled.launches, few
first_contact.QUICK = (replace(first_contact.QUICK[0], batch=1, length=3, max_length=4),)
sys.exit(first_contact.child(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_rehearsal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All steps, of one small shape, and one kernel compiled and timed.

    This process has Triton's interpreter, the one that compiles has not.
    """
    pytest.importorskip("triton", reason="Triton is not installed")
    splices = [c for c in first_contact.time_cases(rehearse=True) if c.operation == "splice"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(first_contact, "QUICK", QUICK[:1])
    monkeypatch.setattr(first_contact, "time_cases", lambda rehearse: splices)
    monkeypatch.setattr(first_contact, "_CHILD", (sys.executable, "-c", SMALL))
    status = first_contact.main(["--rehearse", "--out", str(tmp_path), "--seconds", "300"])
    printed = capsys.readouterr().out
    assert status == 0, printed
    facts = Facts(tmp_path / first_contact.FILE).read()
    assert {fact["step"] for fact in facts} == {
        *("begin", "environment", "compile", "parity", "floor", "time"),
    }
    compiled = [fact for fact in facts if "kernel" in fact]
    assert [fact["error"] for fact in compiled] == ["", ""]  # with and without a mask
    assert sum(fact["step"] == "parity" for fact in facts) == 4
    table = printed.partition("\nkernel ")[2].splitlines()
    assert [line.split()[:3] for line in table[1:]] == [
        ["splice", "forward", "triton"],
        ["splice", "backward", "triton"],
    ]
    assert len(printed.splitlines()) <= 60
    assert (tmp_path / first_contact.CACHE).stat().st_size > 1000


# The table, from what an H200 gave


@pytest.fixture(scope="module")
def h200(root: Path) -> list[dict[str, Any]]:
    return Facts(root / RESULTS).read()


def test_the_table_has_every_kernel(h200: list[dict[str, Any]]) -> None:
    lines = first_contact.table(h200)
    assert len(lines) <= 60
    assert lines[0] == "copy 4.22 TB/s, an empty launch 2.8 µs"
    rows = lines[2:]
    assert len(rows) == len({tuple(line.split()[:6]) for line in rows})
    for case in first_contact.time_cases(rehearse=False):
        for direction in first_contact.directions(case.operation):
            start = [*f"{case.operation} {direction} {case.peer} {case.shape} {case.mask}".split()]
            expected = case.peer in first_contact.KERNELS
            assert any(line.split()[: len(start)] == start for line in rows) == expected


def test_the_figures_of_a_row(h200: list[dict[str, Any]]) -> None:
    """60.672 µs beside 160.224 and 22.560; 26.028 MB at 4.2241 TB/s take 6.162 µs."""
    (row,) = (
        line
        for line in first_contact.table(h200)
        if line.split()[:5] == ["splice", "forward", "triton", "t5-base", "right"]
    )
    assert row.split()[5:] == ["ok", "0.21", "60.7", "10%", "449", "1", "0.38", "2.69"]


def test_what_is_lost_takes_no_line_along(h200: list[dict[str, Any]]) -> None:
    """Neither floor nor peers are needed."""
    kept = [f for f in h200 if f["step"] == "time" and f["peer"] == "triton"]
    lines = first_contact.table(kept)[1:]
    assert len(lines) == len(kept)
    assert all(line.split()[-2:] == ["-", "-"] for line in lines)
    rows = first_contact.rows([fact for fact in h200 if fact["step"] != "floor"])
    assert len(rows) == sum(fact["step"] == "time" for fact in h200)
    assert {row.of_floor for row in rows} == {None}


def test_rows_of_the_benchmarks_are_made(h200: list[dict[str, Any]]) -> None:
    """One for each time and floor."""
    rows = first_contact.rows(h200)
    assert len(rows) == sum(fact["step"] in ("time", "floor") for fact in h200)
    (row,) = (
        row
        for row in rows
        if (row.operation, row.direction, row.shape, row.peer)
        == ("splice", "forward", "t5-base", "reference")
    )
    assert row.ours_to_peer == pytest.approx(60.672 / 160.224, rel=1e-3)
    assert row.of_floor == pytest.approx(6.162 / 160.224, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"ok": False, "error": 1.5}, ["triton splice t5-base right: WRONG 1.5"]),
        ({"ok": False, "error": float("inf")}, ["triton splice t5-base right: WRONG inf"]),
        ({"ok": False, "error": 0.5}, ["triton splice t5-base right: not repeatable 0.5"]),
        (None, ["triton splice t5-base right: not checked"]),
        ({"left_out": "no time left"}, ["triton splice t5-base right: not checked"]),
        (
            {"crashed": -11, "words": "first\nSegmentation fault\n"},
            [
                "parity: ended with status -11: Segmentation fault",
                "triton splice t5-base right: CRASHED",
            ],
        ),
        (
            {"failed": "ValueError: no"},
            ["parity: ValueError: no", "triton splice t5-base right: FAILED"],
        ),
    ],
)
def test_what_is_wrong_is_named(
    h200: list[dict[str, Any]], change: dict[str, Any] | None, expected: list[str]
) -> None:
    case = {"operation": "splice", "peer": "triton", "shape": "t5-base", "mask": "right"}

    def is_it(fact: dict[str, Any]) -> bool:
        return fact["step"] == "parity" and fact.items() >= case.items()

    assert first_contact.red(h200, rehearse=False) == []
    facts = [fact for fact in h200 if not is_it(fact)]
    assert len(facts) == len(h200) - 1
    if change is not None:
        facts.append({"step": "parity", **case, **change})
    assert first_contact.red(facts, rehearse=False) == expected


def test_what_is_not_measured_is_named(h200: list[dict[str, Any]]) -> None:
    facts = [f for f in h200 if not (f["step"] == "time" and f["operation"] == "prompt path")]
    facts.append({"step": "time", "crashed": 1, "words": ""})
    assert first_contact.red(facts, rehearse=False) == [
        "time: ended with status 1: without a word",
        "time: 12 of 108 are not measured",
    ]
