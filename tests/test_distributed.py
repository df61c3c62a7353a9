"""Two processes over gloo: DDP, FSDP2, and a run of the Trainer that is killed and resumed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from ept_fast import EPTModel
from tests.distributed import run_fsdp, run_trainer
from tests.distributed.checks import assert_close, assert_equal, assert_within, cells
from tests.distributed.tasks import (
    batch_of,
    gradients_of,
    make_backbone,
    make_model,
    trained,
    values_of,
)
from tests.distributed.trainers import fresh_accelerate

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

ROOT = Path(__file__).resolve().parent.parent
PROCESSES = 2
SECONDS = 150  # how long a launch may take before it counts as hanging


def kill(launched: subprocess.Popen[str]) -> None:
    """SIGKILL the launcher and every process that it started."""
    try:
        launcher = psutil.Process(launched.pid)
        family = [*launcher.children(recursive=True), launcher]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    launched.wait()
    psutil.wait_procs(family, timeout=10)


@contextmanager
def started(script: str, *arguments: str, log: Path) -> Iterator[subprocess.Popen[str]]:
    """``torchrun`` with two processes, on a port that it finds free; none outlives the block."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={PROCESSES}", str(ROOT / "tests" / "distributed" / script)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }
    with log.open("w") as output:
        launched = subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield launched
        finally:
            kill(launched)


def run(script: str, folder: Path, *arguments: str) -> Path:
    """Run a script to its end; the folder that it wrote to."""
    log = folder / f"{script}.log"
    with started(script, str(folder), *arguments, log=log) as launched:
        try:
            status = launched.wait(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            status = f"none in {SECONDS} seconds"
    assert status == 0, f"{script}: exit status {status}\n{log.read_text()[-2500:]}"
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


@pytest.mark.support(row="DDP", column=run_trainer.TASK)
@pytest.mark.support(row="Trainer", column=run_trainer.TASK)
def test_trainer_in_two_processes(ddp: Path, tmp_path: Path) -> None:
    """The weights of one process with batches of the same rows, and the same in both."""
    first, second = (load_file(ddp / "run" / f"end-{rank}.safetensors") for rank in range(2))
    assert_equal(second, first)
    start = values_of(make_model(run_trainer.TASK))
    with fresh_accelerate():
        alone = run_trainer.train(tmp_path, 1)
    for name, value in alone.items():
        moved = (value - start[name]).norm()
        assert (first[name] - value).norm() < 1e-3 * moved, name


@pytest.mark.support(row="DDP", column=run_trainer.TASK)
@pytest.mark.support(row="Trainer", column=run_trainer.TASK)
def test_killed_run(ddp: Path, tmp_path: Path) -> None:
    """Both processes killed between two checkpoints: resumed, they end with the same bits."""
    marks = [tmp_path / f"paused-{rank}" for rank in range(PROCESSES)]
    log = tmp_path / "killed.log"
    with started("run_trainer.py", str(tmp_path), "--pause", "5", log=log) as launched:
        end = time.monotonic() + SECONDS
        while not all(mark.exists() for mark in marks):
            assert launched.poll() is None, log.read_text()[-2500:]
            assert time.monotonic() < end, log.read_text()[-2500:]
            time.sleep(0.1)
        kill(launched)
    assert launched.returncode == -9
    found = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert found == {"checkpoint-2", "checkpoint-4"}
    assert not list(tmp_path.glob("end-*"))
    run("run_trainer.py", tmp_path, "--resume")
    for rank in range(PROCESSES):
        got = load_file(tmp_path / f"end-{rank}.safetensors")
        assert_equal(got, load_file(ddp / "run" / f"end-{rank}.safetensors"))


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
    """Where a process has a part of a tensor only, an error says so; no wrong value comes out."""
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
