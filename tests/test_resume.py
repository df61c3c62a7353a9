"""A killed run goes on where it was, to the same weights as a run that was never killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ept_fast import CheckpointError
from ept_fast.integrations.adapters import HEAD_FILE
from ept_fast.module import TENSOR_FILE
from ept_fast.training.config import TrainConfig
from ept_fast.training.job import train
from ept_fast.training.trainer import COMPLETE_FILE, newest_checkpoint
from tests.tiny import save_model, save_task, small_run, task_rows, write_rows

pytestmark = pytest.mark.usefixtures("one_thread")

# Stops the command line at one place, says so, and waits to be killed.
CHILD = """
import sys, time
import torch
torch.set_num_threads(1)
from ept_fast import checkpoint
from ept_fast.training import trainer
from ept_fast.training.trainer import PromptTrainer
from ept_fast.cli import main

def before(owner, name, condition):
    plain = getattr(owner, name)
    def stopping(*args, **kwargs):
        if condition(*args, **kwargs):
            print("stopped", flush=True)
            time.sleep(600)
        return plain(*args, **kwargs)
    setattr(owner, name, stopping)

place = sys.argv.pop(1)
if place == "between checkpoints":
    before(PromptTrainer, "training_step", lambda self, *a, **k: self.state.global_step == 25)
elif place == "inside a checkpoint":
    before(PromptTrainer, "_save_rng_state", lambda self, *a: self.state.global_step == 30)
elif place == "while old checkpoints go":
    before(trainer.shutil, "rmtree", lambda path, **k: not k and path.name == "checkpoint-10")
elif place == "inside the final adapter":
    before(checkpoint.os, "replace", lambda _, path: path.parent.name == "adapter"
           and path.name == "head.safetensors")
main()
"""

PLACES = {
    "between checkpoints": 20,
    "inside a checkpoint": 20,
    "while old checkpoints go": 30,
    "inside the final adapter": 40,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return save_model(folder / "model"), save_task(folder / "data")


def settings_of(inputs: tuple[Path, Path], output: Path, **changes: Any) -> dict[str, Any]:
    # With dropout the random state decides too, so that it has to come back with the rest.
    return small_run(*inputs, output, max_steps=40, head_dropout=0.2, keep="best", **changes)


def options(settings: dict[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in settings.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def outcome(output: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The final weights to the bit, and the curves."""
    tensors = {
        f"{file}:{name}": tensor.numpy().tobytes()
        for file in (TENSOR_FILE, HEAD_FILE)
        for name, tensor in load_file(output / "adapter" / file).items()
    }
    metrics = json.loads((output / "metrics.json").read_text())
    kept = {name: metrics[name] for name in ("before", "after", "best", "curves", "tokens")}
    return tensors, kept


_UNBROKEN: list[tuple[dict[str, bytes], dict[str, Any]]] = []


def unbroken(
    inputs: tuple[Path, Path], folders: pytest.TempPathFactory
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The outcome of the run that nobody kills; run once, inside the first test that asks."""
    if not _UNBROKEN:
        output = folders.mktemp("unbroken") / "out"
        train(TrainConfig(**settings_of(inputs, output)), progress=False)
        _UNBROKEN.append(outcome(output))
    return _UNBROKEN[0]


def command_line(root: Path, words: list[str], **how: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **how,
    )


@pytest.mark.default_algorithms
@pytest.mark.parametrize("place", PLACES)
def test_killed_run_resumes_to_the_same_weights(
    place: str,
    inputs: tuple[Path, Path],
    root: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    output = tmp_path / "out"
    settings = settings_of(inputs, output)
    child = command_line(root, ["-c", CHILD, place, "train", "--quiet", *options(settings)])
    with child:
        assert child.stdout is not None
        said = child.stdout.readline()
        os.kill(child.pid, signal.SIGKILL)
        _, errors = child.communicate()
    assert said == "stopped\n", errors
    assert child.returncode == -signal.SIGKILL
    assert not (output / "metrics.json").exists()
    newest = newest_checkpoint(output / "checkpoints")
    assert newest is not None
    assert newest.name == f"checkpoint-{PLACES[place]}"
    train(TrainConfig(**settings), resume=True, progress=False)
    assert outcome(output) == unbroken(inputs, tmp_path_factory)


@pytest.mark.default_algorithms
def test_resume_on_the_command_line(
    inputs: tuple[Path, Path],
    root: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    output = tmp_path / "out"
    settings = settings_of(inputs, output)
    words = ["-m", "ept_fast", "train", "--resume", *options(settings)]
    first = command_line(root, words)  # nothing there yet: it starts
    text, errors = first.communicate()
    assert first.returncode == 0, errors
    assert "accuracy: 0." in text
    assert "training: 40 of 40 steps" in errors
    assert "\r" not in errors
    assert outcome(output) == unbroken(inputs, tmp_path_factory)
    for name in ("adapter", "metrics.json"):
        (output / name).rename(tmp_path / name)
    # Only the last checkpoint is left to do it from.
    train(TrainConfig(**settings), resume=True, progress=False)
    assert outcome(output) == unbroken(inputs, tmp_path_factory)


def test_finished_run_gives_its_metrics_again(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    config = TrainConfig(**settings_of(inputs, tmp_path / "out"))
    metrics = train(config, progress=False)
    stamp = (tmp_path / "out" / "metrics.json").stat().st_mtime_ns
    assert train(config, resume=True, progress=False) == metrics
    assert (tmp_path / "out" / "metrics.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed: expected 0 as in the run to resume, got 1"),
        ({"head_lr": 0.5}, "head_lr: expected 0.03 as in the run to resume, got 0.5"),
        ({"max_length": 12}, "max_length: expected 16 as in the run to resume, got 12"),
    ],
)
def test_another_run_is_not_resumed(
    changes: dict[str, Any], message: str, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = {**settings_of(inputs, tmp_path / "out"), "max_steps": 2}
    train(TrainConfig(**settings), progress=False)
    with pytest.raises(ValueError, match=message):
        train(TrainConfig(**{**settings, **changes}), resume=True, progress=False)


def test_other_rows_are_not_resumed(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    data = save_task(tmp_path / "data")
    settings = {**settings_of((inputs[0], data), tmp_path / "out"), "max_steps": 2}
    train(TrainConfig(**settings), progress=False)
    write_rows(data / "train.jsonl", task_rows(96, seed=9))
    with pytest.raises(ValueError, match="data: expected the rows of the run to resume"):
        train(TrainConfig(**settings), resume=True, progress=False)


def test_damaged_checkpoint_is_a_clear_error(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    settings = {**settings_of(inputs, tmp_path / "out"), "max_steps": 10}
    train(TrainConfig(**settings), progress=False)
    (tmp_path / "out" / "metrics.json").unlink()
    newest = newest_checkpoint(tmp_path / "out" / "checkpoints")
    assert newest is not None
    path = newest / TENSOR_FILE
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"adapter\.json: sha256"):
        train(TrainConfig(**settings), resume=True, progress=False)


def test_newest_counts_steps_and_wants_the_marker(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for steps, complete in ((9, True), (10, True), (100, False)):
        folder = tmp_path / f"checkpoint-{steps}"
        folder.mkdir()
        if complete:
            (folder / COMPLETE_FILE).write_text("{}")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
