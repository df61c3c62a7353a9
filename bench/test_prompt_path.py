"""Both operations, forward and backward: what a training step pays for the prompt."""

from __future__ import annotations

from typing import Any

from bench import suites
from bench.stage import Case, Stage


def cases(stage: Stage) -> list[Case]:
    """Every named shape by every peer."""
    return suites.operation_cases(stage, "prompt_path", "prompt path", ("both",))


def test_prompt_path(case: Case, stage: Stage, benchmark: Any) -> None:
    """Parity first, then time."""
    stage.operation_row(case, benchmark)
