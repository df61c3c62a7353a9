"""A folder as PEFT writes it: ``adapter_config.json`` beside the tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ept_fast.config import check_count, check_number
from ept_fast.interchange.pickled import PickledState
from ept_fast.storage.files import TensorFile
from ept_fast.storage.untrusted import CheckpointError, read_adapter_json, shorten

__all__ = [
    "CONFIG_FILE",
    "PICKLE_FILE",
    "PROMPT",
    "TASK_TYPES",
    "TENSOR_FILE",
    "AdapterConfig",
    "StateFile",
    "first_prompt",
    "naming",
    "open_state",
]

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"

# The tensor that every kind of prompt tuning has.
PROMPT = "prompt_embeddings"

TASK_TYPES = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors about values that came from this file name it."""
    try:
        yield
    except CheckpointError:
        raise
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {str(error)[:1000]}") from None


@dataclass(frozen=True)
class AdapterConfig:
    """``adapter_config.json``: read as it is, each field checked when it is asked for."""

    path: Path
    values: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path, peft_type: str, readers: Mapping[str, str]) -> AdapterConfig:
        """The config of an adapter of this type.

        Args:
            folder: the adapter's folder.
            peft_type: the type that is wanted.
            readers: for other types, the function that reads them.

        Raises:
            CheckpointError: no JSON object, or of another type.
        """
        path = folder / CONFIG_FILE
        values = read_adapter_json(path)
        got = values.get("peft_type")
        if got != peft_type:
            other = readers.get(got) if isinstance(got, str) else None
            hint = f" ({other} reads those)" if other else ""
            raise CheckpointError(
                f"{path}: peft_type: expected {peft_type}, got {shorten(got)}{hint}"
            )
        return cls(path, values)

    def count(self, name: str, minimum: int) -> int:
        """An integer field."""
        with naming(self.path):
            self._check_given(name)
            check_count(name, self.values[name], minimum)
        return int(self.values[name])

    def number(self, name: str) -> float:
        """A real field."""
        with naming(self.path):
            self._check_given(name)
            check_number(name, self.values[name])
        return float(self.values[name])

    @property
    def task_type(self) -> str | None:
        """One of :data:`TASK_TYPES`, or None."""
        task = self.values.get("task_type")
        if task is not None and task not in TASK_TYPES:
            raise CheckpointError(
                f"{self.path}: task_type: expected one of {', '.join(TASK_TYPES)}, "
                f"got {shorten(task)}"
            )
        return task

    @property
    def copies(self) -> int:
        """How many prompts stand one behind the other in the tensor; the first is the encoder's.

        By default PEFT makes two for an encoder-decoder, and in prompt tuning neither trains nor
        uses the second one.
        """
        task = self.task_type
        most = 2 if task == "SEQ_2_SEQ_LM" else 1
        if self.values.get("num_transformer_submodules") is None:
            return most
        copies = self.count("num_transformer_submodules", 1)
        if copies > most:
            raise CheckpointError(
                f"{self.path}: num_transformer_submodules: expected at most {most} for task_type "
                f"{task}, got {copies}"
            )
        return copies

    def _check_given(self, name: str) -> None:
        if name not in self.values:
            raise ValueError(f"{name}: expected a value, got none")


def first_prompt(prompts: Tensor, rows: int) -> Tensor:
    """The first of several prompts, without memory for the others."""
    return prompts if len(prompts) == rows else prompts[:rows].clone()


class StateFile(Protocol):
    """A file of tensors whose names and shapes are known before any value is read."""

    path: Path
    shapes: dict[str, tuple[int, ...]]

    def load(
        self, expected: Mapping[str, tuple[int, ...]], *, others: bool = False
    ) -> dict[str, Tensor]:
        """The tensors of these names and shapes; others are an error unless they are allowed."""


def open_state(folder: Path) -> StateFile:
    """The folder's tensors: from safetensors, or else from ``torch.save``.

    Raises:
        CheckpointError: neither, damaged, or foreign.
    """
    if os.path.lexists(folder / TENSOR_FILE):
        return TensorFile(folder / TENSOR_FILE)
    if os.path.lexists(folder / PICKLE_FILE):
        return PickledState(folder / PICKLE_FILE)
    raise CheckpointError(f"{folder}: expected {TENSOR_FILE} or {PICKLE_FILE}, got neither")
