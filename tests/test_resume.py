"""A killed run goes on where it was, to the same weights as a run that was never killed.

And no other run can use its folder meanwhile.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from ept_fast import CheckpointError
from ept_fast.prompts.base import TENSOR_FILE
from ept_fast.storage.files import WriteError
from ept_fast.training.checkpoints import (
    COMPLETE_FILE,
    check_complete,
    complete_checkpoints,
    mark_complete,
    newest_checkpoint,
    sound_checkpoint,
)
from ept_fast.training.config import TrainConfig
from ept_fast.training.data import DataError
from ept_fast.training.folder import LOCK_FILE
from ept_fast.training.job import train
from ept_fast.training.trainer import PromptTrainer
from ept_fast.transformers.adapter import HEAD_FILE
from tests.tiny import (
    options,
    save_model,
    save_task,
    small_run,
    task_rows,
    weights_of,
    write_rows,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread", "empty_pictures"),
    pytest.mark.default_algorithms,
]

# Stops the command line at one place, says so, and waits to be killed.
CHILD = """
import sys, time
import torch
torch.set_num_threads(1)
from ept_fast.storage import files
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
elif place == "before the progress file":
    before(trainer, "write_json", lambda path, *_: path.parent.name == "checkpoint-30")
elif place == "while old checkpoints go":
    before(trainer.shutil, "rmtree", lambda path, **_: path.name == "checkpoint-10"
           and path.exists())
elif place == "inside the final adapter":
    before(files.os, "replace", lambda _, path: path.parent.name == "adapter"
           and path.name == "head.safetensors")
main()
"""

# The steps of the checkpoints that then count as complete.
PLACES = {
    "inside a checkpoint": (10, 20),
    "between checkpoints": (10, 20),
    "before the progress file": (10, 20),
    "while old checkpoints go": (20, 30),
    "inside the final adapter": (30, 40),
}


FIRST, *REST = PLACES


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return save_model(folder / "model"), save_task(folder / "data")


def settings_of(inputs: tuple[Path, Path], output: Path, **changes: Any) -> dict[str, Any]:
    # With dropout the random state decides too, so that it has to come back with the rest.
    run = small_run(*inputs, output, max_steps=40, head_dropout=0.2, keep="best")
    return {**run, **changes}


def start(settings: dict[str, Any], **how: Any) -> dict[str, Any]:
    return train(TrainConfig(**settings), progress=False, **how)


def outcome(output: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The final weights to the bit, and the curves."""
    metrics = json.loads((output / "metrics.json").read_text())
    kept = {name: metrics[name] for name in ("before", "after", "best", "curves", "tokens")}
    return weights_of(output), kept


_FINISHED: list[Path] = []


