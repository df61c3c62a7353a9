"""Files that may come from anywhere: opened in their own folder only, parsed strictly."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

__all__ = [
    "FILE_LIMIT",
    "JSON_LIMIT",
    "CheckpointError",
    "check_size",
    "load_json",
    "open_inside",
    "parse_json",
    "read_adapter_json",
    "read_file",
    "read_json",
    "shorten",
]

# Bytes; no adapter's description comes near.
JSON_LIMIT = 4 << 20

# Bytes of a file that is read or hashed whole before it is known what is in it.
FILE_LIMIT = 1 << 30

_JSON_DEPTH = 32

# What the hub's cache calls a blob that repositories share.
_HASH = re.compile("[0-9a-f]{64}")

# Bits of an integer that a message shows.
_LONGEST_INTEGER = 1024


class CheckpointError(ValueError):
    """An adapter file that is missing, truncated, foreign, or at odds with its config or module."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: no such file, not JSON (a repeated key or NaN is an error), nested deeper
            than anything that is written here, or not an object.
    """
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    return parse_json(path, data)


def read_adapter_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from an adapter's folder, which may come from anywhere.

    Raises:
        CheckpointError: as :func:`read_json` and :func:`read_file`.
    """
    return parse_json(path, read_file(path, limit=JSON_LIMIT))


def read_file(path: Path, *, limit: int | None = None) -> bytes:
    """The bytes of a file in an adapter's folder.

    Raises:
        CheckpointError: no regular file, a link that leads out of the folder, or more than
            ``limit`` bytes.
    """
    with open_inside(path) as file:
        if limit is not None:
            check_size(path, os.fstat(file.fileno()).st_size, limit)
        return file.read()


def check_size(path: Path, size: int, limit: int) -> None:
    """Raise CheckpointError if a file has more than ``limit`` bytes."""
    if size > limit:
        raise CheckpointError(f"{path}: expected at most {limit} bytes, got {size}")


@contextmanager
def open_inside(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file that lies in the folder in which it is named.

    That holds for the file also if a link takes its place meanwhile. It does not for the folders
    above: who may replace one of them by a link can have another folder's file read.

    Raises:
        CheckpointError: no such file, no regular one, or a link that leads out of the folder.
    """
    try:
        folder, real = path.parent.resolve(strict=True), path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:  # also a loop of links, NUL in a name
        raise _unreadable(path, error) from None
    if not (real.is_relative_to(folder) or _in_hub_cache(folder, real)):
        raise CheckpointError(f"{path}: expected a file in this folder, got a link that leaves it")
    # Neither waiting for a pipe's writer nor following a link put there since.
    flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    try:
        with open(real, "rb", opener=lambda name, mode: os.open(name, mode | flags)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise CheckpointError(f"{path}: expected a regular file, got another kind of file")
            yield file
    except OSError as error:
        raise _unreadable(path, error) from None


def _in_hub_cache(folder: Path, real: Path) -> bool:
    """Whether the Hugging Face hub's cache keeps this file for the snapshot that the folder is in.

    A snapshot's folder links to the blobs of its repository. Where repositories share their blobs,
    these are links to blobs of the whole cache, which are named by their hashes.
    """
    for parent in folder.parents:
        if parent.name == "snapshots":
            repository = parent.parent
            if real.parent == repository / "blobs":
                return True
            shared = repository.parent / "blobs" / real.name[:2]
            named = repository.name.startswith("models--") and _HASH.fullmatch(real.name)
            return bool(named) and real.parent == shared
    return False


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return CheckpointError(f"{path}: expected a readable file, got {reason}")


def parse_json(path: Path, data: bytes | str) -> dict[str, Any]:
    """The JSON object in ``data``, which comes from ``path``; errors as :func:`read_json`."""
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        values = load_json(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: expected a JSON object, got damaged text ({error})"
        ) from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(values).__name__}")
    level: list[Any] = [values]
    for _ in range(_JSON_DEPTH):
        level = [inner for value in level for inner in _containers(value)]
    if level:
        raise CheckpointError(f"{path}: expected at most {_JSON_DEPTH} levels of JSON, got more")
    return values


def load_json(text: str, **hooks: Any) -> Any:
    """``json.loads``, for which a repeated key is an error, as is an integer beyond reading."""
    return json.loads(text, object_pairs_hook=_unique, parse_int=_integer, **hooks)


def _containers(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value
    return [each for each in inner if isinstance(each, (dict, list))]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {shorten(key)} twice")
        values[key] = value
    return values


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # Python's own message advises a change to the interpreter
        raise ValueError(f"an integer of {len(text.lstrip('-'))} digits") from None


def _no_number(text: str) -> Any:
    raise ValueError(f"{text}, which is not JSON")


def shorten(value: object, length: int = 300) -> str:
    """``repr`` for a message, cut: of what JSON and pickles hold, no more is written than is shown.

    The values of a damaged file can make it endless, and Python writes no integer of 4,301 digits.
    """
    text = ""
    for piece in _pieces(value, length):
        text += piece
        if len(text) > length:
            return f"{text[:length]}..."
    return text


def _pieces(value: object, length: int) -> Iterator[str]:
    """What joins to the ``repr``; a level begins with a bracket, so that they end before Python."""
    if isinstance(value, str):
        yield repr(value[: length + 1])
    elif isinstance(value, int) and value.bit_length() > _LONGEST_INTEGER:
        yield f"an integer of {value.bit_length()} bits"
    elif isinstance(value, dict):
        yield "{"
        for number, (key, each) in enumerate(value.items()):
            yield ", " if number else ""
            yield from _pieces(key, length)
            yield ": "
            yield from _pieces(each, length)
        yield "}"
    elif isinstance(value, (list, tuple)):
        yield "[" if isinstance(value, list) else "("
        for number, each in enumerate(value):
            yield ", " if number else ""
            yield from _pieces(each, length)
        yield "]" if isinstance(value, list) else ",)" if len(value) == 1 else ")"
    else:
        yield repr(value)
