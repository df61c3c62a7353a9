"""Which rows the suites of single operations have."""

from __future__ import annotations

from bench import peers
from bench.run import Case, Run
from bench.shapes import MANY_TASKS, NAMED, QUICK, UNPADDED, Shape


def shapes(run: Run, operation: str) -> tuple[Shape, ...]:
    """The named shapes, or the tiny ones of a smoke test; `reconstruct` never sees a mask."""
    if run.settings.quick:
        return QUICK
    named = (*NAMED, *MANY_TASKS)
    return named if operation == "reconstruct" else (*named, *UNPADDED)


def names(run: Run, operation: str, shape: Shape) -> list[str]:
    """The peers of an operation at a shape, ours first."""
    found = peers.names(operation, run.device)
    if not run.settings.compiled:
        found = [name for name in found if name not in peers.COMPILED]
    if shape.tasks:
        # Neither PEFT nor DePT has a bank of tasks.
        found = [name for name in found if name not in (peers.PEFT, peers.DEPT)]
    return found


def operation_cases(
    run: Run, suite: str, operation: str, directions: tuple[str, ...]
) -> list[Case]:
    """Types, shapes, peers and directions, what shares tensors and compiled code side by side."""
    tables = ["float32"]
    if run.on_gpu:
        tables = ["bfloat16"] if operation == "reconstruct" else ["bfloat16", "float32"]
    return [
        Case(suite, operation, direction, shape, table, name)
        for table in tables
        for shape in shapes(run, operation)
        for name in names(run, operation, shape)
        for direction in directions
    ]
