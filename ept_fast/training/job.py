"""The three jobs on sequence classification: train, evaluate, predict."""

from __future__ import annotations

import importlib.util
import math
import platform
import resource
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import ept_fast
from ept_fast.checkpoint import CheckpointError, read_json, write_json
from ept_fast.training.config import TrainConfig
from ept_fast.training.data import (
    Collator,
    DataError,
    Fields,
    LabelSet,
    Rows,
    hold_out,
    read_split,
    tokenise,
)
from ept_fast.training.metrics import classification_metrics

if TYPE_CHECKING:
    from ept_fast.integrations.transformers import EPTForSequenceClassification
    from ept_fast.training.trainer import PromptTrainer

__all__ = [
    "MissingLibraryError",
    "TaskData",
    "evaluate",
    "load_adapter",
    "load_task",
    "predict",
    "require",
    "train",
]

RUN_FILE = "run.json"
METRICS_FILE = "metrics.json"
_OURS = ("adapter", "best", "checkpoints")
_OUR_FILES = (RUN_FILE, METRICS_FILE, "learning_curves.png", "gate_weights.png")


class MissingLibraryError(ImportError):
    """A library of the ``train`` extra is not installed."""


def require(*names: str) -> None:
    """Raise MissingLibraryError, with what to install, unless these modules can be imported."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingLibraryError(
            f'{", ".join(missing)} not installed: pip install "ept-fast[train]"'
        )


@dataclass(frozen=True)
class TaskData:
    """Training and evaluation rows of a task."""

    train: Rows
    evaluation: Rows


def load_task(config: TrainConfig) -> TaskData:
    """The rows that a run trains on and is evaluated on.

    Raises:
        DataError: a missing file or split, or a malformed line.
    """
    fields = Fields(config.text_field, config.pair_field, config.label_field)
    train_rows = read_split(config.data, "train", fields=fields)
    if config.eval_data is not None:
        evaluation = read_split(config.eval_data, "validation", fields=fields)
    else:
        evaluation = None
        for split in ("validation", "test"):
            evaluation = evaluation or read_split(config.data, split, fields=fields, optional=True)
    assert train_rows is not None  # only None where optional
    if evaluation is None:
        train_rows, evaluation = hold_out(train_rows, config.eval_fraction, config.seed)
    if (train_rows.pairs is None) != (evaluation.pairs is None):
        raise DataError(
            f"{evaluation.source}: {config.pair_field}: expected the same texts as in "
            f"{train_rows.source}, one has a second text and the other has none"
        )
    return TaskData(train_rows, evaluation)


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    data: TaskData | None = None,
) -> dict[str, Any]:
    """Train an adapter and leave it in ``config.output``, with metrics and pictures.

    The folder then holds ``adapter/`` (safetensors and JSON), ``metrics.json``,
    ``learning_curves.png``, ``gate_weights.png`` (where the prompt has subspaces), ``run.json`` and
    ``checkpoints/``. Nothing in it is touched before arguments, data and model are found good.

    Args:
        config: the run.
        resume: go on from the newest complete checkpoint of the same run; from the start where
            there is none yet. A finished run gives its metrics again.
        overwrite: replace the results of an earlier run in the folder; other files stay.
        progress: whether to show a progress bar.
        data: the rows, in place of ``config.data`` and ``config.eval_data``.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        FileExistsError: the folder is not empty, and neither ``resume`` nor ``overwrite`` is given.
        DataError: malformed data.
        ValueError: a config that does not fit the model, or a resumed run that was another one.
        NonFiniteLossError: the loss became NaN or infinite; checkpoints before it are kept.
        MissingLibraryError: the ``train`` extra is not installed.
    """
    require("transformers", "accelerate", "matplotlib")
    from ept_fast.training.trainer import PromptTrainer, newest_checkpoint

    output = Path(config.output)
    _check_output(output, resume, overwrite)
    task = data or load_task(config)
    run = {
        "config": config.to_dict(),
        "data": {"train": task.train.fingerprint(), "evaluation": task.evaluation.fingerprint()},
    }
    if resume and (output / RUN_FILE).exists():
        _check_same_run(output / RUN_FILE, run)
        if (output / METRICS_FILE).exists():
            return read_json(output / METRICS_FILE)
    model, tokenizer, labels = _build(config, task.train)
    limit = _text_limit(model, tokenizer)
    train_set = tokenise(task.train, tokenizer, limit, labels)
    eval_set = tokenise(task.evaluation, tokenizer, limit, labels)
    epoch = math.ceil(len(train_set) / config.batch_size)
    checkpoints = output / "checkpoints"
    bf16 = config.bf16
    if bf16 is None:
        on_gpu = config.device == "auto" and torch.cuda.is_available()
        bf16 = on_gpu and torch.cuda.is_bf16_supported()
    if overwrite and not resume:
        _clear(output)
    write_json(output / RUN_FILE, run)
    trainer = PromptTrainer(
        model,
        config,
        train_set,
        eval_set,
        Collator.of(tokenizer),
        max_steps=config.max_steps or max(1, math.ceil(epoch * config.epochs)),
        folder=checkpoints,
        bf16=bf16,
        progress=progress,
    )
    checkpoint = newest_checkpoint(checkpoints) if resume else None
    if checkpoint is None and config.eval_before:
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if not trainer.evaluations or trainer.evaluations[-1]["step"] != trainer.state.global_step:
        trainer.evaluate()
    best = max(trainer.evaluations, key=lambda e: e[config.metric])
    kept = best if config.keep == "best" else trainer.evaluations[-1]
    if config.keep == "best":
        model.load_pretrained(trainer.best_folder(best["step"]))
    extra = {"integer_labels": labels.integers, "text_pair": task.train.pairs is not None}
    model.save_pretrained(output / "adapter", extra=extra)
    metrics = {
        "before": trainer.evaluations[0] if config.eval_before else None,
        "after": kept,
        "best": best,
        **_facts(config, model, trainer),
        "rows": {
            "train": len(train_set),
            "train_cut": train_set.num_cut,
            "evaluation": len(eval_set),
            "evaluation_cut": eval_set.num_cut,
        },
    }
    _draw(output, metrics, model)
    write_json(output / METRICS_FILE, metrics)  # last: a folder with it is a finished run
    return metrics


def _check_output(output: Path, resume: bool, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output: expected a folder, got the file {output}")
    if resume and overwrite:
        raise ValueError("resume, overwrite: expected one of them, got both")
    if output.is_dir() and any(output.iterdir()) and not (resume or overwrite):
        raise FileExistsError(
            f"output: expected an empty folder, got {output} with files in it "
            f"(resume the run, or overwrite it)"
        )
    if resume and output.is_dir() and any(output.iterdir()) and not (output / RUN_FILE).exists():
        raise FileExistsError(f"output: expected a run to resume, got {output} without {RUN_FILE}")


def _check_same_run(path: Path, run: dict[str, Any]) -> None:
    saved = read_json(path)
    try:
        old, new = saved["config"], run["config"]
        # Where the folder lies may change; everything that decides the weights may not.
        changed = [n for n in new if n != "output" and old.get(n, None) != new[n]]
        same_rows = saved["data"] == run["data"]
    except (KeyError, AttributeError):
        raise CheckpointError(f"{path}: expected the description of a run, got others") from None
    if changed:
        name = changed[0]
        raise ValueError(
            f"{name}: expected {old.get(name)!r} as in the run to resume, got {new[name]!r}"
        )
    if not same_rows:
        raise ValueError("data: expected the rows of the run to resume, got others")


def _clear(output: Path) -> None:
    for name in _OUR_FILES:
        (output / name).unlink(missing_ok=True)
    for name in _OURS:
        shutil.rmtree(output / name, ignore_errors=True)


def _build(config: TrainConfig, rows: Rows) -> tuple[EPTForSequenceClassification, Any, LabelSet]:
    from ept_fast.integrations.transformers import (
        EPTForSequenceClassification,
        embedding_width,
        load_backbone,
        load_tokenizer,
        text_limit,
    )

    labels = LabelSet.of(rows, config.num_labels)
    tokenizer = load_tokenizer(config.model)
    backbone = load_backbone(config.model)
    tokens = config.prompt_length if config.method == "pt" else config.num_virtual_tokens
    most = text_limit(backbone, tokens)
    length = config.max_length if most is None else max(min(config.max_length, most), 1)
    folder = Path(config.model)
    model = EPTForSequenceClassification(
        backbone,
        config.prompt_config(embedding_width(backbone), length),
        labels.names,
        pooling=config.pooling,
        head_dropout=config.head_dropout,
        base_model=str(folder.resolve()) if folder.is_dir() else config.model,
        init=config.init,
        generator=torch.Generator().manual_seed(config.seed),
    )
    return model, tokenizer, labels


def _text_limit(model: EPTForSequenceClassification, tokenizer: Any) -> int:
    limits = [model.prompt.config.max_length, int(tokenizer.model_max_length)]
    return min(limits if model.text_limit is None else [*limits, model.text_limit])


def _facts(
    config: TrainConfig, model: EPTForSequenceClassification, trainer: PromptTrainer
) -> dict[str, Any]:
    import transformers

    kind = model.head.weight.device.type
    on_gpu = kind == "cuda"
    return {
        "curves": {"loss": trainer.losses, "evaluation": trainer.evaluations},
        "steps": trainer.state.global_step,
        "seconds_per_step": statistics.median(trainer.seconds),
        "tokens": trainer.tokens,
        "parameters": model.parameter_counts(),
        "prompt": model.prompt.config.to_dict(),
        "gate_weights": model.prompt.gate_weights().cpu().tolist()
        if model.prompt.config.num_spaces
        else None,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_memory(),
        "device": torch.cuda.get_device_name()
        if on_gpu
        else f"{platform.machine()} {kind.upper()}",
        "threads": torch.get_num_threads(),
        "bf16": trainer.bf16,
        "labels": list(model.labels),
        "seed": config.seed,
        "config": config.to_dict(),
        "versions": {
            "ept_fast": ept_fast.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def peak_memory() -> int:
    """The process's largest resident size so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _draw(output: Path, metrics: dict[str, Any], model: EPTForSequenceClassification) -> None:
    from ept_fast.training.report import draw_gate_weights, draw_learning_curves

    curves = metrics["curves"]
    draw_learning_curves(
        curves["loss"],
        curves["evaluation"],
        output / "learning_curves.png",
        metric=metrics["config"]["metric"],
    )
    if metrics["gate_weights"] is not None:
        draw_gate_weights(metrics["gate_weights"], output / "gate_weights.png")


