"""Saved adapters: a folder of prompt, head and description, or a state dict that has all of it.

``save_pretrained`` writes the folder. The state dict of a model carries a description of its
adapters, so that a file of it says what is in it: transformers' Trainer writes such files, as
``model.safetensors``. Both have checksums.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ept_fast.config import PromptConfig
from ept_fast.prompts.base import (
    CONFIG_FILE,
    TENSOR_FILE,
    SavedPrompt,
    expected_shapes,
    read_config,
    read_prompt,
)
from ept_fast.storage.files import (
    TensorFile,
    check_shapes,
    check_tensors,
    json_bytes,
    tensor_bytes,
    write_files,
)
from ept_fast.storage.sharded import has_values
from ept_fast.storage.untrusted import (
    FILE_LIMIT,
    JSON_LIMIT,
    CheckpointError,
    parse_json,
    read_adapter_json,
    read_file,
    shorten,
)
from ept_fast.transformers import POOLINGS, TASKS

__all__ = [
    "ADAPTER_FILE",
    "DESCRIPTION",
    "HEAD_FILE",
    "PEFT_CONFIG_FILE",
    "PEFT_TENSOR_FILE",
    "STATE_FILE",
    "SavedAdapter",
    "SavedPeft",
    "adapter_files",
    "describe_state",
    "read_adapter",
    "state_checksum",
    "write_adapter",
]

ADAPTER_FILE = "adapter.json"
HEAD_FILE = "head.safetensors"
PEFT_CONFIG_FILE = "peft/adapter_config.json"  # a folder that PEFT reads
PEFT_TENSOR_FILE = "peft/adapter_model.safetensors"
STATE_FILE = "model.safetensors"  # as transformers and accelerate call a file of a state dict
DESCRIPTION = "_extra_state"  # PyTorch's name for what a module's state has besides its tensors

_FORMAT: dict[str, Any] = {"format": "ept_fast", "format_version": 2}
_FIELDS: dict[str, tuple[type, ...]] = {
    "task": (str,),
    "base_model": (str, type(None)),
    "base_model_type": (str, type(None)),
    "labels": (list, type(None)),
    "pooling": (str, type(None)),
    "head": (str, type(None)),
    "head_dropout": (float, int),
    "extra": (dict,),
}
_IN_FOLDER: dict[str, tuple[type, ...]] = {**_FIELDS, "sha256": (dict,)}
_IN_STATE: dict[str, tuple[type, ...]] = {**_FIELDS, "config": (dict,)}
_OF_STATE: dict[str, tuple[type, ...]] = {"active": (str,), "adapters": (dict,), "sha256": (str,)}
# What only a model with an adapter of PEFT has: its name in a folder, all about it in a state dict.
_PEFT = "peft"
_PEFT_FIELDS: dict[str, tuple[type, ...]] = {
    "adapter_name": (str,),
    "config": (dict,),
    "names": (dict,),
}
_PEFT_PREFIX = "base_model.model."  # of tensors in PEFT's files


@dataclass(frozen=True, eq=False)
class SavedPeft:
    """An adapter of PEFT that was saved with a prompt.

    Attributes:
        path: the file that names it.
        adapter_name: what PEFT calls it.
        config: PEFT's config, as JSON has it.
        tensors: by their names in PEFT's files, without the prefix that all have there.
    """

    path: Path
    adapter_name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)  # tensors have no truth value
class SavedAdapter:
    """A saved adapter, read once and checked.

    Attributes:
        path: the file that holds the description.
        values: ``task``, ``base_model``, ``base_model_type``, ``labels``, ``pooling``, ``head``
            (``"linear"``, ``"model"`` or None), ``head_dropout`` and ``extra``.
        prompt: config and tensors of the prompt.
        config_path: the file that holds the config.
        head_path: the file that holds the head.
        peft: the adapter of PEFT in the layers of the model that it was trained on, or None.
    """

    path: Path
    values: Mapping[str, Any]
    prompt: SavedPrompt
    config_path: Path
    head_path: Path
    _head: dict[str, Tensor]
    peft: SavedPeft | None = None

    def config(self, width: int) -> PromptConfig:
        """The config of the prompt, for embeddings of this width."""
        _, config, num_tasks, _ = self.prompt
        if num_tasks is not None:
            raise CheckpointError(f"{self.config_path}: num_tasks: expected null, got {num_tasks}")
        if config.hidden_size != width:
            raise CheckpointError(
                f"{self.config_path}: hidden_size: expected {width} as in the backbone, "
                f"got {config.hidden_size}"
            )
        return config

    def head(self, module: nn.Module) -> dict[str, Tensor]:
        """The tensors of a head of these very sizes."""
        own = module.state_dict()
        check_tensors(self.head_path, self._head, {n: tuple(p.shape) for n, p in own.items()})
        for name, value in self._head.items():
            if not bool(torch.isfinite(value.to(own[name].dtype)).all()):
                raise CheckpointError(
                    f"{self.head_path}: {name}: expected values in the range of "
                    f"{own[name].dtype}, got larger ones in {value.dtype}"
                )
        return self._head


def read_adapter(folder: str | Path, saved_name: str | None = None) -> SavedAdapter:
    """A saved adapter, of either form; of a folder that has both, what ``save_pretrained`` wrote.

    Args:
        folder: of ``adapter.json``, or of ``model.safetensors``.
        saved_name: which of a model's adapters, in ``model.safetensors``; by default the one
            that was active.

    Raises:
        CheckpointError: missing or foreign, a file is not the one it was written with, the head
            is none for these labels, or there is no adapter of that name.
    """
    folder = Path(folder)
    in_state = not os.path.lexists(folder / ADAPTER_FILE) and os.path.lexists(folder / STATE_FILE)
    if in_state:
        return _read_state_file(folder / STATE_FILE, saved_name)
    if saved_name is not None:
        raise CheckpointError(
            f"{folder / ADAPTER_FILE}: saved_name: expected None, as this folder is of one "
            f"adapter, got {saved_name!r}"
        )
    return _read_folder(folder)


# The folder


def adapter_files(
    prompt: Mapping[str, bytes],
    head: Mapping[str, Tensor] | None,
    values: Mapping[str, Any],
    config: PromptConfig,
    peft: SavedPeft | None = None,
) -> dict[str, bytes]:
    """The files of an adapter by their names: those of its prompt, its head, its description.

    An adapter of PEFT is in a folder of its own, which PEFT reads too.

    The description comes last: it holds the checksums of the other files, so that a folder cut off
    half-way is refused by :func:`read_adapter`.
    """
    files = dict(prompt)
    if head is not None:
        files[HEAD_FILE] = tensor_bytes(head, config.to_json())
    if peft is not None:
        prefixed = {f"{_PEFT_PREFIX}{name}": tensor for name, tensor in peft.tensors.items()}
        files[PEFT_CONFIG_FILE] = json_bytes(peft.config)
        files[PEFT_TENSOR_FILE] = tensor_bytes(prefixed, config.to_json())
        values = {**values, _PEFT: peft.adapter_name}
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    return {**files, ADAPTER_FILE: json_bytes({**_FORMAT, **values, "sha256": sums})}


def write_adapter(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write what :func:`adapter_files` made, in its order."""
    write_files({folder / name: data for name, data in files.items()})
    if HEAD_FILE not in files:
        (folder / HEAD_FILE).unlink(missing_ok=True)  # of an adapter that stood here before


