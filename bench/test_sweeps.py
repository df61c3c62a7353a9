"""How the prompt path's cost grows with each size, the others standing still."""

from __future__ import annotations

from typing import Any

from bench import peers
from bench.shapes import QUICK, sweeps
from bench.stage import Case, Stage


def cases(stage: Stage) -> list[Case]:
    """Every axis by us and by the definition."""
    shapes = QUICK[:1] if stage.settings.quick else sweeps(stage.on_gpu)
    table = "bfloat16" if stage.on_gpu else "float32"
    return [
        Case("sweeps", "prompt path", "both", shape, table, name)
        for shape in shapes
        for name in (peers.ours(stage.device), peers.REFERENCE)
    ]


def test_sweeps(case: Case, stage: Stage, benchmark: Any) -> None:
    """Parity first, then time."""
    stage.operation_row(case, benchmark)