@dataclass(frozen=True)
class Adapter:
    """A trained adapter, ready for prediction."""

    model: EPTForSequenceClassification
    tokenizer: Any
    labels: LabelSet
    paired: bool


def load_adapter(folder: str | Path, *, model: str | None = None, device: str = "auto") -> Adapter:
    """Load an adapter (or a run's output folder) and the encoder it was trained on.

    Args:
        folder: the adapter.
        model: folder or hub id of the encoder, in place of the one saved with the adapter.
        device: ``"auto"`` or ``"cpu"``.

    Raises:
        CheckpointError: a missing, damaged or foreign adapter.
        ValueError: the encoder cannot be found.
        MissingLibraryError: the ``train`` extra is not installed.
    """
    require("transformers")
    from ept_fast.integrations.transformers import (
        EPTForSequenceClassification,
        load_tokenizer,
        read_adapter,
    )

    path = Path(folder)
    if (path / "adapter").is_dir():
        path = path / "adapter"
    elif not path.is_dir():
        raise CheckpointError(f"adapter: expected a folder, got {folder}")
    values = read_adapter(path)
    trained = EPTForSequenceClassification.from_pretrained(path, base_model=model)
    if device == "auto" and torch.cuda.is_available():
        trained.to("cuda")
    extra = values["extra"]
    labels = LabelSet(tuple(values["labels"]), bool(extra.get("integer_labels", False)))
    name = model or values["base_model"]
    return Adapter(trained, load_tokenizer(name), labels, bool(extra.get("text_pair", False)))


