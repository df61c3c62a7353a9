"""Tensor files that ``torch.save`` wrote, read by ``torch.load`` with ``weights_only``."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ept_fast.storage.files import check_shapes, check_tensors
from ept_fast.storage.untrusted import FILE_LIMIT, CheckpointError, check_size, open_inside, shorten

__all__ = ["PickledState"]


class PickledState:
    """The state dict in a file of ``torch.save``, with all of its values.

    Raises:
        CheckpointError: no such file, too large, damaged, older than the format of PyTorch 1.6, or
            with anything in it but a dict of dense tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Not by its path, as mmap would need: another file may stand there by now.
        with open_inside(path) as file:
            check_size(path, os.fstat(file.fileno()).st_size, FILE_LIMIT)
            with _expecting(path, "a file that torch.save wrote (PyTorch 1.6 or newer)"):
                _check_archive(file)
            file.seek(0)
            with _expecting(path, "a dict of tensors and nothing else"):
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
                self._tensors = _dense(state)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def load(
        self, expected: Mapping[str, tuple[int, ...]], *, others: bool = False
    ) -> dict[str, Tensor]:
        """The tensors of these names and shapes, contiguous, no two with values in common.

        Raises:
            CheckpointError: other names (unless ``others``) or shapes, no finite floats.
        """
        check_shapes(self.path, self.shapes, expected, others=others)
        loaded = {
            name: self._tensors[name].clone(memory_format=torch.contiguous_format)
            for name in expected
        }
        check_tensors(self.path, loaded, expected)
        return loaded


@contextmanager
def _expecting(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # damage leads to all kinds of them
        # The first sentence without torch's advice to load the file with weights_only=False.
        lines = str(error).rpartition("WeightsUnpickler error: ")[2].splitlines()
        reason = next((line for line in lines if line and "weights_only" not in line), "")
        got = shorten(f"{type(error).__name__}: {reason.partition('. ')[0]}")
        raise CheckpointError(f"{path}: expected {what}, got {got}") from None


def _check_archive(file: BinaryIO) -> None:
    """Compare the checksum of each record, which torch does not, and bound what reading makes."""
    if file.read(4) != b"PK\3\4":  # which torch would read as a file of before 1.6
        raise ValueError("no archive")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("a compressed record")
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("two records of one name")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"another checksum for {shorten(damaged)}")


def _dense(state: Any) -> dict[str, Tensor]:
    """The tensors of a state dict; each has all of its values in its own storage."""
    if not isinstance(state, dict):
        raise ValueError(type(state).__name__)
    tensors = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{type(value).__name__} under a key of type {type(name).__name__}")
        tensor = value.detach()
        plain = type(tensor) is Tensor and tensor.layout is torch.strided
        if not plain or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_neg():
            raise ValueError(f"a tensor that is not dense under the key {shorten(name)}")
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise ValueError(f"shape {shorten(tuple(tensor.shape))} in a smaller storage")
        tensors[name] = tensor
    return tensors
