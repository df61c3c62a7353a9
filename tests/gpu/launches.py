"""The kernels that the tests of this folder launch: listed on any machine, compiled in parallel.

    python -m tests.gpu.launches list FILE [pytest's arguments]
    python -m tests.gpu.launches compile FILE [--jobs N]

``list`` runs the tests' own calls on tensors of a CPU, as on a GPU of sm_90: Triton specialises
each launch, and a hook notes it and launches nothing. What the tests then find is of no meaning.
``compile`` compiles each launch once, into Triton's cache, where workers that start together would
each compile what another one is at already.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

from triton import knobs

from bench.compiled import TARGETS, Launch, problem, recorded

FILES = ("test_parity", "test_determinism", "test_modes", "test_cost")
TARGET = "sm_90"


@contextmanager
def _as_on_a_gpu() -> Iterator[list[Launch]]:
    """Notes the launches that are made within; the Triton backend serves every call."""
    from ept_fast.backends import triton

    works = mock.Mock(return_value=(True, "its launches are listed"))
    with (
        recorded(TARGETS[TARGET]) as launches,
        mock.patch.object(triton, "supports", works),
        mock.patch.object(triton, "available", works),
    ):
        yield launches


def listed(arguments: list[str]) -> list[Launch]:
    """The launches of the chosen tests, each once."""
    import pytest

    here = Path(__file__).parent
    chosen = [str(here / f"{name}.py") for name in FILES]
    own = ["-c", str(here / "pytest.ini"), "--rootdir", str(here), "--confcutdir", str(here)]
    quiet = ["-q", "--tb=no", "-k", "triton and not long"]
    with _as_on_a_gpu() as launches:
        pytest.main([*own, *quiet, *(arguments or chosen)])
    return list(dict.fromkeys(_portable(launch) for launch in launches))


def _portable(launch: Launch) -> Launch:
    """Without the place of Triton's own library on this machine: another finds its own."""
    data = json.loads(launch.data)
    data["options"].pop("extern_libs", None)
    return replace(launch, data=json.dumps(data))


def compile_all(path: Path, jobs: int) -> list[str]:
    """Compile the launches of a file; what went wrong."""
    launches = [Launch(**json.loads(line)) for line in path.read_text().splitlines()]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        found = zip(launches, pool.map(problem, launches), strict=True)
        return [f"{launch.kernel}: {why}" for launch, why in found if why]


def main(arguments: list[str]) -> int:
    """The command line."""
    if len(arguments) < 2 or arguments[0] not in ("list", "compile"):
        print((__doc__ or "").strip(), file=sys.stderr)
        return 2
    if knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: nothing is compiled in this process", file=sys.stderr)
        return 2
    began, path = time.monotonic(), Path(arguments[1])
    if arguments[0] == "list":
        # Before the tests' modules read it.
        os.environ["EPT_FAST_TEST_DEVICE"] = "listing"
        found = listed(arguments[2:])
        path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in found))
        print(f"{len(found)} launches listed in {time.monotonic() - began:.0f} s")
        return 0 if found else 1
    jobs = int(arguments[3]) if arguments[2:3] == ["--jobs"] else os.cpu_count() or 1
    failed = compile_all(path, jobs)
    print("\n".join(failed))
    number = len(path.read_text(encoding="utf-8").splitlines())
    print(f"{number - len(failed)} of {number} compiled in {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
