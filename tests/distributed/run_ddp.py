"""Gradients under DistributedDataParallel, and a run of the Trainer; started by ``torchrun``.

``run_ddp.py FOLDER`` writes what each process found to ``FOLDER/NAME-RANK.safetensors``.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from tests.distributed import trainers
from tests.distributed.launch import share, together
from tests.distributed.tasks import (
    OVER_TOKENS,
    TASKS,
    batch_of,
    count_of,
    gradients,
    loss_of,
    make_model,
    part,
    trained,
)


def backward(task: str, model: Any, batch: dict[str, torch.Tensor], of: slice) -> None:
    """The part of the gradient of the batch's mean loss that belongs to these rows.

    DDP takes the mean over processes, so losses over tokens, whose numbers differ between the
    processes, are divided by the number of all and multiplied by that of the processes.
    """
    rows = part(batch, of)
    if task in OVER_TOKENS:
        items = torch.tensor(count_of(task, batch))
        loss = model(**rows, num_items_in_batch=items).loss * dist.get_world_size()
    else:
        loss = loss_of(task, model, rows) * len(rows["input_ids"]) * dist.get_world_size()
        loss = loss / len(batch["input_ids"])
    loss.backward()


def gradients_of(task: str, *, recompute: bool, accumulate: bool) -> Any:
    model = make_model(task)
    if dist.get_rank():
        with torch.no_grad():  # DDP takes those of the first process
            for parameter in trained(model).values():
                parameter += 1
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped = DistributedDataParallel(model)
    batch = batch_of(task)
    if accumulate:
        # The rows of the whole batch in the order of the processes, two at a time.
        first = dist.get_rank() * 4
        with wrapped.no_sync():
            backward(task, wrapped, batch, slice(first, first + 2))
        backward(task, wrapped, batch, slice(first + 2, first + 4))
    else:
        backward(task, wrapped, batch, share())
    return gradients(model)


def facts() -> dict[str, Any]:
    """What DDP does with the frozen model, and with an adapter that is not active."""
    model = make_model("SEQ_CLS")
    model.add_adapter("other", model.prompt.config)
    wrapped = DistributedDataParallel(model)
    wrapped(**part(batch_of("SEQ_CLS"), slice(0, 4))).loss.backward()
    return {
        "buffers": len(list(model.buffers())),
        "sends buffers": wrapped.will_sync_module_buffers(),
        "reduced": sorted(n for n, p in model.named_parameters() if p.grad is not None),
        "trained": sorted(trained(model)),
    }


def main() -> None:
    with together() as (folder, rank):
        for task in TASKS:
            for name, choices in {
                "whole": {"recompute": False, "accumulate": False},
                "parts": {"recompute": False, "accumulate": True},
                "recomputed": {"recompute": True, "accumulate": False},
            }.items():
                found = gradients_of(task, **choices)
                save_file(found, folder / f"{task}-{name}-{rank}.safetensors")
        (folder / f"facts-{rank}.json").write_text(json.dumps(facts()))
        run = folder / "run"
        run.mkdir(exist_ok=True)
        save_file(trainers.train(run, dist.get_world_size()), run / f"end-{rank}.safetensors")


if __name__ == "__main__":
    main()