def _read_folder(folder: Path) -> SavedAdapter:
    path, head_path = folder / ADAPTER_FILE, folder / HEAD_FILE
    values = read_adapter_json(path)
    with_peft = {_PEFT: (str,)} if _PEFT in values else {}
    _check_description(path, values, {**_IN_FOLDER, **with_peft})
    names = (CONFIG_FILE, TENSOR_FILE, *((HEAD_FILE,) if values["head"] is not None else ()))
    names += (PEFT_CONFIG_FILE, PEFT_TENSOR_FILE) if with_peft else ()
    files = {name: read_file(folder / name, limit=FILE_LIMIT) for name in names}
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    expected = values["sha256"]
    others = [name for name in {**sums, **expected} if sums.get(name) != expected.get(name)]
    if others:
        raise CheckpointError(
            f"{path}: sha256: expected the files it was saved with, got others for "
            f"{shorten(others)} (damaged, or a save that was cut off)"
        )
    head = {}
    if HEAD_FILE in files:
        file = TensorFile(head_path, files.pop(HEAD_FILE))
        _check_head(head_path, file.shapes, values)
        head = file.load(file.shapes)
    peft = None
    if with_peft:
        config = parse_json(folder / PEFT_CONFIG_FILE, files.pop(PEFT_CONFIG_FILE))
        file = TensorFile(folder / PEFT_TENSOR_FILE, files.pop(PEFT_TENSOR_FILE))
        tensors = {
            name.removeprefix(_PEFT_PREFIX): tensor
            for name, tensor in file.load(file.shapes).items()
        }
        peft = SavedPeft(path, values[_PEFT], config, tensors)
    return SavedAdapter(
        path, values, read_prompt(folder, files), folder / CONFIG_FILE, head_path, head, peft
    )


