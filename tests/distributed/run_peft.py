"""A script for ``accelerate launch``: transformers' Trainer on a PeftModel with an EPT prompt."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import transformers
from peft import get_peft_model

from ept_fast.peft import EPTPeftConfig
from tests.distributed.trainers import Rows


def train(llama: Path, folder: Path, processes: int) -> None:
    """Six steps with 8 rows each, over all processes; the adapter goes to ``folder``."""
    backbone = transformers.AutoModelForCausalLM.from_pretrained(llama)
    torch.manual_seed(4)
    sizes = {"num_virtual_tokens": 3, "max_length": 40, "rank": 2, "num_spaces": 2}
    model = get_peft_model(backbone, EPTPeftConfig(task_type="CAUSAL_LM", **sizes))
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 30, (32, 7), generator=draw)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=8 // processes,
        learning_rate=1e-2,
        optim="sgd",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=Rows({"input_ids": ids, "labels": ids})
    )
    assert arguments.world_size == processes
    trainer.train()
    if trainer.is_world_process_zero():
        model.save_pretrained(str(folder))


if __name__ == "__main__":
    warnings.simplefilter("default")
    train(Path(sys.argv[1]), Path(sys.argv[2]), 2)
