"""Several data sets for one frozen backbone: prompts that share tensors, trained in turn.

Each data set, here a task, has an adapter of its own. The tensors that the prompt method shares are
the same parameters in all of them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ept_fast.prompts.base import Prompt
from ept_fast.training.batches import Collator, GroupedBatches, PackingCollator
from ept_fast.training.config import check_most
from ept_fast.training.data import SUFFIXES
from ept_fast.training.evaluation import Evaluation
from ept_fast.training.tokens import Tokenised
from ept_fast.transformers.adapter_set import check_adapter_name
from ept_fast.transformers.tasks import EPTModel

__all__ = [
    "MultitaskModel",
    "TaskBatches",
    "TaskCollator",
    "TaskEvaluation",
    "TaskRows",
    "task_names",
]


def task_names(sources: Sequence[str]) -> list[str]:
    """A name for each data set, after its folder or file; valid for an adapter, each its own."""
    names: list[str] = []
    for source in sources:
        path = Path(source).resolve()
        stem = path.stem if path.suffix in SUFFIXES else path.name
        base = re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_") or "data"
        if hasattr(nn.ModuleDict(), base) or not re.search(r"[A-Za-z0-9]", base):
            base = f"data-{base}"
        taken = {name.casefold() for name in names}  # some file systems know no case
        tries = itertools.chain([base], (f"{base}-{i}" for i in itertools.count(2)))
        names.append(next(name for name in tries if name.casefold() not in taken))
    return names


class MultitaskModel(nn.Module):
    """One frozen backbone behind a prompt, and a head if the task has one, of each task.

    The tensors that :attr:`ept_fast.prompts.base.Prompt.shared` names are those of the first task
    in all prompts; if it names none, all tensors are, and the tasks learn one prompt.

    Args:
        models: by task; each with one adapter, all on the same backbone.

    Raises:
        ValueError: a name that no adapter can have, another backbone, prompts of other sizes, or
            the backbone's own head, of which it has one only.
    """

    accepts_loss_kwargs = True  # as of an EPTModel

    def __init__(self, models: Mapping[str, EPTModel]) -> None:
        super().__init__()
        (first, *_) = models.values()
        for name, model in models.items():
            check_adapter_name(name, ())
            if model.backbone is not first.backbone:
                raise ValueError(f"models: expected one backbone for all, got another for {name}")
            if model.prompt.config != first.prompt.config:
                raise ValueError(
                    f"models: expected prompts of {first.prompt.config}, got {model.prompt.config} "
                    f"for {name}"
                )
            if model.description.head == "model":
                raise ValueError(
                    f"models: expected linear heads of their own, got the backbone's for {name}"
                )
        self.models = nn.ModuleDict(models)
        for model in models.values():
            _share(first.prompt, model.prompt)

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks, in the order of their turns."""
        return tuple(self.models)

    def of(self, name: str) -> EPTModel:
        """The model of a task."""
        return self.models[name]  # type: ignore[return-value]

    @property
    def prompt(self) -> Prompt:
        """The first task's prompt, whose sizes are those of all."""
        return self.of(self.names[0]).prompt

    @property
    def config(self) -> Any:
        """The backbone's config."""
        return self.of(self.names[0]).config

    @property
    def device(self) -> torch.device:
        """The device of the token embeddings."""
        return self.of(self.names[0]).device

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """As of an EPTModel: DDP need not send a frozen model's buffers."""
        return [
            name for name, _ in self.named_buffers(remove_duplicate=False) if ".backbone." in name
        ]

    def forward(self, task: str, **batch: Any) -> Any:
        """The output of a task's model."""
        return self.models[task](**batch)

    def set_loss_progress(self, progress: float) -> None:
        """As of an EPTModel, for all tasks."""
        for name in self.names:
            self.of(name).set_loss_progress(progress)

    def parameter_groups(self, *rates: float) -> list[dict[str, Any]]:
        """The optimizer groups of all tasks, each parameter once; arguments as of an EPTModel."""
        merged: dict[str, dict[str, Any]] = {}
        for model in map(self.of, self.names):
            for group in model.parameter_groups(*rates):
                kept = merged.setdefault(group["name"], {**group, "params": []})["params"]
                known = {id(p) for p in kept}
                kept += [p for p in group["params"] if id(p) not in known]
        return list(merged.values())

    def parameter_counts(self) -> dict[str, int]:
        """Numbers of parameters: ``prompt`` and ``head`` of all tasks, and ``frozen``."""
        counts = [self.of(name).parameter_counts() for name in self.names]
        prompts = {id(p): p for name in self.names for p in self.of(name).prompt.parameters()}
        return {
            "prompt": sum(p.numel() for p in prompts.values()),
            "head": sum(each["head"] for each in counts),
            "frozen": counts[0]["frozen"],
        }

    def save_pretrained(self, folder: str | Path, **how: Any) -> None:
        """Write each task's adapter into a folder of its name; arguments as of an EPTModel."""
        for name in self.names:
            self.of(name).save_pretrained(Path(folder) / name, **how)

    def load_pretrained(self, folder: str | Path) -> None:
        """Read what :meth:`save_pretrained` wrote; errors as of an EPTModel."""
        for name in self.names:
            self.of(name).load_pretrained(Path(folder) / name)


