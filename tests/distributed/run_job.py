"""Trains the runs of ``FOLDER/jobs.json`` one after another; started by ``torchrun``.

``run_job.py FOLDER`` writes what each process got of each run to ``FOLDER/outcomes-RANK.json``. If
a job says so, rank 1 dies or comes late, another run holds the folder, or the main process cannot
write a file.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from ept_fast.storage import files
from ept_fast.training.config import TrainConfig
from ept_fast.training.folder import LOCK_FILE
from ept_fast.training.job import train
from ept_fast.training.trainer import PromptTrainer
from tests.distributed.launch import together

PLAIN_STEP, PLAIN_MKSTEMP = PromptTrainer.training_step, files.tempfile.mkstemp


def dying(trainer: Any, *args: Any, **kwargs: Any) -> Any:
    if trainer.state.global_step == 5 and trainer.args.process_index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return PLAIN_STEP(trainer, *args, **kwargs)


def without_room_for(name: str) -> Callable[..., Any]:
    def full(*args: Any, prefix: str, **kwargs: Any) -> Any:
        if prefix == f".{name}.":
            raise OSError(28, "No space left on device")
        return PLAIN_MKSTEMP(*args, prefix=prefix, **kwargs)

    return full


def do(job: dict[str, Any], number: int, rank: int) -> list[Any]:
    """The kind of what came out, and the loss or the error's message."""
    settings = {name: v[rank] if isinstance(v, list) else v for name, v in job["run"].items()}
    output = Path(settings["output"])
    if job.get("late") and rank == 1:
        end = time.monotonic() + 3  # if the other one does not wait, its folder is there by then
        while not output.exists() and time.monotonic() < end:
            time.sleep(0.01)
    if job.get("uneven"):
        time.sleep(random.Random(2 * number + rank).uniform(0, 0.2))
    other = FileLock(output / LOCK_FILE)
    if job.get("held") and rank == 0:
        other.acquire()
    PromptTrainer.training_step = dying if job.get("dies") else PLAIN_STEP  # type: ignore[method-assign]
    files.tempfile.mkstemp = without_room_for(job["full"]) if "full" in job else PLAIN_MKSTEMP
    try:
        metrics = train(TrainConfig(**settings), progress=False, **job.get("how", {}))
        assert metrics["processes"] == 2
        return ["metrics", metrics["after"]["loss"]]
    except Exception as error:
        return [type(error).__name__, str(error)]
    finally:
        other.release()


def main() -> None:
    torch.set_num_threads(1)
    outcomes = []
    with together() as (folder, rank):
        for number, job in enumerate(json.loads((folder / "jobs.json").read_text())):
            outcomes.append(do(job, number, rank))
            (folder / f"outcomes-{rank}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
