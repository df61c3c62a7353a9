"""What the first use costs: import, first call, compiling; each in fresh Python processes.

A round starts a process for ours and then one for the peer. The time is taken inside, so the start
of Python and the import of torch are not in it; caches of compiled code are empty in every process.
The peer that compiles an empty function shows what the compiler itself takes to start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import parity, peers
from bench.rows import Row
from bench.run import Run
from bench.shapes import NAMED, QUICK
from bench.timing import median_interval, quantiles

IMPORT, FIRST_CALL, COMPILE = "import", "first call", "compile"
COMPILED, EMPTY = "reference-compiled", "empty function"

_PACKAGE = "ept_fast"
_ROUNDS = {IMPORT: 5, FIRST_CALL: 5, COMPILE: 3}
_LIMIT = 300  # seconds of one process
_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Case:
    """One row: an operation by a peer, ours beside it."""

    operation: str
    ours: str
    peer: str

    @property
    def id(self) -> str:
        """The row's name in pytest."""
        return f"{self.operation}-{self.peer}".replace(" ", "-")


def cases(run: Run) -> list[Case]:
    """Ours first in each operation; a smoke test has one peer of each."""
    ours = peers.ours(run.device)
    found = {IMPORT: (_PACKAGE, "peft"), FIRST_CALL: (ours, peers.REFERENCE)}
    if run.settings.compiled:
        found[COMPILE] = (ours, COMPILED, EMPTY)
    wanted = slice(1, 2) if run.settings.quick else slice(None)
    return [
        Case(operation, names[0], peer)
        for operation, names in found.items()
        for peer in names[wanted]
    ]


def test_cold_start(case: Case, run: Run, benchmark: Any) -> None:
    """Processes in pairs. The first pair also checks its results, and a red check leaves no row."""
    run.check_time()
    run.hold_for(("cold start", case.operation))
    quick = run.settings.quick
    shape = None if case.operation == IMPORT else (QUICK if quick else NAMED)[0]
    table = "bfloat16" if run.on_gpu else "float32"
    seconds: dict[bool, list[float]] = {True: [], False: []}  # of ours, of the peer
    error: float | None = None

    def once(ours: bool) -> None:
        nonlocal error
        name = case.ours if ours else case.peer
        if shape is None:
            found = child(IMPORT, name)
        elif name == EMPTY:
            found = child(EMPTY, run.device.type)
        else:
            check = not seconds[ours]
            backend = peers.REFERENCE if name == COMPILED else name
            options = (run.device.type, case.operation == COMPILE, check)
            found = child(FIRST_CALL, backend, shape.name, table, *options)
        if not ours:
            error = found.get("error", error)
        parity.refuse_red(case.id, name, found.get("error", 0.0), "the result")
        seconds[ours].append(found["seconds"])

    def setup() -> tuple[tuple[bool], dict[str, Any]]:
        once(True)
        return (False,), {}

    if shape is None and not quick:
        # Leaves bytecode behind: what is imported was imported before.
        for name in (case.ours, case.peer):
            child(IMPORT, name)
    benchmark.group = f"{case.operation}, whole processes"
    rounds = 1 if quick else _ROUNDS[case.operation]
    benchmark.pedantic(once, setup=setup, teardown=lambda ours: None, rounds=rounds)
    if not benchmark.enabled:
        return
    p20, p50, p80 = (1e3 * t for t in quantiles(seconds[False]))
    ratios = [a / b for a, b in zip(seconds[True], seconds[False], strict=True)]
    ratio, low, high = median_interval(ratios)
    of_shape: dict[str, Any] = {}
    if shape is not None:
        of_shape = {"direction": "both", "shape": shape.name, **shape.columns}
        of_shape |= {"embeddings": table, "parameters": "float32"}
    row = Row(
        suite="cold_start",
        operation=case.operation,
        peer=case.peer,
        ours=case.ours,
        p20_ms=p20,
        p50_ms=p50,
        p80_ms=p80,
        elapsed_ms=p50,
        rounds=len(ratios),
        ours_to_peer=ratio,
        ours_to_peer_low=low,
        ours_to_peer_high=high,
        error=error,
        note="a fresh process each",
        **of_shape,
        **run.origin,
    )
    run.book.add(row)
    benchmark.extra_info["ours_to_peer"] = row.ours_to_peer


def child(what: str, *arguments: Any) -> dict[str, float]:
    """What a process of :mod:`bench.cold_child` has measured, its caches empty.

    Raises:
        RuntimeError: it failed; with the end of what it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        environment = {
            **os.environ,
            "PYTHONPATH": path,
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "TRITON_CACHE_DIR": f"{folder}/triton",
        }
        command = [sys.executable, "-m", "bench.cold_child", json.dumps([what, *arguments])]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_LIMIT
        )
    if done.returncode:
        raise RuntimeError(f"{what} {arguments}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found
