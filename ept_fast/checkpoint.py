"""Adapter files, safetensors and JSON: written whole or not at all, read whole or refused."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize_tensors
from torch import Tensor

__all__ = [
    "CheckpointError",
    "check_tensors",
    "read_json",
    "read_tensors",
    "write_bytes",
    "write_json",
    "write_tensors",
]

FORMAT = "ept_fast"
FORMAT_VERSION = "1"


class CheckpointError(ValueError):
    """An adapter file that is missing, truncated, foreign, or at odds with its config or module."""


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: a temporary file beside it, flushed, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes it private; an adapter is an ordinary file
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object atomically; NaN and infinity are refused."""
    write_bytes(path, (json.dumps(values, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: no such file, not JSON, or not an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path}: expected a readable file, got {error.strerror or error}"
        ) from None
    except ValueError as error:
        raise CheckpointError(
            f"{path}: expected a JSON object, got damaged text ({error})"
        ) from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def write_tensors(path: Path, tensors: Mapping[str, Tensor], config: str) -> None:
    """Write tensors and the JSON text of their config into one safetensors file, atomically.

    Raises:
        ValueError: a tensor with NaN or infinite values, which would never load again.
    """
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name}: expected finite values to save, got NaN or infinity")
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, "config": config}
    plain = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    write_bytes(path, serialize_tensors(plain, metadata=metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """Read what :func:`write_tensors` wrote: the tensors (on the CPU) and the config's JSON text.

    Raises:
        CheckpointError: no such file, truncated, damaged, or not written by this package.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or "config" not in metadata:
                raise CheckpointError(
                    f"{path}: expected a file written by {FORMAT}, got metadata {sorted(metadata)}"
                )
            if metadata.get("format_version") != FORMAT_VERSION:
                raise CheckpointError(
                    f"{path}: expected format version {FORMAT_VERSION}, "
                    f"got {metadata.get('format_version')!r}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: expected a whole safetensors file, got: {error}") from None
    return tensors, metadata["config"]


def check_tensors(
    path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError unless names and shapes are these and the values finite floats."""
    missing, foreign = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or foreign:
        raise CheckpointError(
            f"{path}: expected the tensors {sorted(expected)}, got {sorted(tensors)} "
            f"(missing {missing}, foreign {foreign})"
        )
    for name, shape in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != tuple(shape):
            raise CheckpointError(
                f"{path}: {name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {name}: expected a floating dtype, got {tensor.dtype}")
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {name}: expected finite values, got NaN or infinity")
