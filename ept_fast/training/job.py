"""The training job: from a config to a folder with an adapter, its metrics and its pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import platform
import resource
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import ept_fast
from ept_fast.libraries import MissingLibraryError, require
from ept_fast.losses.named import NAMED_LOSSES
from ept_fast.losses.terms import LossTerm
from ept_fast.prompts.base import Prompt, SavedPrompt, expected_shapes
from ept_fast.storage.files import CheckpointError, write_json
from ept_fast.training import parallel
from ept_fast.training.checkpoints import sound_checkpoint
from ept_fast.training.config import TrainConfig, find_device
from ept_fast.training.data import DataError, Fields, Rows, find_split, hold_out, read_split
from ept_fast.training.folder import METRICS_FILE, begin, check_output, held, metrics_of
from ept_fast.training.inference import (
    ANSWERS,
    WRAPPER_TASKS,
    Adapter,
    check_alike,
    evaluate,
    find_saved,
    fitted,
    load_adapter,
    predict,
)
from ept_fast.training.labels import LabelSet
from ept_fast.training.metrics import GENERATED_METRICS
from ept_fast.training.tokens import TextForm
from ept_fast.transformers.adapter import state_checksum

if TYPE_CHECKING:
    from ept_fast.config import PromptConfig
    from ept_fast.training.trainer import PromptTrainer
    from ept_fast.transformers.adapter import SavedAdapter
    from ept_fast.transformers.tasks import EPTModel

__all__ = [
    "Adapter",
    "MissingLibraryError",
    "TaskData",
    "evaluate",
    "load_adapter",
    "load_task",
    "load_tasks",
    "predict",
    "require",
    "train",
]


_LOSSES = {  # what they are on a figure's axis
    "regression": "squared error",
    "multi_label_classification": "binary cross-entropy (nats)",
}


@dataclass(frozen=True)
class TaskData:
    """Training and evaluation rows of a task."""

    train: Rows
    evaluation: Rows

    def fingerprints(self) -> dict[str, str]:
        """Hashes of both."""
        return {"train": self.train.fingerprint(), "evaluation": self.evaluation.fingerprint()}


def load_task(config: TrainConfig) -> TaskData:
    """The rows that a run of one data set trains on and is evaluated on.

    The test split is evaluated on if there is no other and nothing is chosen by what comes out.

    Raises:
        DataError: a missing file or split, or a malformed line.
    """
    (source,) = config.sources
    how: dict[str, Any] = {"fields": Fields.of(vars(config)), "answer": ANSWERS[config.task]}
    train_rows = read_split(source, "train", **how)
    evaluation = None
    if config.eval_data is not None:
        evaluation = read_split(config.eval_data, "validation", **how)
    else:
        for split in ("validation", "test") if config.keep == "last" else ("validation",):
            evaluation = evaluation or find_split(source, split, **how)
    if evaluation is None:
        train_rows, evaluation = hold_out(train_rows, config.eval_fraction, config.seed)
        evaluation = dataclasses.replace(evaluation, source=f"{evaluation.source} (held out)")
    targets = train_rows.targets is not None
    if not targets and config.target_field != Fields().target:
        raise DataError(
            f"{train_rows.source}: {config.target_field}: expected targets in the field that was "
            f"named, got none in any row"
        )
    pairs = train_rows.pairs is not None
    check_alike(evaluation, "pairs", pairs, config.pair_field, train_rows.source)
    check_alike(evaluation, "targets", targets, config.target_field, train_rows.source)
    chats = train_rows.chats is not None
    check_alike(evaluation, "chats", chats, config.messages_field, train_rows.source)
    if chats and config.task != "causal":
        raise DataError(
            f"{train_rows.source}: {config.messages_field}: expected texts for the task "
            f"{config.task}, got messages (causal)"
        )
    return TaskData(train_rows, evaluation)


def load_tasks(config: TrainConfig) -> dict[str, TaskData]:
    """The rows of each data set of a run, by the names of their adapters; of one data set by "".

    Raises:
        DataError: as :func:`load_task`.
    """
    if len(config.sources) == 1:
        return {"": load_task(config)}
    from ept_fast.training.multitask import task_names

    return {
        name: load_task(dataclasses.replace(config, data=source))
        for name, source in zip(task_names(config.sources), config.sources, strict=True)
    }


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    data: TaskData | Mapping[str, TaskData] | None = None,
) -> dict[str, Any]:
    """Train an adapter and leave it in ``config.output``, with metrics and pictures.

    The folder then holds ``adapter/`` (safetensors and JSON), ``metrics.json``,
    ``learning_curves.png``, ``gate_weights.png`` (if the prompt has subspaces), ``samples.md``
    (what the model writes, for text tasks), ``logs/`` (for TensorBoard, if it is reported to),
    ``run.json`` and ``checkpoints/``. Nothing in it is
    touched before arguments, data and model are found good. While it lasts, a run holds a lock on
    the folder, which ends with the process; no other run can use the folder then.

    Of several data sets each is a task of its own, with an adapter in ``adapter/<name>/``. They
    take turns, an optimizer step each. Tensors of the prompt that the method shares among tasks are
    the same in all adapters; all tensors, if it names none. In what is returned, ``loss`` and
    metrics are means over the tasks, with those of each under ``tasks``, and ``labels``, ``rows``
    and ``gate_weights`` are by name.

    Started by ``torchrun``, the processes share the rows of every step; ``batch_size`` is then that
    of each of them. One of them writes the folder.

    Args:
        config: the run.
        resume: go on from the newest complete checkpoint of the same run whose files are those
            that were written, with a warning for each one that is passed over; from the start
            if none is complete yet. A finished run gives its metrics again, unless ``max_steps``,
            ``epochs`` or early stopping are others: then it goes on to its new end.
        overwrite: replace the results of an earlier run in the folder; other files stay.
        progress: whether to say on standard error how far it is: a bar on a terminal, else lines.
        data: the rows, in place of ``config.data`` and ``config.eval_data``; of several tasks by
            the names of their adapters.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        FileExistsError: another run holds the folder; or it is not empty, and neither ``resume``
            nor ``overwrite`` is given.
        DataError: malformed data.
        ValueError: a config that does not fit the model or the prompt to start from, or a resumed
            run that was another one.
        CheckpointError: every complete checkpoint of the run to resume is damaged or gone, or the
            adapter to start from is damaged.
        NonFiniteLossError: the loss became NaN or infinite; checkpoints before it are kept.
        MissingLibraryError: the ``train`` extra is not installed, or what ``report_to`` names.
    """
    require("transformers", "accelerate", "datasets", "filelock", "matplotlib", "sklearn")
    if config.report_to != "none":
        require(config.report_to, install=config.report_to)
    find_device(config.device)
    with parallel.session(cpu=config.device == "cpu"), contextlib.ExitStack() as stack:
        parallel.on_main(lambda: stack.enter_context(held(Path(config.output))))
        return _train(config, resume, overwrite, progress, data)


def _train(
    config: TrainConfig,
    resume: bool,
    overwrite: bool,
    progress: bool,
    data: TaskData | Mapping[str, TaskData] | None,
) -> dict[str, Any]:
    if parallel.world_size() > 1 and config.device not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"device: expected auto, cpu or cuda for several processes, got {config.device!r}"
        )
    output = Path(config.output)
    parallel.on_main(lambda: check_output(output, resume, overwrite))
    given = {"": data} if isinstance(data, TaskData) else data
    tasks = parallel.agreed(lambda: given or load_tasks(config))
    config, labels = parallel.agreed(lambda: _labels_of(config, tasks))
    start = parallel.agreed(lambda: _start(config))
    run = {
        "config": config.to_dict(),
        "start": start and state_checksum({}, start.prompt.tensors)[:16],
        "data": _by_name({name: task.fingerprints() for name, task in tasks.items()}),
        "processes": parallel.world_size(),
    }
    checkpoint = None
    if resume:
        finished = parallel.on_main(lambda: metrics_of(output, run))
        if finished is not None:
            return finished
        checkpoint = parallel.on_main(lambda: _checkpoint_of(output))
    adapters, trainer = parallel.agreed(lambda: _prepare(config, tasks, labels, start, progress))
    parallel.agreed(lambda: trainer.check_longer_than(checkpoint))
    parallel.on_main(lambda: begin(output, run, overwrite))
    if checkpoint is not None:
        trainer.go_on(checkpoint)
    else:
        if config.eval_before:
            trainer.evaluate()
        trainer.train()
    if not trainer.evaluations or trainer.evaluations[-1]["step"] != trainer.state.global_step:
        trainer.evaluate()
    best = trainer.best()
    if config.keep == "best":
        parallel.agreed(lambda: trainer.trained.load_pretrained(trainer.best_folder))
    metrics = {
        "before": trainer.evaluations[0] if config.eval_before else None,
        "after": best if config.keep == "best" else trainer.evaluations[-1],
        "best": best,
        **_facts(config, adapters, trainer),
        "rows": _row_facts(adapters, trainer, tasks),
        "samples": trainer.samples(),
    }
    parallel.on_main(lambda: _finish(output, adapters, metrics))
    return metrics


def _labels_of(
    config: TrainConfig, tasks: Mapping[str, TaskData]
) -> tuple[TrainConfig, dict[str, LabelSet]]:
    """The labels of each data set, if the task has any, and the config with what they are."""
    if config.task != "classification":
        return config, {}
    how = (config.num_labels, config.problem_type)
    labels = {name: LabelSet.of(task.train, *how) for name, task in tasks.items()}
    kinds = {each.problem_type for each in labels.values()}
    if len(kinds) > 1:
        raise DataError(f"data: expected labels of one kind, got {', '.join(sorted(kinds))}")
    return dataclasses.replace(config, problem_type=kinds.pop()), labels


def _checkpoint_of(output: Path) -> Path | None:
    """The checkpoint that a run goes on from; one that has finished must have one."""
    found = sound_checkpoint(output / "checkpoints")
    if found is None and (output / METRICS_FILE).exists():
        raise CheckpointError(f"{output / 'checkpoints'}: expected one to go on from, got none")
    return found


def _by_name(found: Mapping[str, Any]) -> Any:
    """What was found of each task, by name; of the only one, without."""
    return found[""] if "" in found else dict(found)


def _finish(output: Path, adapters: Mapping[str, Adapter], metrics: dict[str, Any]) -> None:
    from ept_fast.training.report import draw_gate_weights, draw_learning_curves, write_samples

    after = metrics["after"]
    for name, adapter in adapters.items():
        judged = {n: value for n, value in after.items() if n != "step"}
        judged = judged["tasks"][name] if name else judged
        folder = output / "adapter" / name  # of the only one, whose name is empty, "adapter" itself
        adapter.model.save_pretrained(folder, extra=adapter.extra, metrics=judged)
    curves, picture = metrics["curves"], output / "learning_curves.png"
    draw_learning_curves(
        curves["loss"],
        curves["evaluation"],
        picture,
        metric=metrics["metric"],
        loss=metrics["loss"],
        kept=after["step"],
    )
    if metrics["gate_weights"] is not None:
        weights, names = metrics["gate_weights"], []
        if isinstance(weights, dict):  # a column of each task, the mean over its tokens
            names = list(weights)
            weights = [torch.tensor(each).mean(0).tolist() for each in weights.values()]
        draw_gate_weights(weights, output / "gate_weights.png", rows=names)
    if metrics["samples"]:
        write_samples(metrics["samples"], output / "samples.md")
    write_json(output / METRICS_FILE, metrics)  # last: a folder with it is a finished run


def _start(config: TrainConfig) -> SavedAdapter | None:
    """The adapter that a run starts from, if it is to start from one."""
    return None if config.start_from is None else find_saved(config.start_from, "start_from")


def _take(start: SavedPrompt, prompt: Prompt) -> None:
    """Give a prompt the values of a saved one; of a method that shares tensors, those alone.

    Raises:
        ValueError: another method, tensors of other names and shapes, or other constants.
    """
    config, expected = start.config, expected_shapes(prompt.config, None)
    same = type(config) is type(prompt.config)
    same = same and expected_shapes(config, start.num_tasks) == expected
    if same:
        constants = prompt.constants(config)
        mine = prompt.constants(prompt.config)
        same = all(torch.equal(mine[name], value) for name, value in constants.items())
    if not same:
        wanted = {**prompt.config.to_dict(), "num_tasks": None}
        theirs = {**config.to_dict(), "num_tasks": start.num_tasks}
        names = [n for n in {**wanted, **theirs} if wanted.get(n) != theirs.get(n)]
        raise ValueError(
            f"start_from: expected a prompt of the method and the sizes of this run "
            f"({_listed(names, wanted)}), got {start.path.parent} with {_listed(names, theirs)}"
        )
    taken = prompt.shared or tuple(expected)
    tensors = {
        name: start.tensors[name] if name in taken else parameter.detach()
        for name, parameter in prompt.named_parameters(recurse=False)
    }
    prompt.load_saved(start._replace(config=prompt.config, tensors=tensors))


def _take_head(start: SavedAdapter, adapter: Adapter) -> None:
    """Give the head of an adapter the values of a saved one, if it is of the same labels."""
    mine, theirs = adapter.model.description, start.values
    kind = theirs["extra"].get("problem_type", "single_label_classification")
    if (
        adapter.labels is not None
        and theirs["head"] == mine.head
        and tuple(theirs["labels"] or ()) == adapter.labels.names
        and (kind, theirs["pooling"]) == (adapter.labels.problem_type, mine.pooling)
    ):
        head: Any = adapter.model.head
        head.load_state_dict(start.head(head))


def _listed(names: Sequence[str], values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {values[name]}" for name in names if name in values) or "no others"


def _check_gates(config: TrainConfig, prompt: Prompt) -> None:
    """Raise ValueError if a run is to train the gates of a prompt that has none."""
    groups = prompt.parameter_groups(1.0, 1.0, 1.0)
    if config.gate_steps and "spaces" not in {group["name"] for group in groups}:
        raise ValueError(
            f"gate_steps: expected 0 for a prompt with neither gates nor subspaces, "
            f"got {config.gate_steps}"
        )


def _prepare(
    config: TrainConfig,
    tasks: Mapping[str, TaskData],
    labels: Mapping[str, LabelSet],
    start: SavedAdapter | None,
    progress: bool,
) -> tuple[dict[str, Adapter], PromptTrainer]:
    """The adapters to be trained, by name, and what trains them."""
    from ept_fast.training.multitask import MultitaskModel, TaskEvaluation, TaskRows
    from ept_fast.training.trainer import PromptTrainer, train_batches

    rows_of = {name: task.train for name, task in tasks.items()}
    adapters = _new_adapters(config, rows_of, labels, start)
    for adapter in adapters.values():
        if start is not None:
            _take(start.prompt, adapter.model.prompt)
            _take_head(start, adapter)
        _check_gates(config, adapter.model.prompt)
    bf16 = config.bf16
    if bf16 is None:
        on_gpu = find_device(config.device).type == "cuda"
        bf16 = on_gpu and torch.cuda.is_bf16_supported()
    tokenised = {name: adapter.tokenised(tasks[name].train) for name, adapter in adapters.items()}
    for name, adapter in adapters.items():
        if adapter.form is not None and not tokenised[name].num_label_tokens:
            raise ValueError(
                f"max_length: expected room for a token to learn, got {config.max_length}, which "
                f"every text's first token fills"
            )
    evaluations = {
        name: adapter.evaluation(
            tasks[name].evaluation,
            config.eval_batch_size,
            eval_generate=config.eval_generate,
            max_new_tokens=config.max_new_tokens,
            bf16=bf16,
        )
        for name, adapter in adapters.items()
    }
    pack_length = None
    if config.packing:
        pack_length = max(_pack_length(config, adapter) for adapter in adapters.values())
    model: Any
    rows: Any
    evaluation: Any
    if "" in adapters:
        model, rows, evaluation = adapters[""].model, tokenised[""], evaluations[""]
    else:
        model = MultitaskModel({name: adapter.model for name, adapter in adapters.items()})
        rows, evaluation = TaskRows(tokenised), TaskEvaluation(evaluations)
    batches = train_batches(config, rows, 0, pack_length)  # which fails if rows do not fit
    trainer = PromptTrainer(
        model,
        config,
        rows,
        next(iter(adapters.values())).collator,
        evaluation,
        max_steps=config.max_steps or batches.steps_of(config.epochs),
        folder=Path(config.output) / "checkpoints",
        bf16=bf16,
        progress=progress and parallel.is_main(),
        pack_length=pack_length,
    )
    return adapters, trainer


def _new_adapters(
    config: TrainConfig,
    tasks: Mapping[str, Rows],
    labels: Mapping[str, LabelSet],
    start: SavedAdapter | None,
) -> dict[str, Adapter]:
    """Untrained adapters of the tasks, by name, all on one backbone."""
    from ept_fast.transformers.backbone import load_backbone, load_tokenizer

    trust = config.trust_remote_code
    tokenizer = load_tokenizer(config.model, trust_remote_code=trust)
    backbone = load_backbone(config.model, WRAPPER_TASKS[config.task], trust_remote_code=trust)
    texts = tuple(itertools.chain.from_iterable(rows.all_texts for rows in tasks.values()))
    how: dict[str, Any] = {}
    if config.init == "data":
        how |= {"text": texts, "tokenizer": tokenizer}
    if start is not None and not config.given_sizes:
        how["sizes"] = start.prompt.config
    return {
        name: _new_adapter(config, rows, labels.get(name), backbone, tokenizer, how)
        for name, rows in tasks.items()
    }


def _new_adapter(
    config: TrainConfig,
    rows: Rows,
    labels: LabelSet | None,
    backbone: Any,
    tokenizer: Any,
    how: Mapping[str, Any],
) -> Adapter:
    if labels is not None:
        head: dict[str, Any] = {
            "labels": labels.names,
            "pooling": config.pooling,
            "head_dropout": config.head_dropout,
        }
        model: Any = _build(config, backbone, **how, **head)
        if config.balance_classes:
            model.set_class_weight(labels.balanced_weights(rows))
        if config.class_weights:
            model.set_class_weight(labels.weights(config.class_weights))
        for name, weight in config.losses.items():
            model.add_loss(LossTerm(name, NAMED_LOSSES[name], weight, config.loss_schedule))
        return Adapter(model, tokenizer, labels, rows.pairs is not None)
    targets = rows.targets is not None
    if config.metric in GENERATED_METRICS and not targets:
        raise ValueError(
            f"metric: expected one of token_accuracy, loss for rows without targets, "
            f"got {config.metric!r}"
        )
    sizes = (config.max_length, config.max_target_length)
    model = _build(config, backbone, **how)
    prompt = model.prompt.config
    if prompt.rank and prompt.offset_tokens == "given" and not targets:
        raise ValueError(
            "offset_tokens: expected all for rows without targets, no token of which is given "
            "before what is learnt, got 'given'"
        )
    form = TextForm(config.task, *sizes, config.separator, targets, rows.chats is not None)
    form = fitted(form, model, tokenizer)
    return Adapter(model, tokenizer, form=form, num_beams=config.num_beams)


def _pack_length(config: TrainConfig, adapter: Adapter) -> int:
    """Text tokens of a packed row; ValueError if this model's rows cannot be packed."""
    from ept_fast.transformers.packing import check_packing

    form, model = adapter.form, adapter.model
    assert form is not None  # of every adapter of a text task
    longest = form.max_length + (form.max_target_length if form.targets else 0)
    virtual = model.prompt.config.num_virtual_tokens
    check_packing(model.backbone, model.profile, virtual + longest)
    return config.pack_length or longest


