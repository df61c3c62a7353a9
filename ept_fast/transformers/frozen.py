"""What models with images have in common: the frozen model, checks of inputs, and files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ept_fast.checks import values_are_checked
from ept_fast.config import PromptConfig
from ept_fast.prompts.base import CONFIG_FILE, TENSOR_FILE
from ept_fast.storage.files import CheckpointError, json_bytes, read_adapter_json, write_files
from ept_fast.storage.untrusted import FILE_LIMIT, read_file, shorten

__all__ = [
    "PromptedModel",
    "behind",
    "check_classes",
    "check_config",
    "check_images",
    "check_names",
    "check_saved_config",
    "read_described",
    "read_names",
    "shown",
    "write_described",
]


class PromptedModel(nn.Module):
    """Trained parts around a frozen model, which is the user's own.

    The model is in evaluation mode also under ``.train()``, never copied, never in a state dict.

    Attributes:
        trained: how the names of what is trained begin, with a dot behind a module's.
        backbone: the frozen module; None once the model was taken out.
    """

    trained: ClassVar[tuple[str, ...]]
    backbone: Any

    def __init__(self, model: nn.Module, backbone: nn.Module) -> None:
        super().__init__()
        self._given: tuple[Any] = (model,)  # in a tuple, as no module of this one
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        self._modes = [(m, m.training) for m in model.modules()]
        model.requires_grad_(False).eval()
        self.backbone = backbone
        self.register_state_dict_post_hook(_keep_trained)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_expect_trained)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> Self:
        """Set the mode of what is trained; the backbone stays in evaluation."""
        super().train(mode)
        if self.backbone is not None:
            self.backbone.eval()
        if mode:
            self.unfold()
        return self

    def unfold(self) -> None:
        """Use what is trained again."""
        raise NotImplementedError

    def unload(self) -> Any:
        """Take the model out: what was given, as it was; this object is done with."""
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        for module, mode in self._modes:
            module.training = mode
        self.backbone = None
        (given,), self._given = self._given, (None,)
        return given


def _keep_trained(module: PromptedModel, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A state dict holds what is trained and nothing of the backbone."""
    kept = tuple(f"{prefix}{name}" for name in module.trained)
    for key in [k for k in state if k.startswith(prefix) and not k.startswith(kept)]:
        del state[key]


def _expect_trained(module: PromptedModel, keys: Any) -> None:
    """Do not report as missing what a state dict does not hold; unfold."""
    held = tuple(f".{name}" for name in module.trained)
    keys.missing_keys[:] = [k for k in keys.missing_keys if any(n in f".{k}" for n in held)]
    module.unfold()


def behind(row: Tensor, prompt: Tensor) -> Tensor:
    """The prompt behind a row ``[1, d]`` that all inputs begin with, ``[(T,) 1 + m, d]``.

    In the wider of their types, so that neither is rounded before it is spliced.
    """
    wide = torch.promote_types(prompt.dtype, row.dtype)
    row = row.expand(*prompt.shape[:-2], 1, -1)
    return torch.cat([row.to(wide), prompt.to(wide)], -2)


# Arguments


def check_config(config: PromptConfig, width: int) -> None:
    """Raise ValueError unless it is of this width and without an offset."""
    if config.hidden_size != width:
        raise ValueError(
            f"hidden_size: expected {width} as in the backbone, got {config.hidden_size}"
        )
    if config.rank:
        raise ValueError(
            f"rank: expected 0, as an offset is for the tokens of a text, got {config.rank}"
        )


def check_saved_config(folder: Path, config: PromptConfig, width: int) -> None:
    """:func:`check_config` of a config from a file: CheckpointError."""
    try:
        check_config(config, width)
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: {error}") from None


