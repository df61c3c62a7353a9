"""The frozen model, its tokenizer and its adapters, as the server needs them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ept_fast.training.tokens import TextForm
from ept_fast.transformers.adapter import ADAPTER_FILE, SavedAdapter, read_adapter
from ept_fast.transformers.adapter_set import check_adapter_name
from ept_fast.transformers.backbone import Profile, load_backbone, load_tokenizer
from ept_fast.transformers.bank import EPTBank

__all__ = ["Engine", "Task", "find_adapters", "load_engine"]

TASK = "CAUSAL_LM"

_log = logging.getLogger("examples.server")


@dataclass(frozen=True)
class Task:
    """What is known of an adapter besides its tensors.

    Attributes:
        separator: put behind a text, as in training.
        max_text_tokens: of a text with its separator.
        bytes: that it takes in the bank.
    """

    separator: str
    max_text_tokens: int
    bytes: int


@dataclass(frozen=True)
class Engine:
    """A bank that generates, and what turns texts into its token ids.

    Attributes:
        bank: the frozen model and the adapters. Only the worker's thread calls it.
        tokenizer: of the model.
        tasks: the adapters by name. A name that came with a request is looked up here and has no
            other use.
        columns: the most tokens of the longest text and the longest answer of a batch together;
            None without a limit.
        stops: ids that end an answer.
        pad: id that rows are padded with, masked out.
    """

    bank: EPTBank
    tokenizer: Any
    tasks: Mapping[str, Task]
    columns: int | None
    stops: frozenset[int]
    pad: int

    @classmethod
    def of(
        cls,
        model: Any,
        tokenizer: Any,
        adapters: Mapping[str, Path | SavedAdapter],
        max_text_tokens: int,
    ) -> Engine:
        """The engine of a loaded model.

        Args:
            model: a decoder of ``transformers``; it is frozen.
            tokenizer: of the model.
            adapters: the folder of each task's adapter, or what was read from it.
            max_text_tokens: the longest text; less where a task's adapter or the model takes less.

        Raises:
            CheckpointError: a missing, damaged or foreign adapter.
            ValueError: no adapters, or a model without room for any text.
        """
        read = {
            name: each if isinstance(each, SavedAdapter) else read_adapter(each)
            for name, each in adapters.items()
        }
        separators = {name: _separator(saved) for name, saved in read.items()}
        bank = EPTBank.from_adapters(model, read)
        prompt = bank.bank
        longest = prompt.config.num_virtual_tokens
        positions = Profile.of(model).text_limit(longest)
        if positions is not None and positions < 1:
            raise ValueError(
                f"model: expected more than the {longest} positions of the longest prompt, "
                f"got {longest + positions}"
            )
        columns = None if positions is None else positions + 1  # the last new token is not fed
        limits = [max_text_tokens]
        if positions is not None:
            limits.append(positions)
        if prompt.offset_a is not None:
            limits.append(prompt.config.max_length)
        own = prompt.limits[bank.ids(bank.names)].tolist()
        sizes = bank.memory()
        tasks = {
            name: Task(separators[name], min(*limits, limit), sizes[name])
            for name, limit in zip(bank.names, own, strict=True)
        }
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
        stops = frozenset(int(i) for i in ends if i is not None)
        pad = next(i for i in (tokenizer.pad_token_id, *stops, 0) if i is not None)
        return cls(bank, tokenizer, tasks, columns, stops, int(pad))

    def encode(self, name: str, text: str) -> list[int]:
        """Token ids of a text as the task's adapter was trained on it.

        Raises:
            ValueError: a text without tokens, or with more than the task takes; the message does
                not repeat the text.
        """
        task = self.tasks[name]
        ids = list(self.tokenizer(text + task.separator, verbose=False)["input_ids"])
        if ids[-1:] == [self.tokenizer.eos_token_id]:
            ids.pop()
        if not 1 <= len(ids) <= task.max_text_tokens:
            raise ValueError(
                f"text: expected 1 to {task.max_text_tokens} tokens for adapter {name}, "
                f"got {len(ids)}"
            )
        return ids


def _separator(adapter: SavedAdapter) -> str:
    """What ``ept-fast train`` put behind texts; nothing for an adapter that was saved otherwise."""
    saved = adapter.values["extra"].get("form")
    if saved is None:
        return ""
    form = TextForm(**saved)
    return form.separator if form.targets else ""


def find_adapters(folder: Path) -> dict[str, SavedAdapter]:
    """The saved adapters in ``folder``, read and checked, by the task's name.

    Folders without an adapter, and with a log line those whose name cannot be an adapter's, are
    left out.

    Raises:
        CheckpointError: a damaged or foreign adapter.
        ValueError: no adapters, one that is reached by a link out of the folder, or one that is not
            for causal language modelling.
    """
    root = folder.resolve()
    found = {}
    for entry in sorted(root.iterdir()) if root.is_dir() else ():
        place = next((p for p in (entry, entry / "adapter") if (p / ADAPTER_FILE).is_file()), None)
        if place is None:
            continue
        try:
            check_adapter_name(entry.name, ())
        except ValueError as error:
            _log.warning("%s is left out: %s", entry, error)
            continue
        for path in (place, *place.iterdir()):
            if not path.resolve().is_relative_to(root):
                raise ValueError(f"adapters: expected files in {root}, got the link {path}")
        saved = read_adapter(place)
        task = saved.values["task"]
        if task != TASK:
            raise ValueError(f"adapters: {entry.name}: expected task {TASK}, got {task}")
        found[entry.name] = saved
    if not found:
        raise ValueError(f"adapters: expected a folder of saved adapters, got {folder} without")
    return found


def load_engine(model: str, folder: Path, max_text_tokens: int) -> Engine:
    """The engine of a saved model, on a GPU where there is one.

    Args:
        model: folder or hub id of a decoder.
        folder: as in :func:`find_adapters`.
        max_text_tokens: as in :meth:`Engine.of`.

    Raises:
        CheckpointError, ValueError: as there, and nothing loadable under the model's name.
    """
    adapters = find_adapters(folder)
    on_gpu = torch.cuda.is_available()
    backbone = load_backbone(model, TASK, dtype=torch.bfloat16 if on_gpu else torch.float32)
    if on_gpu:
        backbone.to("cuda")
    return Engine.of(backbone, load_tokenizer(model), adapters, max_text_tokens)
