"""What runs on a GPU, as far as it can be checked without one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.record import SUITES, read

BARE = """
import sys
for name in ("accelerate", "click", "hypothesis", "matplotlib", "transformers"):
    sys.modules[name] = None
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def script(
    root: Path, *arguments: str, timeout: float = 60, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "bench/on_gpu.sh", *arguments],
        cwd=root,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_a_dry_run_names_the_stages_in_order(root: Path) -> None:
    done = script(root, "--dry-run", OUT="here")
    assert done.returncode == 0, done.stderr
    stages = re.findall(r"^(\w+) +(\d+) s  (.*)$", done.stdout, re.MULTILINE)
    names = [name for name, _, _ in stages]
    assert names == [
        *("extension", "parity", "behaviour", "cost", "large", "compile"),
        *("memcheck", "racecheck", "initcheck", "benchmark"),
    ]
    assert all(int(limit) <= 540 for _, limit, _ in stages)
    files = {
        file for *_, command in stages for file in re.findall(r"tests/gpu/test_\w+.py", command)
    }
    assert files == {f"tests/gpu/{path.name}" for path in (root / "tests/gpu").glob("test_*.py")}


def test_an_unknown_option_is_refused(root: Path) -> None:
    done = script(root, "--fast")
    assert done.returncode == 2
    assert "--dry-run" in done.stderr


def test_the_benchmarks_can_have_all_of_the_time(root: Path, tmp_path: Path) -> None:
    """A python that is all stubs says what it is called with."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *device_name*) echo Fake GPU ;; esac\n')
    python.chmod(0o755)
    done = script(root, "--bench", PYTHON=str(python), OUT=str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    stages = re.findall(r"^== (\w+) \(at most (\d+) s\): (.*)$", done.stdout, re.MULTILINE)
    ((name, limit, command),) = stages
    assert name == "benchmark"
    assert int(limit) <= 530
    seconds = re.search(r"bench/ .*--seconds (\d+)", command)
    assert seconds is not None
    assert int(seconds[1]) < int(limit)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(root: Path, tmp_path: Path) -> None:
    done = script(root, OUT=str(tmp_path / "out"))
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_failing_stage_loses_no_later_one(root: Path, tmp_path: Path) -> None:
    """The status is the worst of the stages', and the log tells of each."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$*" in *test_parity*) exit 1 ;; *small_run*) exit 3 ;; esac\n',
        encoding="utf-8",
    )
    python.chmod(0o755)
    done = script(root, "--rehearse", PYTHON=str(python), OUT=str(tmp_path / "out"))
    assert done.returncode == 3, done.stdout
    log = (tmp_path / "out" / "log.txt").read_text(encoding="utf-8")
    for line in (
        r"parity +FAILED with status 1",
        r"modes +passed",
        r"small-run +FAILED with status 3",
        r"benchmark +passed",
    ):
        assert re.search(line, log), line


def test_the_gpu_tests_need_only_torch_triton_numpy_and_pytest(root: Path) -> None:
    own = ["-c", "tests/gpu/pytest.ini", "--rootdir", "tests/gpu", "--confcutdir", "tests/gpu"]
    done = subprocess.run(
        [sys.executable, "-c", BARE, *own, "--collect-only", "-q", "tests/gpu"],
        cwd=root,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.findall(r"(\d+) tests collected", done.stdout)[0]) > 200


def test_the_benchmarks_of_a_gpu_are_listed(root: Path) -> None:
    """All suites and all rows, on a machine without one; the goals' rows first."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench/", "--device", "cuda", "--collect-only", "-q"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ids = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(ids) == len(set(ids)) > 500
    suites = {Path(line.partition("::")[0]).stem.removeprefix("test_") for line in ids}
    assert suites == set(SUITES) - {"floor"}
    assert "t5-base" in ids[0]
    for backend in ("triton", "cuda", "eager"):
        assert any(line.endswith(f"-{backend}]") for line in ids)


@pytest.mark.slow
def test_a_rehearsal_leaves_a_log_rows_and_plots(root: Path, tmp_path: Path) -> None:
    done = script(root, "--rehearse", OUT=str(tmp_path), timeout=420)
    assert done.returncode == 0, done.stdout
    assert "results in" in (tmp_path / "log.txt").read_text(encoding="utf-8")
    rows = read(tmp_path)
    assert {"copy", "empty launch", "splice"} <= {row.operation for row in rows}
    assert {row.ours for row in rows if row.suite == "splice"} == {"triton"}
    assert all(row.commit and row.torch and row.device for row in rows)
    assert list(tmp_path.glob("*.png"))
