"""A model sharded by FSDP2, its adapter's files, and what it refuses; started by ``torchrun``.

``run_fsdp.py FOLDER`` writes what each process found to ``FOLDER/NAME-RANK.safetensors``, the
adapters to ``FOLDER/TASK``, and facts to ``FOLDER/facts-RANK.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from transformers.modeling_layers import GradientCheckpointingLayer

import ept_fast.storage.files
from tests.distributed.launch import share, together
from tests.distributed.run_ddp import backward
from tests.distributed.tasks import TASKS, batch_of, gradients, make_model, part, trained

STEPS = 3


def processes() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def shard(model: Any, **choices: Any) -> Any:
    """Each layer of the backbone a unit, and one of all the rest: prompt, head, embeddings."""
    mesh = processes()
    for module in model.backbone.modules():
        if isinstance(module, GradientCheckpointingLayer):
            fully_shard(module, mesh=mesh, **choices)
    return fully_shard(model, mesh=mesh, **choices)


def whole(tensors: dict[str, Any]) -> dict[str, Tensor]:
    assert all(type(tensor).__name__ == "DTensor" for tensor in tensors.values())
    return {name: tensor.full_tensor() for name, tensor in tensors.items()}


def gradients_of(task: str, model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    backward(task, model, batch_of(task), share())
    return whole(gradients(model))


def refusal(call: Callable[[], Any]) -> str:
    """What an error says; of no error, nothing."""
    try:
        call()
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def files_written(call: Callable[[], Any]) -> int:
    """How many files this process puts in place."""
    with mock.patch.object(
        ept_fast.storage.files.os, "replace", wraps=ept_fast.storage.files.os.replace
    ) as replace:
        call()
    return replace.call_count


def train(task: str, folder: Path) -> dict[str, Any]:
    """Gradients, a few steps, the adapter's files, and the files read back."""
    model = shard(make_model(task))
    rank = dist.get_rank()
    save_file(gradients_of(task, model), folder / f"{task}-gradients-{rank}.safetensors")
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1, momentum=0.9)
    for _ in range(STEPS):
        gradients_of(task, model)
        optimizer.step()
    end = whole(trained(model))
    save_file(end, folder / f"{task}-end-{rank}.safetensors")
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    found: dict[str, Any] = {
        "state": sorted(state) == sorted(end) and all(torch.equal(state[n], end[n]) for n in state),
        # As a forward pass leaves it, with the root's tensors whole.
        "files after an evaluation": 0,
        "loaded": False,
    }
    with torch.no_grad():
        model.eval()(**part(batch_of(task), share()))
    found["files after an evaluation"] = files_written(lambda: model.save_pretrained(folder / task))
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.zero_()
        model(**part(batch_of(task), share()))
    model.load_pretrained(folder / task)
    loaded = whole(trained(model))
    found["loaded"] = all(torch.equal(loaded[name], end[name]) for name in end)
    return found


def other_ways(folder: Path) -> None:
    """Recomputed, in bfloat16, and with the embedding layer a unit of its own."""
    task, rank = "CAUSAL_LM", dist.get_rank()
    model = make_model(task)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    save_file(gradients_of(task, shard(model)), folder / f"recomputed-{rank}.safetensors")
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(make_model(task), mp_policy=half)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    save_file(gradients_of(task, model), folder / f"bfloat16-{rank}.safetensors")
    model = make_model(task)
    fully_shard(model.get_input_embeddings(), mesh=processes())
    save_file(gradients_of(task, shard(model)), folder / f"embedding-{rank}.safetensors")


def generated(folder: Path) -> None:
    model = shard(make_model("CAUSAL_LM")).eval()
    register_fsdp_forward_method(model, "generate")
    batch = batch_of("CAUSAL_LM")
    ids = model.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=3)
    save_file({"ids": ids}, folder / f"generated-{dist.get_rank()}.safetensors")


def refusals(folder: Path) -> dict[str, str]:
    model = shard(make_model("CAUSAL_LM"))
    batch = batch_of("CAUSAL_LM")
    file = folder / "file"
    if dist.get_rank() == 0:
        file.touch()
    dist.barrier()
    return {
        "reconstruct": refusal(model.prompt.reconstruct),
        "fold": refusal(model.fold),
        "prompt": refusal(lambda: model.prompt(batch["input_ids"])),
        "generate": refusal(lambda: model.generate(batch["input_ids"], max_new_tokens=1)),
        "add_adapter": refusal(lambda: model.add_adapter("other", model.prompt.config)),
        "save_pretrained": refusal(lambda: model.save_pretrained(file / "below")),
    }


def main() -> None:
    with together() as (folder, rank):
        facts: dict[str, Any] = {task: train(task, folder) for task in TASKS}
        other_ways(folder)
        generated(folder)
        facts["refusals"] = refusals(folder)
        (folder / f"facts-{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
