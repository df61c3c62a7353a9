"""The training job in two processes: the run of one, and a killed run that goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ept_fast.module import TENSOR_FILE
from ept_fast.training.config import TrainConfig
from ept_fast.training.job import train
from ept_fast.training.trainer import newest_checkpoint
from tests.tiny import (
    answer_rows,
    save_llama,
    save_model,
    save_t5,
    save_task,
    small_run,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# Trains the runs of a JSON file one after another; where asked to, rank 1 dies in the last one.
CHILD = """
import json, os, signal, sys
from pathlib import Path
import torch
import torch.distributed as dist
torch.set_num_threads(1)
from ept_fast.training.config import TrainConfig
from ept_fast.training.job import train
from ept_fast.training.trainer import PromptTrainer

runs, mode = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
dist.init_process_group("gloo")
step = PromptTrainer.training_step
def dying(self, *args, **kwargs):
    if self.state.global_step == 5 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
for number, run in enumerate(runs, 1):
    if mode == "die" and number == len(runs):
        PromptTrainer.training_step = dying
    metrics = train(TrainConfig(**run), resume=mode == "resume", progress=False)
    assert metrics["processes"] == 2
dist.destroy_process_group()
"""

CASES: dict[str, dict[str, Any]] = {
    "classification": {},
    "seq2seq": {"task": "seq2seq", "gradient_accumulation_steps": 2},
    "packed": {"task": "causal", "packing": True, "pack_length": 40},
}


def launch(root: Path, folder: Path, runs: list[dict[str, Any]], mode: str) -> Any:
    (folder / "child.py").write_text(CHILD)
    (folder / "runs.json").write_text(json.dumps(runs))
    words = ["--standalone", "--nproc-per-node", "2", str(folder / "child.py")]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words, str(folder / "runs.json"), mode],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def weights(output: Path) -> dict[str, Any]:
    return load_file(output / "adapter" / TENSOR_FILE)


@pytest.fixture(scope="module")
def runs(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The settings of a run of each case that two processes made, and of one that was killed."""
    folder = tmp_path_factory.mktemp("parallel")
    models = {
        "classification": save_model(folder / "bert"),
        "seq2seq": save_t5(folder / "t5", steps=20),
        "packed": save_llama(folder / "llama", steps=20),
    }
    labels, answers = save_task(folder / "labels"), save_task(folder / "answers", answer_rows)
    settings = {}
    for case, choices in CASES.items():
        data = labels if case == "classification" else answers
        sizes = {"batch_size": 4, "max_steps": 8, "eval_steps": 2, "eval_generate": 5}
        if case != "classification":
            sizes |= {"prompt_length": 48, "max_target_length": 6}
        run = small_run(models[case], data, folder / case, **sizes, **choices, keep="best")
        settings[case] = run
    settings["killed"] = {**settings["packed"], "output": str(folder / "killed")}
    result = launch(root, folder, list(settings.values()), "die")
    assert result.returncode != 0
    assert "Signal 9 (SIGKILL)" in result.stderr, result.stderr
    return settings


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(
    case: str, runs: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """The same rows in every step, so the same losses and weights but for rounding."""
    found = json.loads((Path(runs[case]["output"]) / "metrics.json").read_text())
    settings = {**runs[case], "output": str(tmp_path / "one"), "batch_size": 8}
    alone = train(TrainConfig(**settings), progress=False)
    assert found["curves"]["loss"] == pytest.approx(alone["curves"]["loss"], rel=1e-3)
    assert found["tokens"] == alone["tokens"]
    for mine, theirs in zip(
        alone["curves"]["evaluation"], found["curves"]["evaluation"], strict=True
    ):
        assert theirs["step"] == mine["step"]
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-3)
    before = [m["curves"]["evaluation"][0] for m in (alone, found)]
    assert before[1] == pytest.approx(before[0], rel=1e-6)
    assert [s["text"] for s in found["samples"]] == [s["text"] for s in alone["samples"]]


def test_a_killed_run_goes_on_to_the_same_weights(
    root: Path, runs: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    output = Path(runs["killed"]["output"])
    assert not (output / "metrics.json").exists()
    newest = newest_checkpoint(output / "checkpoints")
    assert newest is not None
    assert newest.name == "checkpoint-4"
    assert {path.name for path in newest.glob("rng_state*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
    with pytest.raises(ValueError, match="WORLD_SIZE: expected 2 as in the run to resume, got 1"):
        train(TrainConfig(**runs["killed"]), resume=True, progress=False)
    result = launch(root, tmp_path, [runs["killed"]], "resume")
    assert result.returncode == 0, result.stderr
    whole = Path(runs["packed"]["output"])
    found, expected = weights(output), weights(whole)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (output, whole)]
    for name in ("curves", "tokens", "positions", "samples", "before", "after"):
        assert metrics[0][name] == metrics[1][name], name
