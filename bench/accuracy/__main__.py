"""The command line of the study."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import bench.accuracy
from bench.accuracy.packed import pack
from bench.accuracy.records import done_runs, read_records
from bench.accuracy.schedule import run_study
from bench.accuracy.study import METHODS, TASKS, Study, embedded_model
from bench.accuracy.tables import report
from bench.accuracy.timing import print_memory, time_methods
from bench.accuracy.worker import device_name


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; gives the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy",
        description=bench.accuracy.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = ("run", "timing", "report", "pack", "memory")
    parser.add_argument("command", choices=commands)
    parser.add_argument("--data", type=Path, help="folder with sst2, trec and cola")
    parser.add_argument("--model", help="folder or hub id; the embedded MiniLM if not given")
    parser.add_argument("--out", type=Path, default=Path("bench/results/accuracy"))
    parser.add_argument(
        "--device",
        help="cpu (if not given) or cuda; for report a part of the name of the device that the "
        "records are of, needed if they are of several",
    )
    parser.add_argument("--minutes", type=float, help="limit of run")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--method", choices=tuple(METHODS), help="for memory")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=200, help="of a final run, or of the timing")
    parser.add_argument("--grid-steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2, help="processes side by side")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    given = parser.parse_args(arguments)
    if given.command == "report":
        report(given.out, given.device)
        return 0
    if given.data is None:
        parser.error("--data: expected the folder with sst2, trec and cola")
    tasks = _names(parser, "--tasks", given.tasks, TASKS)
    if given.command == "pack":
        if given.out == parser.get_default("out"):
            parser.error("--out: expected a folder to pack into")
        size = pack(given.model or embedded_model(), given.data, given.out, tasks)
        print(f"{given.out}: {size / 2**20:.1f} MiB")
        return 0
    if given.device not in (None, "cpu", "cuda"):
        parser.error(f"--device: expected cpu or cuda, got {given.device!r}")
    study = Study(
        data=given.data,
        model=given.model or embedded_model(),
        out=given.out,
        tasks=tasks,
        methods=_names(parser, "--methods", given.methods, METHODS),
        seeds=tuple(int(seed) for seed in given.seeds.split(",")),
        steps=given.steps,
        grid_steps=given.grid_steps,
        batch_size=given.batch_size,
        workers=given.workers,
        threads=given.threads,
        device=given.device or "cpu",
        minutes=given.minutes,
    )
    if given.command == "run":
        status = run_study(study)
        device = device_name(study.device)
        records = done_runs(read_records(study.out), device).values()
        if any(record["kind"] == "final" for record in records):
            report(study.out, device)
        return status
    if study.device != "cpu":
        parser.error(f"--device: expected cpu for {given.command}, got {study.device}")
    if given.command == "timing":
        if "pt" not in study.methods:
            parser.error("--methods: expected pt among them, the ratios are to it")
        time_methods(study)
    else:
        print_memory(study, given.method or parser.error("--method: expected one"))
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
