"""Processes that tests start in the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def run(
    *command: str, timeout: float = 120, cwd: Path = ROOT, **changes: str | None
) -> subprocess.CompletedProcess[str]:
    """Run a command that finds the checkout's packages.

    Args:
        changes: of the environment; None takes a variable out.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, **changes}
    return subprocess.run(
        command,
        cwd=cwd,
        env={name: value for name, value in environment.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def python(*arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
    """Python itself, with kernels compiled and not interpreted unless a test says otherwise."""
    return run(sys.executable, *arguments, **{"TRITON_INTERPRET": None, **how})