# The state dict


def describe_state(
    active: str,
    adapters: Mapping[str, tuple[Mapping[str, Any], PromptConfig]],
    tensors: Mapping[str, Tensor],
    peft: Mapping[str, Any] | None = None,
) -> Tensor | None:
    """The description that goes into a state dict, as the bytes of JSON text.

    Args:
        active: name of the active adapter.
        adapters: what each is besides its tensors, as for :func:`write_adapter`.
        tensors: all others of the state dict.
        peft: name, config and names of the tensors of an adapter of PEFT, if there is one.

    Returns:
        Bytes, which safetensors can hold, on the CPU. None if this process does not have all
        values: they have no checksum here.
    """
    if not all(map(has_values, tensors.values())):
        return None
    described: dict[str, Any] = {
        **_FORMAT,
        "active": active,
        "adapters": {
            name: {**_FORMAT, **values, "config": config.to_dict()}
            for name, (values, config) in adapters.items()
        },
    }
    if peft is not None:
        described[_PEFT] = peft
    described["sha256"] = state_checksum(described, tensors)
    return torch.frombuffer(bytearray(json_bytes(described)), dtype=torch.uint8)


def state_checksum(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Of a description without its checksum, and of the tensors with names, types and shapes."""
    found = hashlib.sha256(json_bytes(described))
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        plain = tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8)
        found.update(plain.numpy().data)
    return found.hexdigest()


def _read_state_file(path: Path, saved_name: str | None) -> SavedAdapter:
    tensors, described = _read_state(path)
    names = list(described["adapters"])
    name = described["active"] if saved_name is None else saved_name
    if name not in names:
        raise CheckpointError(
            f"{path}: saved_name: expected one of {shorten(names)}, got {shorten(name)}"
        )
    configs = {}
    expected: dict[str, tuple[int, ...]] = {}
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    for each, values in described["adapters"].items():
        if not isinstance(values, dict):
            raise CheckpointError(
                f"{path}: {shorten(each)}: expected dict, got {type(values).__name__}"
            )
        _check_description(path, values, _IN_STATE)
        try:
            configs[each] = read_config(values["config"])
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {str(error)[:1000]}") from None
        for key, shape in expected_shapes(configs[each], None).items():
            expected[f"prompts.{each}.{key}"] = shape
        if values["head"] is not None:
            _check_head(path, _below(f"heads.{each}.", shapes), values)
            expected |= {k: s for k, s in shapes.items() if k.startswith(f"heads.{each}.")}
    of_peft = _names_of_peft(path, described)
    expected |= {key: shapes.get(key, ()) for key in of_peft.values()}
    check_shapes(path, shapes, expected)
    check_tensors(path, tensors, expected)
    peft = None
    if _PEFT in described:
        about = described[_PEFT]
        found = {name: tensors[key] for name, key in of_peft.items()}
        peft = SavedPeft(path, about["adapter_name"], about["config"], found)
    prompt = SavedPrompt(path, configs[name], None, _below(f"prompts.{name}.", tensors))
    head = _below(f"heads.{name}.", tensors)
    return SavedAdapter(path, described["adapters"][name], prompt, path, path, head, peft)


def _names_of_peft(path: Path, described: Mapping[str, Any]) -> dict[str, str]:
    """Of each tensor of an adapter of PEFT, its name in PEFT's files and in the state dict."""
    if _PEFT not in described:
        return {}
    _check_types(path, described[_PEFT], _PEFT_FIELDS)
    names = described[_PEFT]["names"]
    if not all(isinstance(key, str) for key in names.values()):
        raise CheckpointError(f"{path}: names: expected strings, got {shorten(names)}")
    return {name: f"backbone.{key}" for name, key in names.items()}


def _read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of a state dict, with a checksum that is right.

    A wrapper's prefix, such as ``module.`` of DDP, is taken off the names.
    """
    file = TensorFile(path)
    shapes = file.shapes
    keys = [key for key in shapes if f".{key}".endswith(f".{DESCRIPTION}")]
    tensors: dict[str, Tensor] = {}
    if len(keys) == 1 and len(shapes[keys[0]]) == 1:
        if shapes[keys[0]][0] > JSON_LIMIT:
            raise CheckpointError(
                f"{path}: {DESCRIPTION}: expected at most {JSON_LIMIT} bytes, "
                f"got {shapes[keys[0]][0]}"
            )
        tensors = file.load(others=True)
    if not tensors or tensors[keys[0]].dtype != torch.uint8:
        raise CheckpointError(
            f"{path}: expected the state dict of an EPTModel, whose adapters it describes in "
            f"{DESCRIPTION}, got {shorten(sorted(shapes))}"
        )
    text = tensors.pop(keys[0]).numpy().tobytes()
    prefix = keys[0].removesuffix(DESCRIPTION)
    described = parse_json(path, text)
    _check_fields(path, described, _OF_STATE | ({_PEFT: (dict,)} if _PEFT in described else {}))
    del described["sha256"]
    tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    sha256 = state_checksum(described, tensors)
    if text != json_bytes({**described, "sha256": sha256}):
        raise CheckpointError(
            f"{path}: sha256: expected the tensors and the description that it was saved with, "
            f"got others (damaged)"
        )
    return tensors, described


def _below(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What stands below this prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


# Descriptions of both


def _check_fields(
    path: Path, values: Mapping[str, Any], fields: Mapping[str, tuple[type, ...]]
) -> None:
    """Raise CheckpointError unless the format is ours and the fields are these, of these types."""
    missing = sorted({*_FORMAT, *fields} - set(values))
    if missing or any(values[name] != value for name, value in _FORMAT.items()):
        got = f"no {', '.join(missing)}" if missing else shorten({n: values[n] for n in _FORMAT})
        raise CheckpointError(f"{path}: expected an adapter with {_FORMAT}, got {got}")
    foreign = sorted(set(values) - {*_FORMAT, *fields})
    if foreign:
        raise CheckpointError(
            f"{path}: expected the fields {sorted({*_FORMAT, *fields})}, "
            f"got also {shorten(foreign)}"
        )
    _check_types(path, values, fields)


def _check_types(
    path: Path, values: Mapping[str, Any], fields: Mapping[str, tuple[type, ...]]
) -> None:
    """Raise CheckpointError unless each of the fields is there, of its types."""
    for name, kinds in fields.items():
        value = values.get(name)
        if not isinstance(value, kinds) or isinstance(value, bool):
            names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            raise CheckpointError(f"{path}: {name}: expected {names}, got {type(value).__name__}")


def _check_description(
    path: Path, values: Mapping[str, Any], fields: Mapping[str, tuple[type, ...]]
) -> None:
    """Raise CheckpointError unless an adapter's fields are these and fit each other."""
    _check_fields(path, values, fields)
    choices = {"task": TASKS, "pooling": (*POOLINGS, None), "head": ("linear", "model", None)}
    for name, allowed in choices.items():
        if values[name] not in allowed:
            raise CheckpointError(
                f"{path}: {name}: expected one of {allowed}, got {shorten(values[name])}"
            )
    if (values["pooling"] is None) != (values["task"] != "SEQ_CLS"):
        raise CheckpointError(
            f"{path}: pooling: expected one for task SEQ_CLS and null for others, "
            f"got {values['pooling']!r} for {values['task']}"
        )
    labels = values["labels"]
    if (labels is None) != (values["head"] is None):
        raise CheckpointError(
            f"{path}: labels: expected strings beside a head and null without, "
            f"got {shorten(labels)} for head {values['head']!r}"
        )
    if labels is not None and not all(isinstance(label, str) for label in labels):
        raise CheckpointError(f"{path}: labels: expected strings, got {shorten(labels)}")
    if not 0 <= values["head_dropout"] < 1:
        raise CheckpointError(
            f"{path}: head_dropout: expected 0 <= head_dropout < 1, "
            f"got {shorten(values['head_dropout'])}"
        )


def _check_head(
    path: Path, shapes: Mapping[str, tuple[int, ...]], values: Mapping[str, Any]
) -> None:
    """Raise CheckpointError unless a linear head has a row for each label.

    Before anything is built for the labels, of which a damaged file can have any number.
    """
    if values["head"] == "linear":
        count = len(values["labels"])
        width = shapes.get("weight", (0,))[-1:]
        check_shapes(path, shapes, {"weight": (count, *width), "bias": (count,)})
