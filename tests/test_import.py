"""What `import ept_fast` costs and what it leaves alone, each seen from a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Facts about the import, told on the last line. An audit hook sees every process that is started
# and every library that is opened from Python.
PROBE = """
import json, sys, time
import torch

before = set(sys.modules)
events = []
watched = {"subprocess.Popen", "os.exec", "os.fork", "os.posix_spawn", "os.system", "ctypes.dlopen"}
sys.addaudithook(lambda event, args: events.append(event) if event in watched else None)
started = time.process_time()
import ept_fast
seconds = time.process_time() - started
print(json.dumps({
    "seconds": seconds,
    "modules": sorted({name.partition(".")[0] for name in set(sys.modules) - before}),
    "events": events,
    "cuda": torch.cuda.is_initialized(),
    "threads": torch.get_num_threads(),
    "dynamo": "torch._dynamo" in sys.modules and "torch._dynamo" not in before,
}))
"""


def probe(root: Path) -> dict[str, Any]:
    # As a user's process runs: bytecode is written once and then read.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


@pytest.fixture(scope="module")
def imported(root: Path) -> dict[str, Any]:
    return probe(root)


@pytest.mark.parametrize(
    "name",
    [
        "accelerate",
        "click",
        "datasets",
        "matplotlib",
        "peft",
        "tokenizers",
        "transformers",
        "triton",
    ],
)
def test_import_leaves_alone(name: str, imported: dict[str, Any]) -> None:
    assert "ept_fast" in imported["modules"]
    assert name not in imported["modules"]


@pytest.mark.parametrize("name", ["EPTBank", "EPTModel", "get_ept_model"])
def test_without_transformers_there_is_a_hint(name: str, root: Path) -> None:
    code = f"import sys; sys.modules['transformers'] = None\nfrom ept_fast import {name}"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == (
        "ept_fast.libraries.MissingLibraryError: transformers not installed: "
        'pip install "ept-fast[train]"'
    )


def test_import_starts_no_process_and_loads_no_library(imported: dict[str, Any]) -> None:
    assert imported["events"] == []


def test_import_starts_neither_cuda_nor_the_compiler(imported: dict[str, Any]) -> None:
    assert not imported["cuda"]
    assert not imported["dynamo"]


def test_import_takes_under_50_ms_beyond_torch(root: Path, imported: dict[str, Any]) -> None:
    # CPU time, so that another process's turn does not count; no import waits for anything, as the
    # test above shows. The fixture wrote the bytecode. The least of five processes is the cost
    # of the import itself; what exceeds it is cold caches.
    assert min(probe(root)["seconds"] for _ in range(5)) < 0.050
