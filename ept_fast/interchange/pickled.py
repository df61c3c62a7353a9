"""Tensor files that ``torch.save`` wrote, read without running anything that stands in them.

The few instructions that a dict of tensors needs are followed here, and no others. They make a
description of each tensor: its type, its sizes and its place in a record of the archive. The values
are then read from there. Whatever else is made on the way is told apart by its type alone: it is
never compared, hashed or written out, which takes for ever where a value holds another many times.
"""

from __future__ import annotations

import math
import os
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor

from ept_fast.storage.files import check_shapes, check_tensors
from ept_fast.storage.untrusted import FILE_LIMIT, CheckpointError, check_size, open_inside, shorten

__all__ = ["PickledState"]

# Bytes of instructions: those of three tensors take four hundred.
_PICKLE_LIMIT = 8 << 10

# Bytes that are read at once; the archive's directory is, with sixty bytes for a record.
_PART = 1 << 20


class PickledState:
    """A state dict in a file of ``torch.save``: its shapes at once, its values on demand.

    Raises:
        CheckpointError: no such file, damaged, older than the format of PyTorch 1.6, or with
            anything in it but a dict of dense tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _opened(path) as (_, tensors):
            self.shapes = _shapes(tensors)

    def load(
        self, expected: Mapping[str, tuple[int, ...]], *, others: bool = False
    ) -> dict[str, Tensor]:
        """The tensors of these names and shapes, on the CPU, no two with values in common.

        Raises:
            CheckpointError: other names (unless ``others``) or shapes, no finite floats.
        """
        # Described once more, since another file may stand there by now.
        with _opened(self.path) as (archive, tensors):
            check_shapes(self.path, _shapes(tensors), expected, others=others)
            loaded = {name: archive.tensor(tensors[name]) for name in expected}
        check_tensors(self.path, loaded, expected)
        return loaded


@contextmanager
def _opened(path: Path) -> Iterator[tuple[_Archive, dict[str, _Described]]]:
    """A file's records and its tensors; what is wrong with either is a CheckpointError."""
    with open_inside(path) as file:
        check_size(path, os.fstat(file.fileno()).st_size, FILE_LIMIT)
        with _expecting(path, "a file that torch.save wrote (PyTorch 1.6 or newer)"):
            archive = _Archive(file)
        with _expecting(path, "a dict of tensors and nothing else"):
            yield archive, _describe_all(archive)


