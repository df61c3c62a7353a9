"""What runs on a GPU, as far as it can be checked without one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from bench.rows import SUITES, read

PYTEST = (sys.executable, "-m", "pytest")
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
    names = [name for name, _, _ in stages if name not in ("unpack", "again")]
    assert names == [
        *("extension", "goals", "parity", "behaviour", "cost"),
        *("memcheck", "racecheck", "initcheck", "compile", "large", "others"),
    ]
    assert all(int(limit) < 500 for _, limit, _ in stages)
    files = {
        file for *_, command in stages for file in re.findall(r"tests/gpu/test_\w+.py", command)
    }
    assert files == {f"tests/gpu/{path.name}" for path in (root / "tests/gpu").glob("test_*.py")}


@pytest.mark.slow
def test_the_rows_of_the_goals_are_measured_once(root: Path) -> None:
    """What one benchmark stage chooses the other leaves out; together they are all rows."""
    done = script(root, "--dry-run", OUT="here")
    chosen = {
        name: re.search(rf"^{name} .*--seconds \d+ (.*?) -k (.*)$", done.stdout, re.MULTILINE)
        for name in ("goals", "others")
    }

    def ids(*arguments: str) -> set[str]:
        listed = subprocess.run(
            [*PYTEST, "--device", "cuda", "--collect-only", "-q", *arguments],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=120,
        )
        return {line for line in listed.stdout.splitlines() if "::" in line}

    goals, others = (ids(*m[1].split(), "-k", m[2]) for m in chosen.values() if m is not None)
    assert goals
    assert not goals & others
    assert goals | others == ids("bench/")


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
    assert name == "benchmarks"
    assert int(limit) < 500
    seconds = re.search(r"--seconds (\d+) bench/", command)
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
        r"behaviour +passed",
        r"small-run +FAILED with status 3",
        r"goals +passed",
    ):
        assert re.search(line, log), line


@pytest.mark.slow
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
        [*PYTEST, "bench/", "--device", "cuda", "--collect-only", "-q"],
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
    # What is left after a failure on the way back: the end of what was printed.
    assert re.search("^splice +forward +tiny ", done.stdout[-8000:], re.MULTILINE)
    with tarfile.open(tmp_path / "results.tgz") as archive:
        archive.extractall(tmp_path / "results", filter="data")
    rows = read(tmp_path / "results")
    assert {"copy", "empty launch", "splice"} <= {row.operation for row in rows}
    assert {row.ours for row in rows if row.suite == "splice"} == {"triton"}
    assert all(row.commit and row.torch and row.device for row in rows)
    assert list((tmp_path / "results").glob("*.png"))


DEAD = """
import pytest, torch

def test_fails_and_takes_its_context_along(monkeypatch):
    torch.cuda.is_available = lambda: True
    def synchronize(): raise RuntimeError("CUDA error: an illegal memory access")
    torch.cuda.synchronize = synchronize
    assert 1 == 2

@pytest.mark.parametrize("number", range(4))
def test_goes_on_elsewhere(number):
    assert not torch.cuda.is_available()
"""


@pytest.mark.slow
def test_a_worker_whose_context_is_dead_is_replaced(root: Path, tmp_path: Path) -> None:
    """The failure is reported, and no other test is lost."""
    (tmp_path / "test_dead.py").write_text(DEAD, encoding="utf-8")
    (tmp_path / "conftest.py").write_text(
        "from tests.gpu.conftest import pytest_runtest_logfinish, pytest_runtest_logreport\n"
    )
    done = subprocess.run(
        [*PYTEST, "-n", "1", "-v", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "assert 1 == 2" in done.stdout
    assert "replacing crashed worker" in done.stdout
    assert "4 passed" in done.stdout


@pytest.mark.slow
def test_launches_are_listed_and_compiled_elsewhere(root: Path, tmp_path: Path) -> None:
    """Those of the chosen tests, each once, without a path of this machine."""
    file = tmp_path / "launches.jsonl"
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment.pop("TRITON_INTERPRET", None)

    def launches(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "tests.gpu.launches", *arguments],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    launches(
        "list", str(file), "tests/gpu/test_parity.py::test_named_sizes[triton-t5-base-bfloat16]"
    )
    lines = file.read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(set(lines))
    kernels = [json.loads(line)["kernel"] for line in lines]
    assert {"_splice_forward_kernel", "_splice_backward_kernel", "_reduce_kernel"} <= set(kernels)
    assert sys.prefix not in file.read_text(encoding="utf-8")
    file.write_text("".join(f"{line}\n" for line in lines if "_splice_finish" in line))
    assert "1 of 1 compiled" in launches("compile", str(file))
