"""The Trainer of transformers on the tiny models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor

from tests.distributed.tasks import batch_of, make_model, values_of

__all__ = ["TASK", "Rows", "fresh_accelerate", "make_trainer", "train"]


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The rows of a batch, one by one."""

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[index] for name, values in self.batch.items()}


def make_trainer(
    task: str, model: Any, folder: Path, kind: Any = transformers.Trainer, **choices: Any
) -> Any:
    """A short run: 32 rows, four steps, a checkpoint after every second.

    Args:
        task: of the model.
        model: the wrapped model.
        folder: where checkpoints go.
        kind: the class.
        **choices: further or other training arguments, and ``callbacks``.
    """
    callbacks = choices.pop("callbacks", None)
    seq2seq = kind is transformers.Seq2SeqTrainer
    arguments = transformers.Seq2SeqTrainingArguments if seq2seq else transformers.TrainingArguments
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **choices,
    }
    return kind(
        model,
        arguments(output_dir=str(folder), **settings),
        train_dataset=Rows(batch_of(task, 32, seed=1)),
        eval_dataset=Rows(batch_of(task, 8, seed=2)),
        callbacks=callbacks,
    )


TASK = "CAUSAL_LM"


def train(folder: Path, processes: int) -> dict[str, Tensor]:
    """The trained values at the end of a run of batches of 8 rows, over all processes."""
    model = make_model(TASK)
    rows = 8 // processes
    trainer = make_trainer(TASK, model, folder, max_steps=6, per_device_train_batch_size=rows)
    assert trainer.args.world_size == processes
    trainer.train()
    return values_of(model)


@contextmanager
def fresh_accelerate() -> Iterator[None]:
    """Forget accelerate's settings, which are the process's and outlive what made them."""
    _forget()
    try:
        yield
    finally:
        _forget()


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