@contextmanager
def _expecting(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # damage leads to all kinds of them
        got = shorten(f"{type(error).__name__}: {error}")
        raise CheckpointError(f"{path}: expected {what}, got {got}") from None


def _shapes(tensors: Mapping[str, _Described]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


# The archive


class _Storage(NamedTuple):
    """A run of values of one type: the whole of a record."""

    dtype: torch.dtype
    length: int
    record: str


class _Described(NamedTuple):
    """A tensor without its values."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Parts:
    """A file of which no more than a part is read at once, whatever an archive says of itself."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable
        self._read = file.read

    def read(self, size: int = -1) -> bytes:
        if size > _PART:
            raise ValueError(f"{size} bytes that are not of a record")
        return self._read(size if size >= 0 else _PART)


class _Archive:
    """The records of a file, by their names in torch's folder; each is read for itself."""

    def __init__(self, file: BinaryIO) -> None:
        self._zip = zipfile.ZipFile(cast(IO[bytes], _Parts(file)))
        entries = self._zip.infolist()
        if any(e.compress_type != zipfile.ZIP_STORED for e in entries):
            raise ValueError("a compressed record")
        names = [e.filename for e in entries]
        if len(set(names)) < len(names):
            raise ValueError("two records of one name")
        roots = [name for name in names if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError(f"{len(roots)} records data.pkl")
        self._root = roots[0].removesuffix("data.pkl")
        if f"{self._root}byteorder" in names and self.read("byteorder", 8) != b"little":
            raise ValueError("values of another byte order than little")

    def size(self, name: str) -> int:
        """Bytes of a record."""
        return self._zip.getinfo(f"{self._root}{name}").file_size

    def read(self, name: str, limit: int = FILE_LIMIT) -> bytearray:
        """A whole record, whose checksum zipfile compares."""
        if self.size(name) > limit:
            raise ValueError(f"{self.size(name)} bytes of {name}, more than {limit}")
        data = bytearray()
        with self._zip.open(f"{self._root}{name}") as record:
            while part := record.read(_PART):
                data += part
        return data

    def tensor(self, described: _Described) -> Tensor:
        """A tensor with its values, in memory of its own."""
        storage, offset, shape, stride = described
        if not math.prod(shape):
            return torch.empty(shape, dtype=storage.dtype)
        values = torch.frombuffer(self.read(storage.record), dtype=storage.dtype)
        tensor = values.as_strided(shape, stride, offset)
        whole = tensor.is_contiguous() and tensor.numel() == storage.length
        return tensor if whole else tensor.clone()


# The instructions


def _describe_all(archive: _Archive) -> dict[str, _Described]:
    """The state dict that the instructions make."""
    state = _follow(archive.read("data.pkl", _PICKLE_LIMIT), archive)
    if type(state) is not dict:
        raise ValueError(_kind(state))
    return state


def _follow(text: bytearray, archive: _Archive) -> Any:
    """What the instructions make, which are those of a dict of tensors in torch.save's protocol."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def taken(count: int) -> list[Any]:
        return [stack.pop() for _ in range(count)][::-1]

    argument: Any
    for instruction, argument, _ in pickletools.genops(text):
        match instruction.name:
            case "PROTO":
                pass
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE" as name:
                stack.append(name == "NEWTRUE")
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                _fill(stack, taken(2))
            case "SETITEMS":
                _fill(stack, taken(len(stack) - marks.pop()))
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                stack.append(tuple(taken(int(name[-1]))))
            case "TUPLE":
                stack.append(tuple(taken(len(stack) - marks.pop())))
            case "MARK":
                marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                if argument not in _NAMES:
                    raise ValueError(f"the name {shorten(argument)}")
                stack.append(_NAMES[argument])
            case "BINPERSID":
                stack.append(_storage(stack.pop(), archive))
            case "REDUCE":
                function, arguments = taken(2)
                # One of the names, or Python would write out what it cannot call.
                if not callable(function) or type(arguments) is not tuple:
                    raise ValueError(f"a call of {_kind(function)} with {_kind(arguments)}")
                stack.append(function(*arguments))
            case "STOP":
                return stack.pop()
            case name:
                raise ValueError(f"the instruction {name}")
    raise ValueError("no end")


def _fill(stack: list[Any], items: list[Any]) -> None:
    """Put tensors into the dict on top of the stack; no dict gets anything else."""
    for name, value in zip(items[::2], items[1::2], strict=True):
        if type(name) is not str or type(value) is not _Described:
            raise ValueError(f"{_kind(value)} under the key {_kind(name)}")
        stack[-1][name] = value


def _kind(value: Any) -> str:
    """A value in a message: itself where it is a text or an integer, else its type."""
    if type(value) in (str, int):
        return shorten(value)
    return "a tensor" if type(value) is _Described else type(value).__name__


def _storage(pid: Any, archive: _Archive) -> _Storage:
    kind, dtype, key, _, length = pid
    if kind != "storage" or type(dtype) is not torch.dtype or type(key) is not str:
        raise ValueError(f"a persistent {_kind(kind)} of {_kind(dtype)} in {_kind(key)}")
    _check_counts(length)
    size = archive.size(f"data/{key}")
    if length * dtype.itemsize != size:
        raise ValueError(f"a storage of {length} {dtype} in a record of {size} bytes")
    return _Storage(dtype, length, f"data/{key}")


def _tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any
) -> _Described:
    if type(storage) is not _Storage or type(shape) is not tuple or type(stride) is not tuple:
        raise ValueError("a tensor without storage and shape")
    _check_counts(offset, *shape, *stride)
    if math.prod(shape):
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if last >= storage.length or math.prod(shape) > storage.length:
            raise ValueError(f"shape {shorten(shape)} in a storage of {storage.length} values")
    return _Described(storage, offset, shape, stride)


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> Any:
    return data


def _hooks() -> dict[Any, Any]:
    return {}


def _check_counts(*values: Any) -> None:
    for value in values:
        if type(value) is not int or value < 0:
            raise ValueError(f"the size {_kind(value)}")


# What stands for each name that instructions may give.
_NAMES: dict[str, Any] = {
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
    "collections OrderedDict": _hooks,
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
