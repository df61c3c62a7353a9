"""What a GPU machine will run, tried on a CPU with that machine's versions: ``make rehearse-gpu``.

``python -m bench.rehearse [STEP ...]`` runs the steps, or those named. One that fails does not stop
those after it. The output of each command goes into a file of ``--out``.

    compile        the kernels for sm_90, and the rules that their code breaks, beside the record
    collect        the GPU tests and the benchmarks are listed as they are on a GPU
    first-contact  ``python -m bench.first_contact --rehearse``
    on-gpu         ``bench/on_gpu.sh --rehearse``
    differences    how this environment differs from the machine, and what could not be tried

The record is a file of ``bench/results/compiled`` for each version of Triton. A finding that is not
in it fails the step; one that is gone or reads differently is named. ``--write`` renews the record.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from bench import stand_ins
from bench.rows import aligned, read_csv, write_csv

ROOT = Path(__file__).parent.parent
PINS = ROOT / "requirements-gpu.txt"
RECORDS = ROOT / "bench" / "results" / "compiled"
TARGET = "sm_90"
_KEY = ("kernel", "types", "target", "shape", "rule")
_PYTEST = (sys.executable, "-m", "pytest", "--collect-only", "-q")
_TAIL = 25  # lines of a failed command


class Failed(Exception):
    """A step failed; the text is what was found."""


@dataclass(frozen=True)
class Options:
    """``out``: the folder of the logs; ``write``: whether the record is renewed."""

    out: Path
    write: bool = False


# Commands


def command(
    options: Options, name: str, limit: int, arguments: Sequence[str | Path], **variables: str
) -> tuple[int, str]:
    """Run a command within its limit of seconds; its exit status and what it printed.

    Raises:
        Failed: it is out of time; it and what it started are killed.
    """
    log = options.out / f"{name}.log"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    print(f"   at most {limit} s: {' '.join(map(str, arguments))}", flush=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env=environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            raise Failed(f"{name}: out of time after {limit} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
    return status, log.read_text(errors="replace")


def succeed(
    options: Options, name: str, limit: int, arguments: Sequence[str | Path], **variables: str
) -> str:
    """What a command printed that has to end with 0."""
    status, text = command(options, name, limit, arguments, **variables)
    if status:
        print("\n".join(text.splitlines()[-_TAIL:]), flush=True)
        raise Failed(f"{name}: exit status {status}")
    return text


# Findings: a text for each kernel, types, target, shape and rule


def read_record(path: Path) -> dict[tuple[str, ...], str]:
    """The findings of a file; none if there is no file."""
    if not path.is_file():
        return {}
    return {tuple(one[n] for n in _KEY): one["text"] for one in read_csv(path)}


# Versions


def version_differences(pins: Path = PINS) -> list[str]:
    """Where this environment is not as the pins, and what the lines that begin with #= say."""
    lines = re.findall(r"^(?:#= )?([\w-]+)==(\S+)$", pins.read_text(), re.MULTILINE)
    found = []
    for name, version in dict(lines).items():  # a line with #= follows the pin that it corrects
        try:
            here = platform.python_version() if name == "python" else metadata.version(name)
        except metadata.PackageNotFoundError:
            here = "missing"
        if here != version:
            found.append(f"{name}: {here} here, {version} on the machine")
    return found


# Steps: each returns what it found


def compile_kernels(options: Options) -> str:
    report = options.out / "compiled.json"
    run = (sys.executable, "-m", "bench.compiled", "--target", TARGET)
    jobs = str(os.cpu_count() or 1)
    # It ends with 1 if there are findings, which are judged here.
    command(options, "compile", 900, (*run, "--jobs", jobs, "--json", report))
    if not report.is_file():
        raise Failed("bench.compiled left no report: see compile.log")
    content = json.loads(report.read_text())
    found = {tuple(one[n] for n in _KEY): one["text"] for one in content["findings"]}
    record = RECORDS / f"findings-{content['triton']}.csv"
    known = read_record(record)
    for name, one, other in (("found", found, known), ("recorded", known, found)):
        for key, said in one.items():
            if other.get(key) != said:
                print(f"   {name}: {' '.join(key)}: {said}")
    new = len(found.keys() - known.keys())
    text = f"{content['compilations']} compilations for {TARGET}; {len(found)} findings, {new} new"
    if options.write:
        rows = [dict(zip((*_KEY, "text"), (*k, v), strict=True)) for k, v in sorted(found.items())]
        write_csv(record, (*_KEY, "text"), rows)
        return f"{text}; {record.name} is written"
    if new:
        raise Failed(text)
    if found != known:
        text += "; renew the record: python -m bench.rehearse compile --write"
    return text


