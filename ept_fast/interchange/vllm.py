"""A prompt as a LoRA adapter of one layer, ``ept``: what ``ept_fast.vllm`` serves.

A LoRA adds B·A·x. Here x is a token's place as a one-hot vector: text token k gets B·A e_k, its
offset, and a position of the prompt gets its row of P′. So vLLM loads the files, keeps several
adapters, and knows which token belongs to which, as it does for any other LoRA.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ept_fast.config import check_count
from ept_fast.interchange.folder import CONFIG_FILE, TENSOR_FILE, naming
from ept_fast.interchange.folding import fold_values
from ept_fast.prompts.base import FoldedPrompt, Prompt
from ept_fast.storage.files import TensorFile, json_bytes, tensor_bytes, write_files
from ept_fast.storage.untrusted import (
    FILE_LIMIT,
    CheckpointError,
    read_adapter_json,
    read_file,
    shorten,
)

__all__ = [
    "LAYER",
    "VLLMAdapter",
    "check_offset",
    "export_vllm",
    "read_vllm_adapter",
    "read_vllm_sizes",
]

LAYER = "ept"  # of the served model; the files name it

_A, _B = (f"base_model.model.{LAYER}.lora_{factor}.weight" for factor in "AB")
_KEY = "ept_fast"  # of our own fields, beside those of a LoRA's config
_FORMAT = {"format": "vllm", "format_version": 1}
_SIZES = {"hidden_size": 1, "num_virtual_tokens": 1, "max_length": 0, "rank": 0}  # at least


class VLLMAdapter(NamedTuple):
    """What a folder that :func:`export_vllm` wrote says of its adapter.

    Attributes:
        hidden_size: d.
        num_virtual_tokens: m.
        max_length: n, the longest text that offsets cover; 0 without an offset.
        rank: r; 0 without an offset.
        sha256: of the file of the tensors.
        base_model: the backbone's folder or hub id, or None.
    """

    hidden_size: int
    num_virtual_tokens: int
    max_length: int
    rank: int
    sha256: str
    base_model: str | None

    def longest_text(self, positions: int) -> int:
        """The most tokens of a text, for a model of so many positions and one new token."""
        most = positions - self.num_virtual_tokens - 1
        return min(most, self.max_length) if self.rank else most


def export_vllm(
    prompt: Prompt | FoldedPrompt,
    folder: str | Path,
    *,
    base_model: str | None = None,
    task: int | None = None,
) -> None:
    """Write the reconstructed prompt and the offset's factors for the vLLM plugin.

    ``adapter_model.safetensors`` holds A as ``[r, n]``, scaled, and ``[d, r + m]``: the columns of
    B and the rows of P′. ``adapter_config.json`` is that of a LoRA of the one layer ``ept``, and
    has the sizes and the checksum of the tensors under ``ept_fast``.

    Args:
        prompt: trainable or folded.
        folder: a new one, or one without these files. vLLM knows an adapter by its name and its
            folder and keeps what it computed; so another version goes into another folder.
        base_model: the backbone's folder or hub id, kept in the config.
        task: which prompt of a bank.

    Raises:
        FileExistsError: the folder has an adapter already.
        TypeError: no EPT prompt.
        ValueError: a bank without ``task``; values that are not finite; a prompt that depends on
            its text, or whose offsets are for given tokens only.
    """
    if base_model is not None and not isinstance(base_model, str):
        raise TypeError(f"base_model: expected a text, got {type(base_model).__name__}")
    folder = Path(folder)
    there = [name for name in (CONFIG_FILE, TENSOR_FILE) if os.path.lexists(folder / name)]
    if there:
        raise FileExistsError(
            f"folder: expected a new one, as a server may still use an adapter's files, "
            f"got {folder} with {', '.join(there)}"
        )
    values = fold_values(prompt, task)
    if values.offset is not None and prompt.config.offset_tokens != "all":
        raise ValueError(
            f"offset_tokens: expected 'all', as generated tokens get their offsets here, got "
            f"{prompt.config.offset_tokens!r} (export_plain is for servers that add none to them)"
        )
    rows = values.prompt.to(torch.float32)
    m, d = rows.shape
    n, r = (0, 0) if values.offset is None else values.offset[0].shape
    a = rows.new_empty(0, 0) if values.offset is None else values.offset[0].T
    if values.offset is not None:
        rows = torch.cat([values.offset[1].to(torch.float32), rows])
    tensors = {_A: a.to(torch.float32), _B: rows.T}
    sizes = {"hidden_size": d, "num_virtual_tokens": m, "max_length": n, "rank": r}
    data = tensor_bytes(tensors, json_bytes(sizes).decode())
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "target_modules": [LAYER],
        # vLLM multiplies B by their quotient, and takes r for the rank of a usual layer.
        "r": 1,
        "lora_alpha": 1,
        _KEY: {**_FORMAT, **sizes, "sha256": hashlib.sha256(data).hexdigest()},
    }
    write_files({folder / TENSOR_FILE: data, folder / CONFIG_FILE: json_bytes(config)})


def check_offset(rank: int, max_length: int) -> None:
    """Raise ValueError for the sizes of half an offset."""
    if bool(rank) != bool(max_length):
        raise ValueError(
            f"rank, max_length: expected both or neither to be 0, got {rank} and {max_length}"
        )


def read_vllm_sizes(folder: str | Path) -> VLLMAdapter:
    """What the config says; the tensors are not read.

    Raises:
        CheckpointError: a missing, damaged or foreign file.
    """
    path = Path(folder) / CONFIG_FILE
    config = read_adapter_json(path)
    values, base = config.get(_KEY), config.get("base_model_name_or_path")
    fields = {*_FORMAT, *_SIZES, "sha256"}
    with naming(path):
        if not isinstance(values, dict) or set(values) != fields:
            got = sorted(values) if isinstance(values, dict) else values
            raise ValueError(f"{_KEY}: expected what export_vllm writes, got {shorten(got)}")
        for name, value in _FORMAT.items():
            if values[name] != value:
                raise ValueError(f"{name}: expected {value!r}, got {shorten(values[name])}")
        for name, least in _SIZES.items():
            check_count(name, values[name], least)
        check_offset(values["rank"], values["max_length"])
        if not isinstance(base, (str, type(None))):
            got = shorten(base)
            raise TypeError(f"base_model_name_or_path: expected a text or null, got {got}")
    sizes = {name: values[name] for name in (*_SIZES, "sha256")}
    return VLLMAdapter(**sizes, base_model=base)


def read_vllm_adapter(folder: str | Path) -> tuple[VLLMAdapter, dict[str, Tensor]]:
    """The sizes and the tensors, checked: shapes, types, finite values and the checksum.

    Raises:
        CheckpointError: a missing, damaged or foreign file.
    """
    sizes = read_vllm_sizes(folder)
    path = Path(folder) / TENSOR_FILE
    data = read_file(path, limit=FILE_LIMIT)
    if hashlib.sha256(data).hexdigest() != sizes.sha256:
        raise CheckpointError(
            f"{Path(folder) / CONFIG_FILE}: sha256: expected the files it was saved with, got "
            f"others for {[TENSOR_FILE]} (damaged, or a save that was cut off)"
        )
    d, m, n, r = sizes[:4]
    return sizes, TensorFile(path, data).load({_A: (r, n), _B: (d, r + m)})
