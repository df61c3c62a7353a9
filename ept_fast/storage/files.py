"""Adapter files, safetensors and JSON: written whole or not at all, read whole or refused."""

from __future__ import annotations

import io
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialize_tensors
from safetensors.torch import save as serialize_tensors
from torch import Tensor

from ept_fast.storage.untrusted import (
    FILE_LIMIT,
    CheckpointError,
    check_size,
    open_inside,
    parse_json,
    read_adapter_json,
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

# No library makes more, and the product of more of a header's counts could take for ever.
_MOST_AXES = 64

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Of one value.
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class WriteError(OSError):
    """A file that cannot be written, as on a full disk; ``errno`` says why."""

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
    """A safetensors file of anyone, whose header is checked before any value is read.

    Args:
        path: the file.
        data: its contents, if they have been read already.

    Attributes:
        path: as given.
        metadata: texts that the header holds.
        shapes: of every tensor, by name.

    Raises:
        CheckpointError: as :func:`~ept_fast.storage.untrusted.read_file`, truncated or damaged.
    """

    def __init__(self, path: Path, data: bytes | None = None) -> None:
        self.path, self._data = path, data
        with self._open() as (file, size):
            self.metadata, self.shapes = _header(path, file, size)

    @contextmanager
    def _open(self) -> Iterator[tuple[BinaryIO, int]]:
        if self._data is not None:
            yield io.BytesIO(self._data), len(self._data)
        else:
            with open_inside(self.path) as file:
                yield file, os.fstat(file.fileno()).st_size

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
        """The tensors, on the CPU; once, if the contents were given.

        Args:
            expected: the shape of every tensor; a file with others is refused before its values
                are read, and one with values that are not finite floats after.
            others: leave out tensors that are not expected, which are an error otherwise.

        Raises:
            CheckpointError: as for the class, or not as expected.
        """
        with self._open() as (file, size):
            if others:
                check_size(self.path, size, FILE_LIMIT)
            self.metadata, self.shapes = _header(self.path, file, size)  # of what is read now
            if expected is not None:
                check_shapes(self.path, self.shapes, expected, others=others)
            file.seek(0)
            data = file.read()
        self._data = None
        try:
            tensors = deserialize_tensors(data)
        except (SafetensorError, KeyError, RuntimeError, AssertionError) as error:
            raise CheckpointError(
                f"{self.path}: expected a whole safetensors file, got: {shorten(str(error))}"
            ) from None
        if expected is not None:
            tensors = {name: tensors[name] for name in expected}
            check_tensors(self.path, tensors, expected)
        return tensors


def _header(
    path: Path, file: BinaryIO, size: int
) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """The checked metadata and shapes of a safetensors file."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8 or length > HEADER_LIMIT:
        raise CheckpointError(
            f"{path}: expected a whole safetensors file, got {size} bytes with a header of "
            f"{length} (at most {HEADER_LIMIT})"
        )
    entries = parse_json(path, file.read(length))
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__: expected texts, got {shorten(metadata)}")
    shapes: dict[str, tuple[int, ...]] = {}
    places: list[tuple[int, int]] = []
    for name, entry in entries.items():
        if not _describes_tensor(entry):
            raise CheckpointError(
                f"{path}: {shorten(name)}: expected a tensor's dtype, shape and data_offsets that "
                f"fit each other, got {shorten(entry)}"
            )
        shapes[name] = tuple(entry["shape"])
        places.append((entry["data_offsets"][0], entry["data_offsets"][1]))
    # One behind the other up to the end, so that reading takes what the shapes say and no more.
    end = 0
    for first, behind in sorted(places):
        if first != end:
            raise CheckpointError(
                f"{path}: expected a whole safetensors file, got a header whose next tensor after "
                f"byte {end} begins at {first}"
            )
        end = behind
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path}: expected a whole safetensors file, got {size} bytes with a header for "
            f"{8 + length + end}"
        )
    return metadata, shapes


def _describes_tensor(entry: Any) -> bool:
    """Whether an entry of a header has a known type, a shape and the bytes for both."""
    if not isinstance(entry, dict):
        return False
    dtype, shape, place = (entry.get(name) for name in ("dtype", "shape", "data_offsets"))
    bits = _BITS.get(dtype) if isinstance(dtype, str) else None
    return (
        bits is not None
        and _are_counts(shape)
        and _are_counts(place)
        and len(place) == 2
        and 8 * (place[1] - place[0]) == bits * math.prod(shape)
    )


def _are_counts(values: object) -> TypeGuard[list[int]]:
    return (
        isinstance(values, list)
        and len(values) <= _MOST_AXES
        and all(type(n) is int and 0 <= n < 2**63 for n in values)
    )


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
        # aminmax needs half the memory of isfinite over every value.
        if tensor.numel() and not all(extreme.isfinite() for extreme in tensor.aminmax()):
            raise CheckpointError(f"{path}: {name}: expected finite values, got NaN or infinity")
