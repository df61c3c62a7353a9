"""A folded prompt as plain tensors, for servers that take prompt embeddings and know no EPT."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ept_fast.config import OFFSET_TOKENS, check_choice, check_count
from ept_fast.interchange.folder import naming
from ept_fast.interchange.folding import fold_values, product
from ept_fast.prompts.base import FoldedPrompt, Prompt
from ept_fast.storage.files import TensorFile, json_bytes, tensor_bytes, write_files
from ept_fast.storage.untrusted import CheckpointError, parse_json, read_adapter_json, shorten

__all__ = ["PLAIN_CONFIG_FILE", "PLAIN_TENSOR_FILE", "PlainPrompt", "export_plain", "import_plain"]

PLAIN_CONFIG_FILE = "prompt_embeddings.json"
PLAIN_TENSOR_FILE = "prompt_embeddings.safetensors"

_FORMAT = {"format": "prompt_embeddings", "format_version": 2}
_FIELDS = {*_FORMAT, "base_model", "hidden_size", "num_virtual_tokens", "offset"}
_FIELDS |= {"max_length", "rank", "offset_tokens"}  # the last one since version 2
_OFFSETS = ("none", "table", "factors")
_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class PlainPrompt(NamedTuple):
    """The tensors of a folded prompt.

    Attributes:
        prompt_embeds: [m, d], put before the text's embeddings.
        offset: [n, d], row k added to the embedding of the text's k-th real token; None if there
            is none to add.
        base_model: the backbone's folder or hub id, or None.
        offset_tokens: the tokens of a causal language model that have an offset: ``"all"``;
            ``"given"``, the text but not what is generated; ``"none"`` without an offset.
    """

    prompt_embeds: Tensor
    offset: Tensor | None
    base_model: str | None
    offset_tokens: str


def export_plain(
    prompt: Prompt | FoldedPrompt,
    folder: str | Path,
    *,
    base_model: str | None = None,
    offset: str = "table",
    dtype: torch.dtype | None = None,
    task: int | None = None,
) -> None:
    """Write the reconstructed prompt and the offset as plain tensors.

    ``prompt_embeddings.safetensors`` holds ``prompt_embeds`` [m, d] and, if the rank is not 0,
    ``offset`` [n, d] or its factors ``offset_a`` [n, r] and ``offset_b`` [r, d], whose product it
    is. ``prompt_embeddings.json`` says what they are; ``docs/interchange.md`` describes every
    field and the two lines that a server has to run.

    A server that adds the offset to the text that it is given and to nothing that it generates is
    exact for ``offset_tokens="given"`` in the prompt's config, and without an offset (rank 0). For
    ``"all"``, the default, the tokens that it generates lack their offsets: from the second new
    token on, its answers differ from those of ``generate`` of an :class:`ept_fast.EPTModel`.

    Args:
        prompt: trainable or folded.
        folder: made if it is missing; each file is written whole or not at all.
        base_model: the backbone's folder or hub id, kept in the JSON file.
        offset: ``"table"`` (one lookup a token) or ``"factors"`` (a smaller file).
        dtype: of the tensors. By default each has the parameters' type; what the
            scaling goes into, float32 at least, in which products are computed anyway.
        task: which prompt of a bank.

    Raises:
        ValueError: a bank without ``task``; values that are not finite, in ``dtype``.
        TypeError: no EPT prompt, or a type that is no floating one.
    """
    check_choice("offset", offset, _OFFSETS[1:])
    if dtype is not None and dtype not in _DTYPES.values():
        raise TypeError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype}")
    if base_model is not None and not isinstance(base_model, str):
        raise TypeError(f"base_model: expected a text, got {type(base_model).__name__}")
    values = fold_values(prompt, task)
    tensors = {"prompt_embeds": values.prompt}
    n, rank = (0, 0) if values.offset is None else values.offset[0].shape
    if values.offset is None:
        offset = "none"
    elif offset == "table":
        tensors["offset"] = product(values.offset)
    else:
        tensors["offset_a"], tensors["offset_b"] = values.offset
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    m, d = values.prompt.shape
    config = {
        **_FORMAT,
        "base_model": base_model,
        "hidden_size": d,
        "num_virtual_tokens": m,
        "offset": offset,
        "max_length": n,
        "rank": rank,
        "offset_tokens": "none" if values.offset is None else prompt.config.offset_tokens,
    }
    text = json_bytes(config)
    write_files(
        {
            Path(folder) / PLAIN_TENSOR_FILE: tensor_bytes(tensors, text.decode()),
            Path(folder) / PLAIN_CONFIG_FILE: text,
        }
    )


def import_plain(folder: str | Path) -> PlainPrompt:
    """The tensors that :func:`export_plain` wrote, the factors of an offset multiplied.

    Files of version 1 do not have ``offset_tokens``; there it is ``"all"`` if there is an offset.

    Raises:
        CheckpointError: a missing, damaged, foreign or mismatched file.
    """
    config_path, path = Path(folder) / PLAIN_CONFIG_FILE, Path(folder) / PLAIN_TENSOR_FILE
    values = read_adapter_json(config_path)
    with naming(config_path):
        expected = _expected_shapes(values)
    file = TensorFile(path)
    tensors, text = file.load(expected), file.config
    if parse_json(path, text) != values:
        raise CheckpointError(
            f"{config_path}: expected the description that the tensors were saved with "
            f"({shorten(text)}), got {shorten(values)}"
        )
    offset = tensors.get("offset")
    if values["offset"] == "factors":
        offset = product((tensors["offset_a"], tensors["offset_b"]))
    tokens = values.get("offset_tokens", "none" if offset is None else "all")
    return PlainPrompt(tensors["prompt_embeds"], offset, values["base_model"], tokens)


def _expected_shapes(values: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of the tensors that the description names, all its fields checked."""
    version = values.get("format_version")
    fields = _FIELDS - {"offset_tokens"} if version == 1 else _FIELDS
    if set(values) != fields:
        raise ValueError(f"expected the fields {sorted(fields)}, got {shorten(sorted(values))}")
    if values["format"] != _FORMAT["format"]:
        raise ValueError(f"format: expected {_FORMAT['format']!r}, got {shorten(values['format'])}")
    if type(version) is not int or version not in (1, 2):
        raise ValueError(f"format_version: expected 1 or 2, got {shorten(version)}")
    if not isinstance(values["base_model"], (str, type(None))):
        raise TypeError(f"base_model: expected a text or null, got {shorten(values['base_model'])}")
    kind = values["offset"]
    if kind not in _OFFSETS:
        raise ValueError(f"offset: expected one of {', '.join(_OFFSETS)}, got {shorten(kind)}")
    check_choice(
        "offset_tokens",
        values.get("offset_tokens", "none" if kind == "none" else "all"),
        ("none",) if kind == "none" else OFFSET_TOKENS,
    )
    least = 0 if kind == "none" else 1
    for name in ("hidden_size", "num_virtual_tokens"):
        check_count(name, values[name], 1)
    for name in ("max_length", "rank"):
        check_count(name, values[name], least)
    d, n, r = values["hidden_size"], values["max_length"], values["rank"]
    shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (values["num_virtual_tokens"], d)}
    if kind == "table":
        shapes["offset"] = (n, d)
    elif kind == "factors":
        shapes["offset_a"], shapes["offset_b"] = (n, r), (r, d)
    elif n or r:
        raise ValueError(f"offset: expected max_length 0 and rank 0 for none, got {n} and {r}")
    return shapes
