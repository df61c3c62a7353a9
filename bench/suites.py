"""Which rows the suites of single operations have."""

from __future__ import annotations

from bench import peers
from bench.run import Case, Run
from bench.shapes import MANY_TASKS, NAMED, QUICK, UNPADDED


def operation_cases(run: Run, operation: str, directions: tuple[str, ...]) -> list[Case]:
    """Types, shapes, peers and directions; rows that share tensors and compiled code are adjacent.

    A smoke test has the tiny shapes. `reconstruct` never sees a mask, and the type of the
    embeddings does not matter to it.
    """
    alone = operation == "reconstruct"
    shapes = (*NAMED, *MANY_TASKS) if alone else (*NAMED, *MANY_TASKS, *UNPADDED)
    tables = ["float32"]
    if run.on_gpu:
        tables = ["bfloat16"] if alone else ["bfloat16", "float32"]
    left_out = () if run.settings.compiled else tuple(peers.COMPILED)
    return [
        Case(operation.replace(" ", "_"), operation, direction, shape, table, name)
        for table in tables
        for shape in (QUICK if run.settings.quick else shapes)
        for name in peers.names(operation, run.device)
        # Neither PEFT nor DePT has a bank of tasks.
        if name not in left_out and not (shape.tasks and name in (peers.PEFT, peers.DEPT))
        for direction in directions
    ]
