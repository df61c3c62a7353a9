"""The operation `splice`, forward and backward apart."""

from __future__ import annotations

from typing import Any

from bench import suites
from bench.run import Case, Run


def cases(run: Run) -> list[Case]:
    """Every named shape by every peer, in both directions."""
    return suites.operation_cases(run, "splice", ("forward", "backward"))


def test_splice(case: Case, run: Run, benchmark: Any) -> None:
    """Parity first, then time."""
    run.operation_row(case, benchmark)
