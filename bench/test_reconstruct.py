"""The operation `reconstruct`, forward and backward apart."""

from __future__ import annotations

from typing import Any

from bench import suites
from bench.stage import Case, Stage


def cases(stage: Stage) -> list[Case]:
    """Every named shape by every peer, in both directions."""
    return suites.operation_cases(stage, "reconstruct", "reconstruct", ("forward", "backward"))


def test_reconstruct(case: Case, stage: Stage, benchmark: Any) -> None:
    """Parity first, then time."""
    stage.operation_row(case, benchmark)
