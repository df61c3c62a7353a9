"""Two processes over gloo: DDP, FSDP2, and a run of the Trainer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ept_fast import EPTModel
from tests.distributed import run_fsdp, trainers
from tests.distributed.checks import assert_close, assert_equal, assert_within, cells
from tests.distributed.launch import ROOT, torchrun
from tests.distributed.tasks import (
    batch_of,
    gradients_of,
    make_backbone,
    make_model,
    trained,
    values_of,
)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

PROCESSES = 2


def run(script: str, folder: Path) -> Path:
    """Run a script to its end in two processes; the folder that it wrote to."""
    done = torchrun(str(ROOT / "tests" / "distributed" / script), str(folder))
    assert done.returncode == 0, f"{script}: {done.stdout[-2500:]}{done.stderr[-2500:]}"
    return folder


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What :mod:`tests.distributed.run_ddp` found."""
    return run("run_ddp.py", tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("name", ["whole", "parts", "recomputed"])
@pytest.mark.parametrize("task", cells("DDP"))
def test_ddp(task: str, name: str, ddp: Path) -> None:
    """The gradients of one process and the whole batch, the same in both to the bit."""
    expected = gradients_of(task, make_model(task), batch_of(task))
    first, second = (load_file(ddp / f"{task}-{name}-{rank}.safetensors") for rank in range(2))
    assert_close(first, expected)
    assert_equal(second, first)


def test_ddp_sends_what_is_trained(ddp: Path) -> None:
    """No buffer of the frozen model, no adapter that waits."""
    for rank in range(PROCESSES):
        facts = json.loads((ddp / f"facts-{rank}.json").read_text())
        assert facts["buffers"] > 0
        assert not facts["sends buffers"]
        assert facts["reduced"] == facts["trained"]
        assert not [name for name in facts["trained"] if "other" in name]


@pytest.mark.support(row="DDP", column=trainers.TASK)
@pytest.mark.support(row="Trainer", column=trainers.TASK)
def test_trainer_in_two_processes(ddp: Path, tmp_path: Path) -> None:
    """The weights of one process with batches of the same rows, and the same in both."""
    first, second = (load_file(ddp / "run" / f"end-{rank}.safetensors") for rank in range(2))
    assert_equal(second, first)
    start = values_of(make_model(trainers.TASK))
    with trainers.fresh_accelerate():
        alone = trainers.train(tmp_path, 1)
    for name, value in alone.items():
        moved = (value - start[name]).norm()
        assert (first[name] - value).norm() < 1e-3 * moved, name


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What :mod:`tests.distributed.run_fsdp` found."""
    return run("run_fsdp.py", tmp_path_factory.mktemp("fsdp"))


def facts_of(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"facts-{rank}.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("task", cells("FSDP2"))
def test_fsdp(task: str, fsdp: Path) -> None:
    """Gradients and weights after some steps are those of one process and the whole batch."""
    model = make_model(task)
    expected = gradients_of(task, model, batch_of(task))
    first, second = (load_file(fsdp / f"{task}-gradients-{rank}.safetensors") for rank in range(2))
    assert_close(first, expected)
    assert_equal(second, first)
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1, momentum=0.9)
    for _ in range(run_fsdp.STEPS):
        gradients_of(task, model, batch_of(task))
        optimizer.step()
    assert_close(load_file(fsdp / f"{task}-end-0.safetensors"), values_of(model))


@pytest.mark.parametrize("task", cells("FSDP2"))
def test_fsdp_files(task: str, fsdp: Path) -> None:
    """One process writes the whole adapter, for one process or for sharded ones to read."""
    first, second = (facts_of(fsdp, rank)[task] for rank in range(PROCESSES))
    assert first["files after an evaluation"] >= 3
    assert second["files after an evaluation"] == 0
    for facts in (first, second):
        assert facts["state"]
        assert facts["loaded"]
    end = load_file(fsdp / f"{task}-end-0.safetensors")
    model = EPTModel.from_pretrained(fsdp / task, make_backbone(task))
    assert_equal({n: p.detach() for n, p in model.named_parameters() if n in end}, end)


@pytest.mark.support(row="FSDP2", column="CAUSAL_LM")
@pytest.mark.parametrize("name", ["recomputed", "embedding", "bfloat16"])
def test_fsdp_in_other_ways(name: str, fsdp: Path) -> None:
    expected = gradients_of("CAUSAL_LM", make_model("CAUSAL_LM"), batch_of("CAUSAL_LM"))
    first, second = (load_file(fsdp / f"{name}-{rank}.safetensors") for rank in range(PROCESSES))
    assert_equal(second, first)
    if name == "bfloat16":
        assert_within(first, expected, torch.bfloat16)
    else:
        assert_close(first, expected)


@pytest.mark.support(row="FSDP2", column="CAUSAL_LM")
def test_fsdp_generates(fsdp: Path) -> None:
    batch = batch_of("CAUSAL_LM")
    expected = (
        make_model("CAUSAL_LM")
        .eval()
        .generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=3)
    )
    for rank in range(PROCESSES):
        assert torch.equal(load_file(fsdp / f"generated-{rank}.safetensors")["ids"], expected)


def test_fsdp_refusals(fsdp: Path) -> None:
    """If a process has a part of a tensor only, an error says so; no wrong value comes out."""
    sharded = r"ValueError: {}: expected a whole tensor, got one sharded by FSDP2: call the sharded"
    for rank in range(PROCESSES):
        found = facts_of(fsdp, rank)["refusals"]
        for name in ("reconstruct", "fold"):
            assert re.match(sharded.format("short_prompt"), found[name]), found[name]
        for name in ("prompt", "generate", "add_adapter"):
            assert re.match(sharded.format("embedding.weight"), found[name]), found[name]
    first, second = (facts_of(fsdp, rank)["refusals"]["save_pretrained"] for rank in range(2))
    assert first.startswith("WriteError: ")
    assert second.startswith("RuntimeError: save_pretrained: expected the process that writes")
