"""Tensor files that ``torch.save`` wrote, read without running anything that stands in them.

``torch.load(weights_only=True)`` runs no code, but it allocates what a file declares. So the
instructions are read first: by ``pickle.Unpickler`` with every name replaced by one that only
describes a tensor, after the instructions that a state dict has no use for are refused.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ept_fast.checkpoint import check_shapes, check_tensors
from ept_fast.reading import FILE_LIMIT, CheckpointError, read_file, shorten

__all__ = ["PickledState"]

# Bytes of instructions: those of three tensors take four hundred.
_PICKLE_LIMIT = 8 << 10

# A dict of tensors needs these, in the protocol of torch.save.
_INSTRUCTIONS = {
    *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BINPERSID", "NONE", "NEWTRUE", "NEWFALSE"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    *("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"),
}
_PUTS = ("BINPUT", "LONG_BINPUT")
_GETS = ("BINGET", "LONG_BINGET")
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class PickledState:
    """A state dict in a file of ``torch.save``: its shapes at once, its values on demand.

    Raises:
        CheckpointError: no such file, damaged, older than the format of PyTorch 1.6, or with
            anything in it but a dict of dense tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records = _read_records(path, read_file(path, limit=FILE_LIMIT))
        try:
            described = _inspect(self._records)
        except Exception as error:  # the unpickler raises whatever the damage leads to
            raise CheckpointError(
                f"{path}: expected a dict of tensors and nothing else, got {_reason(error)}"
            ) from None
        self.shapes = {name: tensor.shape for name, tensor in described.items()}

    def load(
        self, expected: Mapping[str, tuple[int, ...]], *, others: bool = False
    ) -> dict[str, Tensor]:
        """The tensors of these names and shapes, on the CPU.

        Raises:
            CheckpointError: other names (unless ``others``) or shapes, no finite floats.
        """
        check_shapes(self.path, self.shapes, expected, others=others)
        try:
            # From the records that were inspected: another reader may find others in the file.
            state = torch.load(_archive(self._records), map_location="cpu", weights_only=True)
        except Exception as error:  # as above
            raise CheckpointError(
                f"{self.path}: expected a dict of tensors, got {_reason(error)}"
            ) from None
        tensors = {name: state[name].detach() for name in expected}
        check_tensors(self.path, tensors, expected)
        return tensors


def _reason(error: Exception) -> str:
    return shorten(f"{type(error).__name__}: {error}")


def _read_records(path: Path, data: bytes) -> dict[str, bytes]:
    """The records of torch's archive by their names in it, each as long as it says."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if any(e.compress_type != zipfile.ZIP_STORED for e in entries):
                raise ValueError("a compressed record")
            if sum(e.file_size for e in entries) > len(data):
                raise ValueError("records that are longer than the file")
            names = [e.filename for e in entries]
            if len(set(names)) < len(names):
                raise ValueError("two records of one name")
            roots = [name for name in names if name.endswith("/data.pkl")]
            if len(roots) != 1:
                raise ValueError(f"{len(roots)} records data.pkl")
            root = roots[0].removesuffix("data.pkl")
            # Reading compares each record with its checksum.
            return {n.removeprefix(root): archive.read(n) for n in names if n.startswith(root)}
    except Exception as error:  # zipfile raises whatever the damage leads to
        raise CheckpointError(
            f"{path}: expected a file that torch.save wrote (PyTorch 1.6 or newer), "
            f"got {_reason(error)}"
        ) from None


def _archive(records: Mapping[str, bytes]) -> io.BytesIO:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            if name in ("data.pkl", "version", "byteorder") or name.startswith("data/"):
                archive.writestr(f"archive/{name}", data)
    stream.seek(0)
    return stream


class _Storage(NamedTuple):
    """A run of values of one type in a record."""

    dtype: torch.dtype
    length: int


class _Described(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]


def _inspect(records: Mapping[str, bytes]) -> dict[str, _Described]:
    text = records["data.pkl"]
    if len(text) > _PICKLE_LIMIT:
        raise ValueError(f"{len(text)} bytes of instructions, more than {_PICKLE_LIMIT}")
    _check_instructions(text)
    state = _Describer(text, records).load()
    if not isinstance(state, dict):
        raise ValueError(_kind(state))
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, _Described):
            raise ValueError(f"{_kind(value)} under the key {shorten(name)}")
    return state


def _kind(value: Any) -> str:
    return "a tensor" if isinstance(value, _Described) else type(value).__name__


def _check_instructions(text: bytes) -> None:
    previous = ""
    kept: dict[Any, str] = {}
    for instruction, argument, _ in pickletools.genops(text):
        name = instruction.name
        if name not in _INSTRUCTIONS:
            raise ValueError(f"the instruction {name}")
        if name in _PUTS:
            kept[argument] = previous
        elif name in _GETS and kept.get(argument, "").startswith("TUPLE"):
            # A tuple of two tuples, and that again: its hash would take for ever.
            raise ValueError("a tuple that is used twice")
        else:
            previous = name
    if max(kept, default=0) > len(text):
        raise ValueError(f"a memo of {max(kept)} values")


class _Describer(pickle.Unpickler):
    """Builds descriptions where torch would build tensors."""

    def __init__(self, text: bytes, records: Mapping[str, bytes]) -> None:
        super().__init__(io.BytesIO(text))
        self._records = records

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) in _STAND_INS:
            return _STAND_INS[module, name]
        raise ValueError(f"the name {shorten(f'{module}.{name}')}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, length = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise ValueError(f"a persistent {shorten(kind)}")
        _check_counts([length])
        size = len(self._records[f"data/{key}"])
        if length * dtype.itemsize != size:
            raise ValueError(f"a storage of {length} {dtype} in a record of {size} bytes")
        return _Storage(dtype, length)


def _describe(storage: _Storage, offset: int, shape: Any, stride: Any, *rest: Any) -> _Described:
    if not (isinstance(storage, _Storage) and type(shape) is tuple and type(stride) is tuple):
        raise ValueError("a tensor without storage and shape")
    _check_counts([offset, *shape, *stride])
    if len(shape) != len(stride):
        raise ValueError(f"{len(shape)} sizes and {len(stride)} strides")
    if math.prod(shape):
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if last >= storage.length or math.prod(shape) > storage.length:
            raise ValueError(f"shape {shorten(shape)} in a storage of {storage.length} values")
    return _Described(shape)


def _describe_parameter(data: _Described, *rest: Any) -> _Described:
    if not isinstance(data, _Described):
        raise ValueError("a parameter that is no tensor")
    return data


def _no_hooks() -> dict[Any, Any]:
    return {}


def _check_counts(values: list[Any]) -> None:
    if not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise ValueError(f"the sizes {shorten(values)}")


_STAND_INS = {
    ("torch._utils", "_rebuild_tensor_v2"): _describe,
    ("torch._utils", "_rebuild_parameter"): _describe_parameter,
    ("collections", "OrderedDict"): _no_hooks,
}
