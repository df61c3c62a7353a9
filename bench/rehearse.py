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
import csv
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import stand_ins

ROOT = Path(__file__).parent.parent
PINS = ROOT / "requirements-gpu.txt"
RECORDS = ROOT / "bench" / "results" / "compiled"
TARGET = "sm_90"
_FIELDS = ("kernel", "types", "target", "shape", "rule", "text")
_PYTEST = (sys.executable, "-m", "pytest", "--collect-only", "-q")
_SIGN_OF_LIFE = 30  # seconds
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
    """Run a command within its limit of seconds; its exit status and what it printed."""
    log = options.out / f"{name}.log"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    print(f"   at most {limit} s: {' '.join(map(str, arguments))}", flush=True)
    began = time.monotonic()
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
            status = _wait(process, name, began, limit)
        finally:
            if process.poll() is None:
                # With what it started.
                os.killpg(process.pid, 9)
                process.wait()
    return status, log.read_text(errors="replace")


def _wait(process: subprocess.Popen[bytes], name: str, began: float, limit: int) -> int:
    while True:
        passed = time.monotonic() - began
        if passed >= limit:
            raise Failed(f"{name}: out of time after {limit} s")
        try:
            return process.wait(min(_SIGN_OF_LIFE, limit - passed))
        except subprocess.TimeoutExpired:
            print(f"   {name}: {time.monotonic() - began:.0f} s", flush=True)


def succeed(
    options: Options, name: str, limit: int, arguments: Sequence[str | Path], **variables: str
) -> str:
    """What a command printed that has to end with 0."""
    status, text = command(options, name, limit, arguments, **variables)
    if status:
        print("\n".join(text.splitlines()[-_TAIL:]), flush=True)
        raise Failed(f"{name}: exit status {status}")
    return text


# What is known of the compiled code

Finding = dict[str, str]


def _key(finding: Finding) -> tuple[str, ...]:
    return tuple(finding[name] for name in _FIELDS if name != "text")


def compare(found: Iterable[Finding], recorded: Iterable[Finding]) -> dict[str, list[Finding]]:
    """Findings that are new, gone, changed (recorded with another text) or the same."""
    now = {_key(one): one for one in found}
    before = {_key(one): one for one in recorded}
    both = [now[key] for key in now if key in before]
    return {
        "new": [now[key] for key in now if key not in before],
        "gone": [before[key] for key in before if key not in now],
        "changed": [one for one in both if one["text"] != before[_key(one)]["text"]],
        "same": [one for one in both if one["text"] == before[_key(one)]["text"]],
    }


def read_record(path: Path) -> list[Finding]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_record(path: Path, found: Iterable[Finding]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, _FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: one[name] for name in _FIELDS} for one in sorted(found, key=_key))


# Versions


def machine(pins: Path = PINS) -> dict[str, str]:
    """The versions on the GPU machine: the pins, and what the lines that begin with #= say."""
    lines = re.findall(r"^(?:#= )?([\w-]+)==(\S+)$", pins.read_text(), re.MULTILINE)
    return dict(lines)  # a line with #= follows the pin that it corrects


def installed(name: str) -> str:
    """The version here; empty if the package is missing."""
    if name == "python":
        return platform.python_version()
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def version_differences(pins: Path = PINS) -> list[str]:
    return [
        f"{name}: {installed(name) or 'missing'} here, {version} on the machine"
        for name, version in machine(pins).items()
        if installed(name) != version
    ]


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
    record = RECORDS / f"findings-{content['triton']}.csv"
    groups = compare(content["findings"], read_record(record))
    for name in ("new", "gone", "changed"):
        for one in groups[name]:
            print(f"   {name}: {' '.join(one[field] for field in _FIELDS)}")
    counts = ", ".join(f"{len(group)} {name}" for name, group in groups.items())
    text = f"{content['compilations']} compilations for {TARGET}; findings: {counts}"
    if options.write:
        write_record(record, content["findings"])
        return f"{text}; {record.name} is written"
    if groups["new"]:
        raise Failed(text)
    if groups["gone"] or groups["changed"]:
        text += "; renew the record: python -m bench.rehearse compile --write"
    return text


def collect(options: Options) -> str:
    own = ("-c", "tests/gpu/pytest.ini", "--rootdir", "tests/gpu", "--confcutdir", "tests/gpu")
    plain = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # as in bench/on_gpu.sh
    tests = succeed(options, "collect-tests", 180, (*_PYTEST, *own, "tests/gpu"), **plain)
    plugin = ("-p", "pytest_benchmark.plugin")
    rows = succeed(
        options, "collect-bench", 180, (*_PYTEST, *plugin, "bench/", "--device", "cuda"), **plain
    )
    counts = [re.search(r"(\d+)(?:/\d+)? tests? collected", text) for text in (tests, rows)]
    if counts[0] is None or counts[1] is None:
        raise Failed("pytest did not say how many tests it collected: see collect-*.log")
    return f"{counts[0][1]} tests of tests/gpu, {counts[1][1]} rows of bench/"


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
    for name in names:
        print(f"== {name}", flush=True)
        began = time.monotonic()
        try:
            found, failed = STEPS[name](options), False
        except Exception as error:  # the later steps still run
            found, failed = str(error) if isinstance(error, Failed) else repr(error), True
        seconds = time.monotonic() - began
        table.append((name, "FAILED: " + found if failed else found, seconds, failed))
        print(f"   {table[-1][1]}", flush=True)
    width = max(len(found) for _, found, _, _ in table)
    print(f"\n{'step':13} {'found':{width}} seconds")
    for name, found, seconds, _ in table:
        print(f"{name:13} {found:{width}} {seconds:7.0f}")
    return int(any(failed for *_, failed in table))


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
