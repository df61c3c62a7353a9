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
    "json_bytes",
    "read_json",
    "read_tensors",
    "tensor_bytes",
    "write_bytes",
    "write_files",
    "write_json",
    "write_tensors",
]

FORMAT = "ept_fast"
FORMAT_VERSION = "1"

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class CheckpointError(ValueError):
    """An adapter file that is missing, truncated, foreign, or at odds with its config or module."""


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write each file whole or not at all: temporary files, flushed to disk, then all renamed.

    What fails before the renames (a full disk, say) leaves every older file as it was.
    """
    waiting: list[tuple[str, Path]] = []
    try:
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            waiting.append((name, path))
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)  # mkstemp makes it private; an adapter is an ordinary file
        while waiting:
            os.replace(*waiting[0])
            waiting.pop(0)
    except BaseException:
        for name, _ in waiting:
            os.unlink(name)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write one file whole or not at all."""
    write_files({path: data})


def json_bytes(values: Mapping[str, Any]) -> bytes:
    """A JSON object as text; NaN and infinity are refused."""
    return (json.dumps(values, indent=2, allow_nan=False) + "\n").encode()


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object atomically; NaN and infinity are refused."""
    write_bytes(path, json_bytes(values))


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
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: expected a JSON object, got damaged text ({error})"
        ) from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def tensor_bytes(tensors: Mapping[str, Tensor], config: str) -> bytes:
    """Tensors and the JSON text of their config in the safetensors format.

    Raises:
        ValueError: a tensor with NaN or infinite values, which would never load again.
    """
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name}: expected finite values to save, got NaN or infinity")
    # One key: safetensors writes several in any order, and equal weights shall give equal files.
    metadata = {FORMAT: json.dumps({"format_version": FORMAT_VERSION, "config": config})}
    plain = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    return serialize_tensors(plain, metadata=metadata)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], config: str) -> None:
    """Write what :func:`tensor_bytes` makes, atomically."""
    write_bytes(path, tensor_bytes(tensors, config))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """Read what :func:`write_tensors` wrote: the tensors (on the CPU) and the config's JSON text.

    Raises:
        CheckpointError: no such file, truncated, damaged, or not written by this package.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: expected a whole safetensors file, got: {error}") from None
    return tensors, _config_of(path, metadata)


def _config_of(path: Path, metadata: Mapping[str, str]) -> str:
    try:
        ours = json.loads(metadata[FORMAT])
        version, config = ours["format_version"], ours["config"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise CheckpointError(
            f"{path}: expected a file written by {FORMAT}, got metadata {sorted(metadata)}"
        ) from None
    if version != FORMAT_VERSION or not isinstance(config, str):
        raise CheckpointError(f"{path}: expected format version {FORMAT_VERSION}, got {version!r}")
    return config


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
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(f"{path}: {name}: expected a floating dtype, got {tensor.dtype}")
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {name}: expected finite values, got NaN or infinity")
