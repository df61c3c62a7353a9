"""Both operations, forward and backward: what a training step pays for the prompt."""

from __future__ import annotations

from typing import Any

from bench import suites
from bench.run import Case, Run


def cases(run: Run) -> list[Case]:
    """Every named shape by every peer."""
    return suites.operation_cases(run, "prompt path", ("both",))


def test_prompt_path(case: Case, run: Run, benchmark: Any) -> None:
    """Parity first, then time."""
    run.operation_row(case, benchmark)
