"""Runs side by side in processes of their own, up to a limit of minutes."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from bench.accuracy.records import append_record, done_runs, read_records
from bench.accuracy.study import Records, Run, Study, next_runs, runs_left
from bench.accuracy.worker import device_name, serve

MOST_FAILURES = 3  # of runs, before the study gives up

# Exit statuses.
ALL_DONE = 0
FAILED = 1
RUNS_LEFT = 3


@dataclass(eq=False)
class _Worker:
    """A process and the run that it is at."""

    process: SpawnProcess
    pipe: Connection
    run: Run | None = None

    def stop(self) -> None:
        """End the process, whatever it is at."""
        self.process.terminate()
        self.process.join()
        self.pipe.close()


def run_study(study: Study, target: Callable[..., None] = serve) -> int:
    """Do the runs that are not recorded yet, and record each as soon as it ends.

    A process that dies or raises fails its run; the study goes on without that run, in a new
    process, up to ``MOST_FAILURES``. At the limit of minutes the runs under way are given up.

    Args:
        study: what to do.
        target: what a process does; it takes a pipe and the study.

    Returns:
        The exit status: ``ALL_DONE``, ``FAILED`` or ``RUNS_LEFT``.
    """
    schedule = _Schedule(study, target)
    start = time.monotonic()
    minutes = study.minutes
    left = schedule.left()
    _say(
        f"{schedule.device}: {left} runs to do, {study.workers} at a time; "
        f"{len(schedule.done)} recorded before"
        + ("" if minutes is None else f"; limit {minutes:g} minutes")
    )
    try:
        cut = schedule.loop(None if minutes is None else start + 60 * minutes)
    finally:
        for worker in schedule.workers:
            worker.stop()
    left = schedule.left()
    _say(
        f"{len(schedule.finished)} done in {(time.monotonic() - start) / 60:.1f} minutes, "
        f"{left} left" + (", at the limit" if cut and left else "")
    )
    if schedule.failed:
        return FAILED
    return RUNS_LEFT if left else ALL_DONE


class _Schedule:
    def __init__(self, study: Study, target: Callable[..., None]) -> None:
        self.study, self.target = study, target
        self.device = device_name(study.device)
        self.done: Records = done_runs(read_records(study.out), self.device)
        self.failed: set[Run] = set()
        self.workers: list[_Worker] = []
        self.finished: list[dict[str, Any]] = []  # in this call

    def loop(self, limit: float | None) -> bool:
        """Give the workers runs and take their records; True at the limit."""
        while True:
            if limit is not None and time.monotonic() >= limit:
                return True
            self.give()
            busy = {worker.pipe: worker for worker in self.workers if worker.run is not None}
            if not busy:
                return False
            rest = None if limit is None else max(limit - time.monotonic(), 0)
            for pipe in wait(list(busy), rest):
                self.take(busy[pipe])  # type: ignore[index]

    def give(self) -> None:
        """Start what can start."""
        if len(self.failed) >= MOST_FAILURES:
            return
        running = {worker.run for worker in self.workers}
        for run in next_runs(self.study, self.done):
            if run in running or run in self.failed:
                continue
            worker = next((worker for worker in self.workers if worker.run is None), None)
            if worker is None:
                if len(self.workers) >= self.study.workers:
                    return
                worker = self.start()
            with contextlib.suppress(OSError):  # it died idle; its pipe tells of that
                worker.pipe.send(run)
            worker.run = run

    def start(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=self.target, args=(theirs, self.study), daemon=True)
        process.start()
        theirs.close()  # so that ours tells of the process's end
        worker = _Worker(process, ours)
        self.workers.append(worker)
        return worker

    def take(self, worker: _Worker) -> None:
        """Record the run that a worker has finished, or that it failed in."""
        run = worker.run
        assert run is not None
        try:
            record = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join(10)  # its status is its own if it has ended itself
            worker.stop()
            self.workers.remove(worker)
            self.failed.add(run)
            status = worker.process.exitcode
            _say(f"{_now()} failed: {_words(run)}, the process ended with status {status}")
            return
        worker.run = None
        append_record(self.study.out, record)
        self.done[run.key] = record
        self.finished.append(record)
        _say(f"{_now()} {_words(run)} {record['seconds']:.0f} s; {self.outlook()}")

    def left(self) -> int:
        return runs_left(self.study, self.done)

    def outlook(self) -> str:
        """How much is left, and for how long, by the runs of this call."""
        left = self.left()
        mean = sum(record["seconds"] for record in self.finished) / len(self.finished)
        return f"{left} left, about {mean * left / self.study.workers / 60:.1f} minutes"


def _say(text: str) -> None:
    print(text, flush=True)


def _now() -> str:
    return time.strftime("%H:%M:%S")


def _words(run: Run) -> str:
    return f"{run.kind:6} {run.part} {run.task} {run.method} {run.setting} seed {run.seed}"
