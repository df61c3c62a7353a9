"""``docs/support.md`` says what the marked tests of this suite say, and nothing else writes it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import support
from tests.support import (
    FAILED,
    MISSING,
    PASSED,
    SKIPPED,
    TABLES,
    Cell,
    Evidence,
    Incomplete,
    Recorder,
    render,
    versions_of,
    write_page,
)

VERSIONS = {"Python": "3.11.7", "torch": "2.13.0"}
PADDING = Evidence((Cell("Llama", "padding"), Cell("Llama", "CAUSAL_LM")), PASSED)
BATCH = Evidence((Cell("Llama", "batch"), Cell("Llama", "CAUSAL_LM")), PASSED)
REFUSED = Evidence((Cell("FNet", "SEQ_CLS", "refused", "it takes no mask"),), PASSED)


def cells_of(page: str) -> dict[tuple[str, str], str]:
    """The cells of the page's tables, by row and column."""
    found, columns = {}, []
    for line in page.splitlines():
        if not line.startswith("|") or line.startswith("|---"):
            continue
        first, *rest = (cell.strip() for cell in line.strip("|").split("|"))
        if first in {table.head for table in TABLES.values()}:
            columns = rest
            continue
        found |= {(first, column): cell for column, cell in zip(columns, rest, strict=True)}
    return found


def test_page_is_what_the_markers_say(root: Path) -> None:
    """Cell by cell for the message, then letter by letter: no cell that is not green, no edit."""
    page = support.PAGE.read_text(encoding="utf-8")
    made_with = versions_of(page)
    passed = {name: replace(test, outcome=PASSED) for name, test in support.collected().items()}
    expected = render(passed, made_with)
    assert cells_of(page) == cells_of(expected), "run `make support`"
    assert page == expected, "run `make support`"
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (root / "constraints.txt").read_text(), re.M))
    stale = {name: v for name, v in made_with.items() if pins.get(name, v) != v}
    assert not stale, "made with other versions than the tested ones: run `make support`"


def test_every_row_has_a_cell() -> None:
    """One without is a file of tests that was not run, or a name that no test has."""
    found = cells_of(support.PAGE.read_text(encoding="utf-8"))
    rows = {row for row, _ in found}
    assert rows == {row for table in TABLES.values() for row in table.rows}
    for row in rows:
        assert {cell for (name, _), cell in found.items() if name == row} - {"–"}, row
    for mode in TABLES["training"].rows:
        for task in ("SEQ_CLS", "CAUSAL_LM"):
            assert found[mode, task] != "–", (mode, task)


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ((PASSED, PASSED), "✓"),
        ((PASSED, FAILED), "**fails**"),
        ((FAILED, SKIPPED), "**fails**"),
        ((PASSED, SKIPPED), "not run"),
        ((PASSED, MISSING), "not run"),
    ],
)
def test_cell_is_green_if_all_of_its_tests_passed(outcomes: tuple[str, str], expected: str) -> None:
    found = {
        "one": replace(PADDING, outcome=outcomes[0]),
        "two": replace(BATCH, outcome=outcomes[1]),
    }
    cells = cells_of(render(found, VERSIONS))
    assert cells["Llama", "CAUSAL_LM"] == expected
    assert cells["Llama", "padding"] == ("**fails**" if outcomes[0] == FAILED else "✓")
    assert cells["Llama", "folding"] == cells["BERT", "padding"] == "–"


def test_refused_and_unsupported_cells_have_a_reason() -> None:
    page = render({"test": REFUSED}, VERSIONS)
    cells = cells_of(page)
    assert cells["FNet", "SEQ_CLS"] == "refused (1)"
    assert "\n1. it takes no mask\n" in page
    assert cells["DeepSpeed ZeRO-3", "CAUSAL_LM"] == "no (2)"
    assert "\n2. DeepSpeed " in page
    failed = render({"test": replace(REFUSED, outcome=FAILED)}, VERSIONS)
    assert cells_of(failed)["FNet", "SEQ_CLS"] == "**fails** (1)"


