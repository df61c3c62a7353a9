"""Adapter files, safetensors and JSON: written whole or not at all, read whole or refused."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialize_tensors
from safetensors.torch import save as serialize_tensors
from torch import Tensor

from ept_fast.storage.untrusted import (
    FILE_LIMIT,
    CheckpointError,
    parse_json,
    read_adapter_json,
    read_file,
    read_json,
    shorten,
)

__all__ = [
    "CheckpointError",
    "TensorFile",
    "WriteError",
    "check_shapes",
    "check_tensors",
    "json_bytes",
    "read_adapter_json",
    "read_json",
    "tensor_bytes",
    "write_bytes",
    "write_files",
    "write_json",
    "writing",
]

FORMAT = "ept_fast"
FORMAT_VERSION = "1"

# Bytes; no adapter's header comes near.
HEADER_LIMIT = 1 << 20

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class WriteError(OSError):
    """A file that cannot be written, as when the disk is full; ``errno`` says why."""

    def __init__(self, place: Path | str, error: OSError) -> None:
        super().__init__(f"{place}: expected a writable file, got {error.strerror or error}")
        self.errno = error.errno
        self._given = (place, error)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._given  # as it goes from one process to another


@contextmanager
def writing(place: Path | str) -> Iterator[None]:
    """Raise a failure to write as a WriteError with the name of this file or folder."""
    try:
        yield
    except (WriteError, BrokenPipeError):  # no one reads any longer: a failure of no kind
        raise
    except OSError as error:
        raise WriteError(place, error) from error


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write each file whole or not at all: temporary files, flushed to disk, then all renamed.

    What fails before the renames (a full disk, say) leaves every older file as it was.

    Raises:
        WriteError: a file cannot be written.
    """
    waiting: list[tuple[str, Path]] = []
    try:
        for path, data in files.items():
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
                waiting.append((name, path))
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.chmod(name, 0o644)  # mkstemp makes it private; an adapter is an ordinary file
        while waiting:
            with writing(waiting[0][1]):
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


class TensorFile:
    """A safetensors file of anyone, read and checked whole.

    Args:
        path: the file.
        data: its contents, if they have been read already.

    Attributes:
        path: as given.
        metadata: texts that the header holds.
        shapes: of every tensor, by name.

    Raises:
        CheckpointError: as :func:`~ept_fast.storage.untrusted.read_file`, too large, truncated or
            damaged.
    """

    def __init__(self, path: Path, data: bytes | None = None) -> None:
        self.path = path
        if data is None:
            data = read_file(path, limit=FILE_LIMIT)
        length = int.from_bytes(data[:8], "little")
        if len(data) < 8 or length > min(len(data) - 8, HEADER_LIMIT):
            raise CheckpointError(
                f"{path}: expected a whole safetensors file, got {len(data)} bytes with a header "
                f"of {length} (at most {HEADER_LIMIT})"
            )
        # safetensors takes a repeated name, and tells no metadata of bytes.
        metadata = parse_json(path, data[8 : 8 + length]).get("__metadata__", {})
        try:
            self._tensors = deserialize_tensors(data)
        except (SafetensorError, KeyError, RuntimeError, AssertionError) as error:
            raise CheckpointError(
                f"{path}: expected a whole safetensors file, got {shorten(str(error))}"
            ) from None
        self.metadata: dict[str, str] = metadata or {}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    @property
    def config(self) -> str:
        """The JSON text of the config that :func:`tensor_bytes` wrote beside the tensors.

        Raises:
            CheckpointError: not a file of this package, or of a later version.
        """
        try:
            ours = parse_json(self.path, self.metadata[FORMAT])
            version, config = ours["format_version"], ours["config"]
        except (KeyError, ValueError):
            raise CheckpointError(
                f"{self.path}: expected a file written by {FORMAT}, "
                f"got metadata {shorten(sorted(self.metadata))}"
            ) from None
        if version != FORMAT_VERSION or not isinstance(config, str):
            raise CheckpointError(
                f"{self.path}: expected format version {FORMAT_VERSION}, got {shorten(version)}"
            )
        return config

    def load(
        self, expected: Mapping[str, tuple[int, ...]] | None = None, *, others: bool = False
    ) -> dict[str, Tensor]:
        """The tensors, on the CPU.

        Args:
            expected: the shape of every tensor, which has to hold finite floats.
            others: leave out tensors that are not expected, which are an error otherwise.

        Raises:
            CheckpointError: not as expected.
        """
        if expected is None:
            return self._tensors
        check_shapes(self.path, self.shapes, expected, others=others)
        tensors = {name: self._tensors[name] for name in expected}
        check_tensors(self.path, tensors, expected)
        return tensors


def check_shapes(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    *,
    others: bool = False,
) -> None:
    """Raise CheckpointError unless names and shapes are these, or these among ``others``."""
    missing = sorted(set(expected) - set(shapes))
    foreign = [] if others else sorted(set(shapes) - set(expected))
    if missing or foreign:
        raise CheckpointError(
            f"{path}: expected the tensors {shorten(sorted(expected))}, "
            f"got {shorten(sorted(shapes))} "
            f"(missing {shorten(missing)}, foreign {shorten(foreign)})"
        )
    for name, shape in expected.items():
        if tuple(shapes[name]) != tuple(shape):
            raise CheckpointError(
                f"{path}: {name}: expected shape {tuple(shape)}, got {shorten(tuple(shapes[name]))}"
            )


def check_tensors(
    path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError unless names and shapes are these and the values finite floats."""
    check_shapes(path, {name: tuple(t.shape) for name, t in tensors.items()}, expected)
    for name in expected:
        tensor = tensors[name]
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(f"{path}: {name}: expected a floating dtype, got {tensor.dtype}")
        # Which isfinite of every value would tell at twice the memory.
        if tensor.numel() and not all(extreme.isfinite() for extreme in tensor.aminmax()):
            raise CheckpointError(f"{path}: {name}: expected finite values, got NaN or infinity")
