"""What runs on a GPU, as far as it can be checked without one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.rows import SUITES, read
from tests.processes import python, run

BARE = """
import sys
for name in ("accelerate", "click", "hypothesis", "matplotlib", "transformers"):
    sys.modules[name] = None
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


OWN = ["-c", "tests/gpu/pytest.ini", "--rootdir", "tests/gpu", "--confcutdir", "tests/gpu"]


def script(
    *arguments: str, python: str = sys.executable, out: Path | str = "", **how: Any
) -> subprocess.CompletedProcess[str]:
    return run("bash", "bench/on_gpu.sh", *arguments, PYTHON=python, OUT=str(out), **how)


def stub(folder: Path, cases: str) -> str:
    """A python that does nothing but what the cases of its arguments say."""
    fake = folder / "python"
    fake.write_text(f'#!/bin/sh\ncase "$*" in {cases} esac\n')
    fake.chmod(0o755)
    return str(fake)


def listed(*arguments: str) -> list[str]:
    """The rows that pytest lists for a GPU."""
    done = python("-m", "pytest", "--device", "cuda", "--collect-only", "-q", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_a_dry_run_names_the_stages_in_order(root: Path) -> None:
    done = script("--dry-run", out="here")
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
def test_every_row_is_listed_and_measured_once() -> None:
    """The goals' rows first; what one benchmark stage chooses the other leaves out."""
    every = listed("bench/")
    assert len(every) == len(set(every)) > 500
    suites = {Path(line.partition("::")[0]).stem.removeprefix("test_") for line in every}
    assert suites == set(SUITES) - {"floor"}
    assert "t5-base" in every[0]
    for backend in ("triton", "cuda", "eager"):
        assert any(line.endswith(f"-{backend}]") for line in every)
    done = script("--dry-run", out="here")
    goals, others = (
        set(listed(*files.split(), "-k", chosen))
        for files, chosen in re.findall(r"--seconds \d+ (bench/.*?) -k (.*)$", done.stdout, re.M)
    )
    assert goals
    assert not goals & others
    assert goals | others == set(every)


def test_the_benchmarks_can_have_all_of_the_time(tmp_path: Path) -> None:
    fake = stub(tmp_path, "*device_name*) echo Fake GPU ;;")
    done = script("--bench", python=fake, out=tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    (stage,) = re.findall(r"^== benchmarks \(at most (\d+) s\): .*", done.stdout, re.MULTILINE)
    seconds = re.search(r"--seconds (\d+) bench/", done.stdout)
    assert seconds is not None
    assert int(seconds[1]) < int(stage) < 500


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_what_cannot_run_says_so(tmp_path: Path) -> None:
    for arguments, said in (((), "no CUDA device"), (("--fast",), "--dry-run")):
        done = script(*arguments, out=tmp_path / "out")
        assert done.returncode == 2
        assert said in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_failing_stage_loses_no_later_one(tmp_path: Path) -> None:
    """The status is the worst of the stages', and the log tells of each."""
    fake = stub(tmp_path, "*test_parity*) exit 1 ;; *small_run*) exit 3 ;;")
    done = script("--rehearse", python=fake, out=tmp_path / "out")
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
def test_the_gpu_tests_need_only_torch_triton_numpy_and_pytest() -> None:
    chosen = ("--collect-only", "-q", "tests/gpu")
    done = run(sys.executable, "-c", BARE, *OWN, *chosen, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.findall(r"(\d+) tests collected", done.stdout)[0]) > 200


@pytest.mark.slow
@pytest.mark.minutes
def test_a_rehearsal_leaves_a_log_rows_and_plots(tmp_path: Path) -> None:
    done = script("--rehearse", out=tmp_path, timeout=420)
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
def test_a_worker_whose_context_is_dead_is_replaced(tmp_path: Path) -> None:
    """The failure is reported, and no other test is lost."""
    (tmp_path / "test_dead.py").write_text(DEAD, encoding="utf-8")
    (tmp_path / "conftest.py").write_text(
        "from tests.gpu.conftest import pytest_runtest_logfinish, pytest_runtest_logreport\n"
    )
    own = ("-n", "1", "-v", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path))
    done = run(sys.executable, "-m", "pytest", *own)
    for said in ("assert 1 == 2", "replacing crashed worker", "4 passed"):
        assert said in done.stdout


@pytest.mark.slow
def test_launches_are_listed_and_compiled_elsewhere(tmp_path: Path) -> None:
    """Those of the chosen tests, each once, without a path of this machine."""
    file = tmp_path / "launches.jsonl"

    def launches(*arguments: str) -> str:
        own = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "timeout": 300}
        done = python("-m", "tests.gpu.launches", *arguments, **own)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    chosen = "tests/gpu/test_parity.py::test_named_sizes[triton-t5-base-bfloat16]"
    launches("list", str(file), chosen)
    text = file.read_text(encoding="utf-8")
    assert sys.prefix not in text
    lines = text.splitlines()
    assert len(lines) == len(set(lines))
    kernels = [json.loads(line)["kernel"] for line in lines]
    assert {"reconstruct_forward_kernel", "splice_backward_kernel"} <= set(kernels)
    file.write_text("".join(f"{line}\n" for line in lines if "splice_finish_kernel" in line))
    assert "1 of 1 compiled" in launches("compile", str(file))