def evaluate(
    adapter: str | Path | Adapter,
    data: str | Path | Rows,
    *,
    split: str = "test",
    batch_size: int = 64,
    model: str | None = None,
    device: str = "auto",
    fields: Fields | None = None,
) -> dict[str, Any]:
    """Metrics of an adapter on labelled rows.

    Args:
        adapter: folder of an adapter or of a run, or a loaded one.
        data: as :class:`TrainConfig`'s ``data``, or rows.
        split: which split of it.
        batch_size: rows of a batch.
        model: the encoder, in place of the one saved with the adapter.
        device: ``"auto"`` or ``"cpu"``.
        fields: the columns' names.

    Returns:
        ``accuracy``, ``macro_f1``, ``matthews``, ``rows`` and ``rows_cut``.
    """
    loaded = _loaded(adapter, model, device)
    rows = data if isinstance(data, Rows) else read_split(data, split, fields=fields)
    assert rows is not None  # only None where optional
    logits, cut = _logits(loaded, rows, batch_size)
    labels = loaded.labels.ids(rows)
    metrics = classification_metrics(logits.argmax(-1), labels, len(loaded.labels.names))
    return {**metrics, "rows": len(rows), "rows_cut": cut}


def predict(
    adapter: str | Path | Adapter,
    rows: Rows,
    *,
    batch_size: int = 64,
    model: str | None = None,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """The label and the classes' probabilities of each row, in order.

    Args:
        adapter: folder of an adapter or of a run, or a loaded one.
        rows: texts, labelled or not.
        batch_size: rows of a batch.
        model: the encoder, in place of the one saved with the adapter.
        device: ``"auto"`` or ``"cpu"``.

    Returns:
        Dicts of ``label`` (of the type it had in training) and ``probabilities`` (by name).
    """
    loaded = _loaded(adapter, model, device)
    logits, _ = _logits(loaded, rows, batch_size)
    names = loaded.labels.names
    results = []
    for row in logits.softmax(-1):
        best = int(row.argmax())
        label = best if loaded.labels.integers else names[best]
        probabilities = dict(zip(names, row.tolist(), strict=True))
        results.append({"label": label, "probabilities": probabilities})
    return results


def _loaded(adapter: str | Path | Adapter, model: str | None, device: str) -> Adapter:
    if isinstance(adapter, Adapter):
        return adapter
    return load_adapter(adapter, model=model, device=device)


def _logits(adapter: Adapter, rows: Rows, batch_size: int) -> tuple[torch.Tensor, int]:
    from ept_fast.training.trainer import predict_logits

    if (rows.pairs is not None) != adapter.paired:
        expected, got = ("a second text", "none") if adapter.paired else ("no second text", "one")
        raise DataError(f"{rows.source}: text_pair: expected {expected} as in training, got {got}")
    tokens = tokenise(rows, adapter.tokenizer, _text_limit(adapter.model, adapter.tokenizer))
    collator = Collator.of(adapter.tokenizer)
    return predict_logits(adapter.model, tokens, collator, batch_size), tokens.num_cut
