"""The command line of the study."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import bench.accuracy
from bench.accuracy.packed import pack
from bench.accuracy.schedule import run_study
from bench.accuracy.study import PARTS, Study, embedded_model, files_of
from bench.accuracy.tables import report

COMMANDS = ("run", "report", "pack")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; gives the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy",
        description=bench.accuracy.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--data", type=Path, help="folder with few_shot, sst2, trec and rte")
    parser.add_argument("--model", help="folder or hub id; the embedded MiniLM if not given")
    parser.add_argument("--out", type=Path, default=Path("bench/results/accuracy"))
    parser.add_argument(
        "--device",
        help="cpu (if not given) or cuda; for report a part of the name of the device that the "
        "records are of, needed if they are of several",
    )
    parser.add_argument("--minutes", type=float, help="limit of run")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--tasks", help="all if not given")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all steps")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--workers", type=int, default=2, help="processes side by side")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    given = parser.parse_args(arguments)
    if given.command == "report":
        report(given.out, given.device)
        return 0
    if given.data is None:
        parser.error("--data: expected the folder with few_shot, sst2, trec and rte")
    if given.device not in (None, "cpu", "cuda"):
        parser.error(f"--device: expected cpu or cuda, got {given.device!r}")
    parts = _names(parser, "--parts", given.parts, PARTS)
    tasks = None
    if given.tasks is not None:
        known = {task for part in parts for task in PARTS[part].tasks}
        tasks = _names(parser, "--tasks", given.tasks, sorted(known))
    study = Study(
        data=given.data,
        model=given.model or embedded_model(),
        out=given.out,
        parts=parts,
        tasks=tasks,
        workers=given.workers,
        threads=given.threads,
        device=given.device or "cpu",
        minutes=given.minutes,
        scale=given.scale,
        dtype=given.dtype,
    )
    if given.command == "run":
        return run_study(study)
    if given.out == parser.get_default("out"):
        parser.error("--out: expected a folder to pack into")
    size = pack(study.model, given.data, given.out, files_of(study))
    print(f"{given.out}: {size / 2**20:.1f} MiB")
    return 0


def _names(
    parser: argparse.ArgumentParser, option: str, text: str, known: Iterable[str]
) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        parser.error(f"{option}: expected names among {', '.join(known)}, got {text!r}")
    return names


if __name__ == "__main__":
    sys.exit(main())