def check_names(name: str, names: Any, least: int) -> tuple[str, ...]:
    """The names of classes; TypeError or ValueError unless they are different strings."""
    listed = isinstance(names, Sequence) and not isinstance(names, str)
    if not listed or not all(isinstance(each, str) for each in names):
        raise TypeError(f"{name}: expected a sequence of strings, got {shorten(names)}")
    if len(names) < least or len(set(names)) < len(names):
        raise ValueError(f"{name}: expected at least {least} different names, got {list(names)}")
    return tuple(names)


def check_images(name: str, pixels: Any, channels: int, size: Sequence[int] | None) -> None:
    """Raise TypeError or ValueError unless these are images, of this height and width if given."""
    if not isinstance(pixels, Tensor) or not pixels.is_floating_point():
        raise TypeError(f"{name}: expected a floating tensor, got {shown(pixels)}")
    fits = pixels.dim() == 4 and len(pixels) > 0 and pixels.shape[1] == channels
    if not fits or (size is not None and tuple(pixels.shape[2:]) != tuple(size)):
        height, width = size or ("H", "W")
        raise ValueError(
            f"{name}: expected shape [at least 1, {channels}, {height}, {width}], "
            f"got {list(pixels.shape)}"
        )


def check_classes(labels: Any, batch: int, classes: int, inputs: str = "pixel_values") -> None:
    """Raise TypeError or ValueError unless these are numbers of classes for a batch of inputs."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise TypeError(f"labels: expected an int64 tensor, got {shown(labels)}")
    if tuple(labels.shape) != (batch,):
        raise ValueError(
            f"labels: expected shape [{batch}] to match {inputs}, got {list(labels.shape)}"
        )
    if values_are_checked(labels.device) and bool(((labels < 0) | (labels >= classes)).any()):
        raise ValueError(
            f"labels: expected classes from 0 to {classes - 1}, "
            f"got from {int(labels.min())} to {int(labels.max())}"
        )


def shown(value: Any) -> str:
    """What was given, for a message: a tensor's dtype, or a type."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


# Files


def write_described(
    folder: Path, name: str, values: Mapping[str, Any], files: Mapping[str, bytes]
) -> None:
    """Write files and a description of them, which has their checksums.

    All are on the disk under temporary names before any takes the place of an older one, the
    description last.
    """
    sums = {file: hashlib.sha256(data).hexdigest() for file, data in files.items()}
    written = {**files, name: json_bytes({**values, "sha256": sums})}
    write_files({folder / file: data for file, data in written.items()})


def read_described(
    path: Path,
    form: Mapping[str, Any],
    fields: Sequence[str],
    others: Callable[[Mapping[str, Any]], Sequence[str]],
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What :func:`write_described` wrote: the description, and the files' contents by their names.

    Args:
        path: the description.
        form: fields that it has with these values.
        fields: names of its other fields, besides the checksums.
        others: by the description, names of the files beside the prompt's two.

    Raises:
        CheckpointError: a missing, damaged or foreign file.
    """
    values = read_adapter_json(path)
    names = sorted({*form, *fields, "sha256"})
    if sorted(values) != names or any(values[key] != value for key, value in form.items()):
        raise CheckpointError(
            f"{path}: expected the fields {names} with {dict(form)}, got {shorten(values)}"
        )
    files = {
        name: read_file(path.parent / name, limit=FILE_LIMIT)
        for name in (CONFIG_FILE, TENSOR_FILE, *others(values))
    }
    if values["sha256"] != {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}:
        raise CheckpointError(
            f"{path}: sha256: expected the files it was saved with, got others "
            f"(damaged, or a save that was cut off)"
        )
    return values, files


def read_names(path: Path, name: str, names: Any, least: int) -> tuple[str, ...]:
    """Names of classes from a file; CheckpointError unless they are different strings."""
    if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
        raise CheckpointError(f"{path}: {name}: expected strings, got {shorten(names)}")
    if len(names) < least or len(set(names)) < len(names):
        raise CheckpointError(
            f"{path}: {name}: expected at least {least} different names, got {shorten(names)}"
        )
    return tuple(names)