@pytest.fixture
def finished(
    _algorithms: None, inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run that nobody kills, made inside the first test that asks, by its algorithms."""
    if not _FINISHED:
        output = tmp_path_factory.mktemp("finished") / "out"
        start(settings_of(inputs, output))
        _FINISHED.append(output)
    return _FINISHED[0]


def command_line(root: Path, words: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.parametrize("place", [FIRST, *(pytest.param(p, marks=pytest.mark.slow) for p in REST)])
def test_killed_run_resumes_to_the_same_weights(
    place: str, inputs: tuple[Path, Path], finished: Path, root: Path, tmp_path: Path
) -> None:
    """Until it is killed, no other run gets into its folder."""
    output = tmp_path / "out"
    settings = settings_of(inputs, output)
    child = command_line(root, ["-c", CHILD, place, "train", "--quiet", *options(settings)])
    with child:
        assert child.stdout is not None
        said = child.stdout.readline()
        try:
            before = files_of(output)
            expected = f"^output: expected a folder that no other run is using, got {output} "
            for how in ({}, {"resume": True}, {"overwrite": True}):
                with pytest.raises(FileExistsError, match=expected):
                    start(settings, **how)
            assert files_of(output) == before
        finally:
            os.kill(child.pid, signal.SIGKILL)
        _, errors = child.communicate()
    assert said == "stopped\n", errors
    assert child.returncode == -signal.SIGKILL
    assert not (output / "metrics.json").exists()
    assert (output / LOCK_FILE).exists()
    complete = complete_checkpoints(output / "checkpoints")
    assert [path.name for path in complete] == [f"checkpoint-{steps}" for steps in PLACES[place]]
    start(settings, resume=True)
    assert outcome(output) == outcome(finished)
    assert not (output / LOCK_FILE).exists()


def test_finished_run_gives_its_metrics_again(inputs: tuple[Path, Path], finished: Path) -> None:
    path = finished / "metrics.json"
    stamp = path.stat().st_mtime_ns
    found = start(settings_of(inputs, finished), resume=True)
    assert found == json.loads(path.read_text())
    assert path.stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed: expected 0 as in the run to resume, got 1"),
        ({}, "data: expected the rows of the run to resume, got others"),
    ],
)
def test_another_run_is_not_resumed(
    changes: dict[str, Any], message: str, inputs: tuple[Path, Path], finished: Path, tmp_path: Path
) -> None:
    output, _, _ = copy_of(finished, tmp_path)
    settings = settings_of(inputs, output, **changes)
    rows = Path(settings["data"]) / "train.jsonl"
    written, before = rows.read_bytes(), files_of(output)
    try:
        if not changes:
            write_rows(rows, task_rows(96, seed=9))
        with pytest.raises(ValueError, match=message):
            start(settings, resume=True)
    finally:
        rows.write_bytes(written)
    assert files_of(output) == before


def copy_of(finished: Path, folder: Path) -> tuple[Path, Path, Path]:
    """The run as if killed behind its last checkpoint, and its checkpoints of 30 and 40 steps."""
    output = Path(shutil.copytree(finished, folder / "out"))
    (output / "metrics.json").unlink()
    shutil.rmtree(output / "adapter")
    older, newer = complete_checkpoints(output / "checkpoints")
    return output, older, newer


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def leave_the_folder(path: Path) -> None:
    outside = path.rename(path.parents[3] / "outside")
    path.symlink_to(outside)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": os.unlink,
    "garbage": lambda path: path.write_bytes(b"garbage"),
    "one bit": flip_a_bit,
    "elsewhere": leave_the_folder,
}
MARKERS = {
    "empty": (b"", "expected a JSON object, got "),
    "a list": (b"[]", "expected a JSON object, got list"),
    "of an earlier version": (b'{"step": 40}', "sha256: expected the digests of the"),
    "digests that are no text": (b'{"sha256": {"optimizer.pt": 1}}', "['optimizer.pt']"),
    "a file outside": (b'{"sha256": {"../checkpoint-30/optimizer.pt": ""}}', "'../checkpoint-30/"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_makes_a_checkpoint_unsound(
    damage: str, finished: Path, tmp_path: Path
) -> None:
    """Every file in turn, those of the best adapter too."""
    _, older, newer = copy_of(finished, tmp_path)
    files = [path for path in newer.rglob("*") if path.is_file() and path.name != COMPLETE_FILE]
    names = {path.relative_to(newer).as_posix() for path in files}
    expected = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert names > {*expected, "progress.json", TENSOR_FILE, HEAD_FILE, f"best/{HEAD_FILE}"}
    (newer / "notes.txt").write_text("not in the marker")
    check_complete(newer)
    for path in files:
        data = path.read_bytes()
        DAMAGES[damage](path)
        with pytest.raises(CheckpointError, match=re.escape(path.relative_to(newer).as_posix())):
            check_complete(newer)
        assert sound_checkpoint(newer.parent) == older
        path.unlink(missing_ok=True)
        path.write_bytes(data)
    check_complete(newer)


@pytest.mark.parametrize("marker", MARKERS)
def test_a_damaged_marker_makes_a_checkpoint_unsound(
    marker: str, finished: Path, tmp_path: Path
) -> None:
    _, older, newer = copy_of(finished, tmp_path)
    content, message = MARKERS[marker]
    (newer / COMPLETE_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        check_complete(newer)
    assert str(newer / COMPLETE_FILE) in str(caught.value)
    assert sound_checkpoint(newer.parent) == older


def test_a_checkpoint_that_the_disk_fails_to_read_is_passed_over(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, older, newer = copy_of(finished, tmp_path)
    is_file = Path.is_file

    def failing(self: Path) -> bool:
        if self == newer / "optimizer.pt":
            raise OSError(errno.EIO, "Input/output error", str(self))
        return is_file(self)

    monkeypatch.setattr(Path, "is_file", failing)
    assert sound_checkpoint(newer.parent) == older
    (message,) = caplog.messages
    assert f"Input/output error: '{newer / 'optimizer.pt'}'; going on from" in message


def test_best_weights_that_are_damaged_meanwhile_get_into_no_checkpoint(
    inputs: tuple[Path, Path], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    settings = settings_of(inputs, output)
    save = PromptTrainer._save_checkpoint

    def saving(self: PromptTrainer, *args: Any) -> None:
        if self.state.global_step == 20:
            flip_a_bit(output / "best" / HEAD_FILE)
        save(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(PromptTrainer, "_save_checkpoint", saving)
        with pytest.raises(CheckpointError, match=rf"best/adapter.json: sha256: .*{HEAD_FILE}"):
            start(settings)
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["checkpoint-10"]
    start(settings, resume=True)
    assert outcome(output) == outcome(finished)


def damaged(finished: Path, folder: Path, name: str) -> tuple[Path, list[str]]:
    """A run of which all checkpoints but the oldest are damaged, and what is said of them."""
    output, _, newer = copy_of(finished, folder)
    flip_a_bit(newer / name)
    shutil.rmtree(output / "best")  # of which every checkpoint has its own
    for steps in (50, 60):  # more damaged ones than are kept
        shutil.copytree(newer, newer.with_name(f"checkpoint-{steps}"))
    return output, [
        f"{newer.with_name(f'checkpoint-{steps}')}/complete.json: sha256: expected the files that "
        f"were written, got others or none for ['{name}']; going on from checkpoint-30"
        for steps in (60, 50, 40)
    ]


@pytest.mark.parametrize("name", ["optimizer.pt", f"best/{HEAD_FILE}"])
def test_a_run_goes_on_from_the_newest_sound_checkpoint(
    name: str,
    inputs: tuple[Path, Path],
    finished: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """To the weights of the unbroken run, and writes the damaged checkpoint anew."""
    output, said = damaged(finished, tmp_path, name)
    start(settings_of(inputs, output), resume=True)
    assert [r.getMessage() for r in caplog.records if r.name == "ept_fast"] == said
    assert outcome(output) == outcome(finished)
    complete = complete_checkpoints(output / "checkpoints")
    assert [path.name for path in complete] == [f"checkpoint-{n}" for n in (30, 40, 50, 60)]
    assert sound_checkpoint(output / "checkpoints") == complete[1]


@pytest.mark.slow
def test_resume_on_the_command_line(
    inputs: tuple[Path, Path], finished: Path, root: Path, tmp_path: Path
) -> None:
    """What is wrong with the checkpoints comes first, a line each."""
    output, said = damaged(finished, tmp_path, "optimizer.pt")
    words = ["-m", "ept_fast", "train", "--resume", *options(settings_of(inputs, output))]
    child = command_line(root, words)
    text, errors = child.communicate()
    assert child.returncode == 0, errors
    assert errors.splitlines()[:3] == said
    assert "training: 40 of 40 steps" in errors
    assert "\r" not in errors
    assert "accuracy: 0." in text
    assert outcome(output) == outcome(finished)


def test_damaged_checkpoints_only_are_a_clear_error(
    inputs: tuple[Path, Path], finished: Path, tmp_path: Path
) -> None:
    output, older, newer = copy_of(finished, tmp_path)
    (older / COMPLETE_FILE).write_text("")
    (newer / "rng_state.pth").unlink()
    before = files_of(output)
    expected = (
        rf"checkpoints: expected a checkpoint to resume from, got damaged ones only .*: "
        rf"{newer}/complete.json: sha256: .*\['rng_state.pth'\]; "
        rf"{older}/complete.json: expected a JSON object, got "
    )
    with pytest.raises(CheckpointError, match=expected):
        start(settings_of(inputs, output), resume=True)
    assert files_of(output) == before


def test_newest_counts_steps_and_wants_the_marker(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert sound_checkpoint(tmp_path) is None
    for steps, complete in (("9", True), ("10", True), ("100", False), ("mine", True)):
        folder = tmp_path / f"checkpoint-{steps}"
        folder.mkdir()
        (folder / "optimizer.pt").write_text(steps)
        if complete:
            mark_complete(folder)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert newest_checkpoint(tmp_path, 9) == tmp_path / "checkpoint-9"
    assert newest_checkpoint(tmp_path, 8) is None
    assert sound_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_the_folder_is_looked_at_under_the_lock(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that began and ended just before leaves a folder that is not empty."""
    output = tmp_path / "out"
    acquire = FileLock.acquire

    def late(self: Any, *args: Any, **kwargs: Any) -> Any:
        (output / "metrics.json").write_text("theirs")
        return acquire(self, *args, **kwargs)

    monkeypatch.setattr(FileLock, "acquire", late)
    with pytest.raises(FileExistsError, match="output: expected an empty folder"):
        start(settings_of(inputs, output))
    assert files_of(output) == {output / "metrics.json": b"theirs"}


@pytest.mark.parametrize("there", [True, False])
def test_a_link_in_place_of_the_lock_file_is_not_followed(
    there: bool, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    output, target = tmp_path / "out", tmp_path / "target"
    output.mkdir()
    if there:
        target.write_text("mine")
    (output / LOCK_FILE).symlink_to(target)
    with pytest.raises(WriteError, match=rf"{LOCK_FILE}: expected a writable file, got "):
        start(settings_of(inputs, output))
    assert files_of(tmp_path) == ({output / LOCK_FILE: b"mine", target: b"mine"} if there else {})
    assert (output / LOCK_FILE).is_symlink()


def test_a_start_that_fails_leaves_no_folder(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "a" / "b" / "out"
    settings = settings_of(inputs, output, data=str(tmp_path / "gone.jsonl"))
    for how in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(DataError):
            start(settings, **how)
        assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError):
        start(settings)
    assert not list((tmp_path / "a").iterdir())
