"""The folder of a saved adapter: prompt, head and a description with the checksums of both."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ept_fast.checkpoint import (
    check_shapes,
    json_bytes,
    read_header,
    read_tensors,
    tensor_bytes,
    write_files,
)
from ept_fast.config import EPTConfig
from ept_fast.integrations import POOLINGS, TASKS
from ept_fast.module import CONFIG_FILE, TENSOR_FILE, read_prompt_config
from ept_fast.reading import (
    FILE_LIMIT,
    CheckpointError,
    check_size,
    open_inside,
    read_adapter_json,
    shorten,
)

__all__ = [
    "ADAPTER_FILE",
    "HEAD_FILE",
    "adapter_files",
    "read_adapter",
    "read_config",
    "read_head",
    "write_adapter",
]

ADAPTER_FILE = "adapter.json"
HEAD_FILE = "head.safetensors"

_FORMAT: dict[str, Any] = {"format": "ept_fast", "format_version": 2}
_FIELDS: dict[str, tuple[type, ...]] = {
    "task": (str,),
    "base_model": (str, type(None)),
    "base_model_type": (str, type(None)),
    "labels": (list, type(None)),
    "pooling": (str, type(None)),
    "head": (str, type(None)),
    "head_dropout": (float, int),
    "sha256": (dict,),
    "extra": (dict,),
}


def adapter_files(
    prompt: Mapping[str, bytes],
    head: Mapping[str, Tensor] | None,
    values: Mapping[str, Any],
    config: EPTConfig,
) -> dict[str, bytes]:
    """The files of an adapter by their names: those of its prompt, its head, its description.

    The description comes last: it holds the checksums of the other files, so that a folder cut off
    half-way is refused by :func:`read_adapter`.
    """
    files = dict(prompt)
    if head is not None:
        files[HEAD_FILE] = tensor_bytes(head, config.to_json())
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    return {**files, ADAPTER_FILE: json_bytes({**_FORMAT, **values, "sha256": sums})}


def write_adapter(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write what :func:`adapter_files` made, in its order."""
    write_files({folder / name: data for name, data in files.items()})
    if HEAD_FILE not in files:
        (folder / HEAD_FILE).unlink(missing_ok=True)  # of an adapter that stood here before


def read_adapter(folder: str | Path) -> dict[str, Any]:
    """The checked description of an adapter.

    Returns:
        ``task``, ``base_model``, ``base_model_type``, ``labels``, ``pooling``, ``head``
        (``"linear"``, ``"model"`` or None), ``head_dropout``, ``sha256`` and ``extra``.

    Raises:
        CheckpointError: missing or foreign, a file is not the one it was written with, or the head
            is none for these labels.
    """
    folder = Path(folder)
    path = folder / ADAPTER_FILE
    values = read_adapter_json(path)
    missing = sorted({*_FORMAT, *_FIELDS} - set(values))
    if missing or any(values[name] != value for name, value in _FORMAT.items()):
        got = f"no {', '.join(missing)}" if missing else shorten({n: values[n] for n in _FORMAT})
        raise CheckpointError(f"{path}: expected an adapter with {_FORMAT}, got {got}")
    foreign = sorted(set(values) - {*_FORMAT, *_FIELDS})
    if foreign:
        raise CheckpointError(
            f"{path}: expected the fields {sorted({*_FORMAT, *_FIELDS})}, "
            f"got also {shorten(foreign)}"
        )
    for name, kinds in _FIELDS.items():
        if not isinstance(values[name], kinds) or isinstance(values[name], bool):
            names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            raise CheckpointError(
                f"{path}: {name}: expected {names}, got {type(values[name]).__name__}"
            )
    choices = {"task": TASKS, "pooling": (*POOLINGS, None), "head": ("linear", "model", None)}
    for name, allowed in choices.items():
        if values[name] not in allowed:
            raise CheckpointError(
                f"{path}: {name}: expected one of {allowed}, got {shorten(values[name])}"
            )
    if (values["pooling"] is None) != (values["task"] != "SEQ_CLS"):
        raise CheckpointError(
            f"{path}: pooling: expected one for task SEQ_CLS and null for others, "
            f"got {values['pooling']!r} for {values['task']}"
        )
    labels = values["labels"]
    if (labels is None) != (values["head"] is None):
        raise CheckpointError(
            f"{path}: labels: expected strings beside a head and null without, "
            f"got {shorten(labels)} for head {values['head']!r}"
        )
    if labels is not None and not all(isinstance(label, str) for label in labels):
        raise CheckpointError(f"{path}: labels: expected strings, got {shorten(labels)}")
    if not 0 <= values["head_dropout"] < 1:
        raise CheckpointError(
            f"{path}: head_dropout: expected 0 <= head_dropout < 1, "
            f"got {shorten(values['head_dropout'])}"
        )
    sums, expected = _checksums(folder, values["head"] is not None), values["sha256"]
    others = [name for name in {**sums, **expected} if sums.get(name) != expected.get(name)]
    if others:
        raise CheckpointError(
            f"{path}: sha256: expected the files it was saved with, got others for "
            f"{shorten(others)} (damaged, or a save that was cut off)"
        )
    if values["head"] is not None:
        _check_head(folder, labels if values["head"] == "linear" else None)
    return values


def _check_head(folder: Path, labels: list[str] | None) -> None:
    """Raise CheckpointError unless the head is whole, and a linear one has a row for each label.

    Before anything is built for the labels, of which a damaged file can have any number.
    """
    path = folder / HEAD_FILE
    shapes = read_header(path).shapes
    if labels is not None:
        width = shapes.get("weight", (0,))[-1:]
        check_shapes(path, shapes, {"weight": (len(labels), *width), "bias": (len(labels),)})
    read_tensors(path, shapes)


def read_config(folder: Path, width: int) -> EPTConfig:
    """The config of the prompt in an adapter's folder, for embeddings of this width."""
    path = folder / CONFIG_FILE
    config, num_tasks = read_prompt_config(folder)
    if num_tasks is not None:
        raise CheckpointError(f"{path}: num_tasks: expected null, got {num_tasks}")
    if config.hidden_size != width:
        raise CheckpointError(
            f"{path}: hidden_size: expected {width} as in the backbone, got {config.hidden_size}"
        )
    return config


def read_head(folder: Path, head: nn.Module) -> dict[str, Tensor]:
    """The tensors of a head of these very sizes."""
    own = head.state_dict()
    path = folder / HEAD_FILE
    tensors, _ = read_tensors(path, {name: tuple(p.shape) for name, p in own.items()})
    for name, value in tensors.items():
        if not bool(torch.isfinite(value.to(own[name].dtype)).all()):
            raise CheckpointError(
                f"{path}: {name}: expected values in the range of {own[name].dtype}, "
                f"got larger ones in {value.dtype}"
            )
    return tensors


def _checksums(folder: Path, head: bool) -> dict[str, str]:
    names = (CONFIG_FILE, TENSOR_FILE, *((HEAD_FILE,) if head else ()))
    return {name: _checksum(folder / name) for name in names}


def _checksum(path: Path) -> str:
    with open_inside(path) as file:
        check_size(path, file, FILE_LIMIT)
        return hashlib.file_digest(file, "sha256").hexdigest()
