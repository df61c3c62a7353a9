"""The folder of a run: who may use it, what is in it, and whether a run in it is the same."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ept_fast.storage.files import CheckpointError, WriteError, read_json, write_json, writing

__all__ = ["LOCK_FILE", "METRICS_FILE", "begin", "check_output", "held", "metrics_of"]

LOCK_FILE = ".ept-fast.lock"
RUN_FILE = "run.json"
METRICS_FILE = "metrics.json"
_OUR_FOLDERS = ("adapter", "best", "checkpoints", "logs")
# Settings that may change when a run goes on: those of how long it is, which makes it another one,
# and those that decide no weight.
_LENGTH = ("max_steps", "epochs", "early_stopping_patience", "early_stopping_threshold")
_FREE = ("output", "trust_remote_code", "report_to")
_OUR_FILES = (RUN_FILE, METRICS_FILE, "learning_curves.png", "gate_weights.png", "samples.md")


@contextlib.contextmanager
def held(output: Path) -> Iterator[None]:
    """Keep other runs out of the folder. If nothing was put into it, it goes again."""
    from filelock import FileLock, Timeout

    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output: expected a folder, got the file {output}")
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    path = output / LOCK_FILE
    lock = FileLock(path)  # of the operating system: it ends with the process, however that ends
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FileExistsError(
            f"output: expected a folder that no other run is using, got {output} "
            f"(a run is going on there)"
        ) from None
    except OSError as error:
        raise WriteError(path, error) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a folder with files in it stays
            path.unlink()  # while it is held, so that it is nobody else's
            for folder in made:
                folder.rmdir()
        lock.release()


def begin(output: Path, run: dict[str, Any], overwrite: bool) -> None:
    if overwrite:
        for name in _OUR_FILES:
            (output / name).unlink(missing_ok=True)
        for name in _OUR_FOLDERS:
            shutil.rmtree(output / name, ignore_errors=True)
    (output / METRICS_FILE).unlink(missing_ok=True)  # of a run that is longer now
    write_json(output / RUN_FILE, run)


def check_output(output: Path, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ValueError("resume, overwrite: expected one of them, got both")
    files = {path.name for path in output.iterdir()} - {LOCK_FILE}
    if files and not (resume or overwrite):
        raise FileExistsError(
            f"output: expected an empty folder, got {output} with files in it "
            f"(resume the run, or overwrite it)"
        )
    if resume and files and RUN_FILE not in files:
        raise FileExistsError(f"output: expected a run to resume, got {output} without {RUN_FILE}")


def metrics_of(output: Path, run: dict[str, Any]) -> dict[str, Any] | None:
    """What a finished run found, which must be this very run; None of one that is to go on.

    A run of another length is to go on, from a checkpoint of the finished one.
    """
    path = output / RUN_FILE
    if not path.exists():
        return None
    saved = read_json(path)
    try:
        old = {**saved["config"], "WORLD_SIZE": saved["processes"]}
        same_rows = saved["data"] == run["data"]
    except (KeyError, TypeError):
        raise CheckpointError(f"{path}: expected the description of a run, got others") from None
    for name, new in {**run["config"], "WORLD_SIZE": run["processes"]}.items():
        if name not in (*_LENGTH, *_FREE) and old.get(name) != new:
            raise ValueError(
                f"{name}: expected {old.get(name)!r} as in the run to resume, got {new!r}"
            )
    if not same_rows:
        raise ValueError("data: expected the rows of the run to resume, got others")
    if saved.get("start") != run["start"]:
        raise ValueError("start_from: expected the prompt of the run to resume, got another")
    metrics = output / METRICS_FILE
    same_length = all(old.get(name) == run["config"][name] for name in _LENGTH)
    return read_json(metrics) if same_length and metrics.exists() else None