def _share(first: Prompt, prompt: Prompt) -> None:
    for name in first.shared or dict(first.named_parameters(recurse=False)):
        parameter = getattr(first, name)
        if parameter is not None:
            setattr(prompt, name, parameter)


@dataclass(frozen=True)
class TaskRows:
    """The rows of each task; indexed by a task and what its own rows are indexed by."""

    tasks: Mapping[str, Tokenised]

    def __len__(self) -> int:
        return sum(map(len, self.tasks.values()))

    def __getitem__(self, place: tuple[str, int | Sequence[int]]) -> tuple[str, Any]:
        name, index = place
        return name, self.tasks[name][index]


@dataclass(frozen=True)
class TaskCollator:
    """Makes a task's batches, with its name as ``task``."""

    collator: Collator | PackingCollator

    def __call__(self, rows: Sequence[tuple[str, Any]]) -> dict[str, Tensor | str]:
        return {**self.collator([row for _, row in rows]), "task": rows[0][0]}


@dataclass(eq=False)
class TaskBatches:
    """The batches of a whole run, one optimizer step of each task in turn.

    Attributes:
        tasks: the batches of each, of at least as many steps as its turns.
        num_batches: optimizer steps of the whole run.
    """

    tasks: Mapping[str, GroupedBatches]
    num_batches: int

    def __len__(self) -> int:
        (first, *_) = self.tasks.values()
        return self.num_batches * first.parts

    def __iter__(self) -> Iterator[list[tuple[str, Any]]]:
        streams = {name: iter(batches) for name, batches in self.tasks.items()}
        for name in itertools.islice(itertools.cycle(self.tasks), self.num_batches):
            for _ in range(self.tasks[name].parts):
                yield [(name, row) for row in next(streams[name])]

    def steps_of(self, epochs: float) -> int:
        """As many optimizer steps as the tasks would take for these epochs one after another.

        Raises:
            ValueError: more steps than a run can have.
        """
        steps = sum(batches.steps_of(epochs) for batches in self.tasks.values())
        check_most("max_steps", steps)
        return steps


@dataclass(frozen=True)
class TaskEvaluation:
    """The evaluation of each task, and the means over the tasks."""

    tasks: Mapping[str, Evaluation]

    def __call__(self, model: MultitaskModel) -> dict[str, Any]:
        """The mean of each metric that all tasks have, and all metrics of each under ``tasks``."""
        found = {name: each(model.of(name)) for name, each in self.tasks.items()}
        (first, *others) = found.values()
        shared = [name for name in first if all(name in other for other in others)]
        # Each divided before they are added: a perplexity may be as large as a number can be.
        means = {name: sum(f[name] / len(found) for f in found.values()) for name in shared}
        return {**means, "tasks": found}

    def samples(self, model: MultitaskModel) -> list[dict[str, Any]]:
        """The samples of all tasks, one after another, each with the name of its ``task``."""
        return [
            {"task": name, **sample}
            for name, each in self.tasks.items()
            for sample in each.samples(model.of(name))
        ]