def _build(
    config: TrainConfig, backbone: Any, sizes: PromptConfig | None = None, **how: Any
) -> EPTModel:
    from ept_fast.transformers.backbone import Profile, embedding_width
    from ept_fast.transformers.tasks import get_ept_model

    if sizes is None:
        most = Profile.of(backbone).text_limit(config.prompt_tokens)
        wanted = config.max_length + (config.max_target_length if config.task == "causal" else 0)
        length = wanted if most is None else max(min(wanted, most), 1)
        sizes = config.prompt_config(embedding_width(backbone), length)
    folder = Path(config.model)
    return get_ept_model(
        backbone,
        sizes,
        WRAPPER_TASKS[config.task],
        base_model=str(folder.resolve()) if folder.is_dir() else config.model,
        init=config.init,
        prototypes=config.prototypes,
        prototype_layer=config.prototype_layer,
        generator=torch.Generator().manual_seed(config.seed),
        **how,
    )


def _row_facts(
    adapters: Mapping[str, Adapter], trainer: PromptTrainer, tasks: Mapping[str, TaskData]
) -> dict[str, Any]:
    """Facts of the rows: of the only task, or of each by name."""
    found = {}
    for name, adapter in adapters.items():
        rows, others = trainer.rows_of(name)
        facts = {
            "train": len(rows),
            "train_cut": rows.num_cut,
            "evaluation": len(others),
            "evaluation_source": tasks[name].evaluation.source,
            "evaluation_cut": others.num_cut,
            "max_length": adapter.max_length,
        }
        if adapter.form is not None:
            facts |= {
                "targets": adapter.form.targets,
                "train_targets_cut": rows.num_targets_cut,
                "evaluation_targets_cut": others.num_targets_cut,
            }
        found[name] = facts
    return _by_name(found)  # type: ignore[no-any-return]