def collect(options: Options) -> str:
    own = "-c tests/gpu/pytest.ini --rootdir tests/gpu --confcutdir tests/gpu tests/gpu"
    listings = {
        "tests": own,
        "bench": "-p pytest_benchmark.plugin bench/ --device cuda",
    }
    counts = {}
    for name, arguments in listings.items():
        run = (*_PYTEST, *arguments.split())
        # As in bench/on_gpu.sh.
        text = succeed(options, f"collect-{name}", 180, run, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
        (counts[name],) = re.findall(r"(\d+)(?:/\d+)? tests? collected", text)
    return f"{counts['tests']} tests of tests/gpu, {counts['bench']} rows of bench/"


def first_contact(options: Options) -> str:
    run = (sys.executable, "-m", "bench.first_contact", "--rehearse")
    succeed(options, "first-contact", 300, (*run, "--out", options.out / "first-contact"))
    return "passed"


def on_gpu(options: Options) -> str:
    out = {"PYTHON": sys.executable, "OUT": str(options.out / "on-gpu")}
    text = succeed(options, "on-gpu", 480, ("bash", "bench/on_gpu.sh", "--rehearse"), **out)
    stages = re.findall(r"^(\S+) +passed in \d+ s$", text, re.MULTILINE)
    return f"passed: {', '.join(stages)}"


def differences(options: Options) -> str:
    import torch

    lines = version_differences()
    if stand_ins.present():
        lines.append("NVIDIA's libraries: only stand-ins, so torch's CUDA build calls none of them")
    elif torch.version.cuda is None:
        lines.append("torch: a build without CUDA")
    if not torch.cuda.is_available():
        lines.append(
            "no GPU: kernels ran in Triton's interpreter; CUDA kernels, CUDA graphs, streams,"
            " times and large sizes were not tried"
        )
    missing = [tool for tool in ("compute-sanitizer", "nvcc") if shutil.which(tool) is None]
    if missing:
        lines.append(f"not on the PATH: {', '.join(missing)}")
    for line in lines:
        print(f"   {line}")
    return f"{len(lines)} differences from the machine"


STEPS: dict[str, Callable[[Options], str]] = {
    "compile": compile_kernels,
    "collect": collect,
    "first-contact": first_contact,
    "on-gpu": on_gpu,
    "differences": differences,
}


def run(names: Sequence[str], options: Options) -> int:
    """Run the steps and print a table; 1 if one failed."""
    table = []
    failed = 0
    for name in names:
        print(f"== {name}", flush=True)
        began = time.monotonic()
        try:
            found = STEPS[name](options)
        except Exception as error:  # the later steps still run
            found = f"FAILED: {error if isinstance(error, Failed) else repr(error)}"
            failed = 1
        print(f"   {found}", flush=True)
        table.append((name, found, f"{time.monotonic() - began:.0f}"))
    print("\n".join(["", *aligned(("step", "found", "seconds"), table)]))
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.rehearse", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)} (all)")
    parser.add_argument("--out", type=Path, help="folder of the logs (a temporary one)")
    parser.add_argument("--write", action="store_true", help="renew the record of findings")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.steps if name not in STEPS]
    if unknown:
        parser.error(f"STEP: expected some of {', '.join(STEPS)}, got {', '.join(unknown)}")
    out = (given.out or Path(tempfile.mkdtemp(prefix="rehearse-"))).absolute()
    out.mkdir(parents=True, exist_ok=True)
    status = run(given.steps or list(STEPS), Options(out, given.write))
    print(f"logs in {out}")
    return status


if __name__ == "__main__":
    sys.exit(main())