def test_cell_that_is_supported_and_refused() -> None:
    both = {"one": REFUSED, "two": Evidence((Cell("FNet", "SEQ_CLS"),), PASSED)}
    with pytest.raises(ValueError, match="all support it or all refuse it"):
        render(both, VERSIONS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"row": "Lama", "column": "padding"}, "row: expected one of T5, .*, got 'Lama'"),
        ({"row": "Llama", "column": "DDP"}, "column: expected one of SEQ_CLS, .*, got 'DDP'"),
        ({"row": "DDP", "column": "padding"}, "column: expected one of SEQ_CLS, .*'padding'"),
        ({"row": "DDP", "column": "CAUSAL_LM", "state": "green"}, "state: expected supported or"),
        ({"row": "DDP", "column": "CAUSAL_LM", "state": "refused"}, "reason: expected one for"),
        ({"row": "DDP", "column": "CAUSAL_LM", "reason": "so"}, "reason: expected one for"),
    ],
)
def test_markers_that_name_no_cell(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cell(**arguments)


def test_page_is_written_from_whole_runs_only(tmp_path: Path) -> None:
    page = tmp_path / "support.md"
    page.write_text("as it was")
    expected = {"one": replace(PADDING, outcome=MISSING), "two": replace(BATCH, outcome=MISSING)}
    for found in ({"one": PADDING}, {"one": PADDING, "two": expected["two"]}):
        with pytest.raises(Incomplete, match="expected every marked test, got none of two"):
            write_page(expected, found, VERSIONS, page)
        assert page.read_text() == "as it was"
    failed = replace(BATCH, outcome=FAILED)
    assert write_page(expected, {"one": PADDING, "two": failed}, VERSIONS, page) == ["two"]
    assert versions_of(page.read_text()) == VERSIONS
    assert list(tmp_path.iterdir()) == [page]


def report(cells: list[list[str]], when: str, outcome: str) -> Any:
    return SimpleNamespace(
        nodeid="test", when=when, outcome=outcome, user_properties=[("support", c) for c in cells]
    )


@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        ((PASSED, PASSED, PASSED), PASSED),
        ((PASSED, FAILED, PASSED), FAILED),
        ((PASSED, PASSED, FAILED), FAILED),
        ((FAILED, PASSED), FAILED),
        ((SKIPPED, PASSED), SKIPPED),
        ((PASSED, SKIPPED, PASSED), SKIPPED),
    ],
)
def test_outcome_of_a_test_is_the_worst_of_its_phases(
    phases: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    recorder = Recorder(tmp_path / "record.json")
    whens = ("setup", "teardown") if len(phases) == 2 else ("setup", "call", "teardown")
    for when, outcome in zip(whens, phases, strict=True):
        recorder.pytest_runtest_logreport(
            report([["Llama", "padding", "supported", ""]], when, outcome)
        )
    recorder.pytest_runtest_logreport(report([], "call", FAILED))
    assert recorder.found == {"test": Evidence((Cell("Llama", "padding"),), expected)}


SUITE = """
import pytest
from tests.support import marks

@pytest.mark.support(row="Llama", column="padding")
@pytest.mark.support(row="Llama", column="CAUSAL_LM")
def test_passes():
    pass

@pytest.mark.parametrize("name", [pytest.param("BERT", marks=marks("BERT", "padding", "SEQ_CLS"))])
def test_fails(name):
    assert not name

@pytest.mark.support(row="DDP", column="SEQ_CLS", state="refused", reason="for once")
def test_skips():
    pytest.skip("here")

def test_without_a_marker():
    raise AssertionError
"""
HOOKS = """
from tests.support import add_option as pytest_addoption
from tests.support import note_cells as pytest_collection_modifyitems
from tests.support import register as pytest_configure
"""


def test_outcomes_come_from_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(HOOKS)
    (tmp_path / "test_suite.py").write_text(SUITE)
    found, made_with = support.run("--numprocesses", "1", folder=tmp_path)
    short = {name.partition("::")[2]: test.outcome for name, test in found.items()}
    assert short == {"test_passes": PASSED, "test_fails[BERT]": FAILED, "test_skips": SKIPPED}
    cells = cells_of(render(found, made_with))
    assert {cell: text for cell, text in cells.items() if text[0] not in "–n"} == {
        ("Llama", "padding"): "✓",
        ("Llama", "CAUSAL_LM"): "✓",
        ("BERT", "padding"): "**fails**",
        ("BERT", "SEQ_CLS"): "**fails**",
    }
    assert cells["DDP", "SEQ_CLS"] == "not run (1)"


def test_marker_that_names_no_cell_stops_the_run() -> None:
    mark = pytest.mark.support(row="Lama", column="padding").mark
    item: Any = SimpleNamespace(
        nodeid="test_one", user_properties=[], iter_markers=lambda name: iter([mark])
    )
    with pytest.raises(pytest.UsageError, match="test_one: mark support: row: expected one of"):
        support.note_cells([item])
