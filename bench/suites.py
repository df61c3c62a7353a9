"""Which rows the suites of single operations have."""

from __future__ import annotations

from bench import peers
from bench.shapes import MANY_TASKS, NAMED, QUICK, UNPADDED, Shape
from bench.stage import Case, Stage


def shapes(stage: Stage, operation: str) -> tuple[Shape, ...]:
    """The named shapes, or the tiny ones of a smoke test; `reconstruct` never sees a mask."""
    if stage.settings.quick:
        return QUICK
    named = (*NAMED, *MANY_TASKS)
    return named if operation == "reconstruct" else (*named, *UNPADDED)


def names(stage: Stage, operation: str, shape: Shape) -> list[str]:
    """The peers of an operation at a shape, ours first."""
    found = peers.names(operation, stage.device)
    if not stage.settings.compiled:
        found = [name for name in found if name not in peers.COMPILED]
    if shape.tasks:
        # Neither PEFT nor DePT has a bank of tasks.
        found = [name for name in found if name not in (peers.PEFT, peers.DEPT)]
    return found


def operation_cases(
    stage: Stage, suite: str, operation: str, directions: tuple[str, ...]
) -> list[Case]:
    """Types, shapes, peers and directions, what shares tensors and compiled code side by side."""
    tables = ["float32"]
    if stage.on_gpu:
        tables = ["bfloat16"] if operation == "reconstruct" else ["bfloat16", "float32"]
    return [
        Case(suite, operation, direction, shape, table, name)
        for table in tables
        for shape in shapes(stage, operation)
        for name in names(stage, operation, shape)
        for direction in directions
    ]