def _gate_weights(adapters: Mapping[str, Adapter]) -> Any:
    """The gate's weights of each token and subspace; by name, if tasks have gates of their own."""
    prompts: dict[str, Any] = {name: adapter.model.prompt for name, adapter in adapters.items()}
    (first, *_) = prompts.values()
    if not first.has_gate:
        return None
    if not first.shared:  # one prompt for all
        return first.gate_weights().cpu().tolist()
    return _by_name({n: prompt.gate_weights().cpu().tolist() for n, prompt in prompts.items()})


def _facts(
    config: TrainConfig, adapters: Mapping[str, Adapter], trainer: PromptTrainer
) -> dict[str, Any]:
    import transformers

    model = trainer.trained
    kind = model.device.type
    on_gpu = kind == "cuda"
    return {
        "curves": {"loss": trainer.losses, "evaluation": trainer.evaluations},
        "steps": trainer.state.global_step,
        "seconds_per_step": statistics.median(trainer.seconds),
        "tokens": parallel.total(trainer.tokens),
        "positions": parallel.total(trainer.positions),
        "parameters": model.parameter_counts(),
        "prompt": model.prompt.config.to_dict(),
        "gate_weights": _gate_weights(adapters),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_memory(),
        "device": torch.cuda.get_device_name()
        if on_gpu
        else f"{platform.machine()} {kind.upper()}",
        "threads": torch.get_num_threads(),
        "processes": parallel.world_size(),
        "bf16": trainer.bf16,
        "labels": _by_name({name: list(a.model.labels) for name, a in adapters.items()}),
        "metric": config.judged_by,
        "loss": _LOSSES.get(config.problem_type or "", "cross-entropy (nats)"),
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
