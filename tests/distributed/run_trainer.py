"""A run of transformers' Trainer in each of several processes, started by ``torchrun``.

``run_trainer.py FOLDER`` trains and writes ``FOLDER/end-RANK.safetensors``. With ``--pause STEP``
each process writes ``FOLDER/paused-RANK`` after that step and waits to be killed; with ``--resume``
it goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from tests.distributed.tasks import make_model, values_of
from tests.distributed.trainers import make_trainer

TASK = "CAUSAL_LM"
STEPS = 6
ROWS = 8  # of a batch, over all processes


class Pause(transformers.TrainerCallback):
    """Waits after a step, until the process is killed."""

    def __init__(self, folder: Path, step: int | None) -> None:
        self.folder, self.step = folder, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            (self.folder / f"paused-{args.process_index}").touch()
            while True:
                time.sleep(1)


def train(
    folder: Path, processes: int, *, pause: int | None = None, resume: bool = False
) -> dict[str, Tensor]:
    """The trained values at the end of a run."""
    model = make_model(TASK)
    trainer = make_trainer(
        TASK,
        model,
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=ROWS // processes,
        callbacks=[Pause(folder, pause)],
    )
    assert trainer.args.world_size == processes
    trainer.train(resume_from_checkpoint=resume)
    return values_of(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pause", type=int)
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args()
    processes = int(os.environ["WORLD_SIZE"])
    end = train(given.folder, processes, pause=given.pause, resume=given.resume)
    save_file(end, given.folder / f"end-{os.environ['RANK']}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
