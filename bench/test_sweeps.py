"""How the prompt path's cost grows with each size, the others standing still."""

from __future__ import annotations

from typing import Any

from bench import peers
from bench.run import Case, Run
from bench.shapes import QUICK, sweeps


def cases(run: Run) -> list[Case]:
    """Every axis by us and by the definition."""
    shapes = QUICK[:1] if run.settings.quick else sweeps(run.on_gpu)
    table = "bfloat16" if run.on_gpu else "float32"
    return [
        Case("sweeps", "prompt path", "both", shape, table, name)
        for shape in shapes
        for name in (peers.ours(run.device), peers.REFERENCE)
    ]


def test_sweeps(case: Case, run: Run, benchmark: Any) -> None:
    """Parity first, then time."""
    run.operation_row(case, benchmark)
