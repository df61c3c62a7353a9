"""Gradient checkpointing in a frozen model that stays in evaluation mode."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ept_fast.config import check_count

__all__ = ["Own", "disable", "enable", "set_mode"]


def enable(
    backbone: nn.Module,
    options: dict[str, Any] | None,
    every_n_layers: int = 1,
    offload: bool = False,
) -> None:
    """Have the backbone's layers recomputed in the backward pass, without their dropout.

    A layer checks for training mode before it recomputes, and some drop out by the same flag. So
    the flag is on around the layer (:func:`set_mode`) and off inside it, in both of its
    computations. The model's own method would besides have the text's embeddings require gradients.

    Args:
        backbone: the model.
        options: of ``torch.utils.checkpoint.checkpoint``.
        every_n_layers: 1 for all layers, 2 for the first, the third and so on.
        offload: whether what is kept for the recomputation goes to the CPU.

    Raises:
        ValueError: the model has no layers that can be recomputed.
    """
    check_count("every_n_layers", every_n_layers, 1)
    layers = _layers(backbone)
    if not layers:
        raise ValueError(
            f"model: expected one whose layers support gradient checkpointing, "
            f"got {type(backbone).__name__}"
        )
    run = functools.partial(checkpoint, **{"use_reentrant": False, **(options or {})})
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index % every_n_layers == 0
        layer._gradient_checkpointing_func = functools.partial(_recompute, layer, run, offload)


class Own:
    """The model's own recomputation, switched off where it was on.

    Attributes:
        options: of ``torch.utils.checkpoint.checkpoint``, as it was switched on; None where it was
            off.
    """

    def __init__(self, backbone: nn.Module) -> None:
        on = [m for m in backbone.modules() if getattr(m, "gradient_checkpointing", False)]
        self._before = [(m, getattr(m, "_gradient_checkpointing_func", None)) for m in on]
        functions = [function for _, function in self._before if function is not None]
        self.options: dict[str, Any] | None = None
        if functions:
            self.options = dict(getattr(functions[0], "keywords", {}))
        for module in on:
            module.gradient_checkpointing = False  # type: ignore[assignment]

    def give_back(self) -> None:
        """Switch it on again."""
        for module, function in self._before:
            module.gradient_checkpointing = True  # type: ignore[assignment]
            if function is not None:
                module._gradient_checkpointing_func = function


def disable(backbone: nn.Module) -> None:
    """Undo :func:`enable`."""
    for layer in _layers(backbone):
        layer.training = layer.gradient_checkpointing = False


def set_mode(backbone: nn.Module, training: bool) -> None:
    """The mode around the layers to recompute of a backbone in evaluation mode."""
    for layer in _layers(backbone):
        layer.training = training and layer.gradient_checkpointing


def _layers(backbone: nn.Module) -> list[Any]:
    return [m for m in backbone.modules() if isinstance(m, GradientCheckpointingLayer)]


def _recompute(
    layer: nn.Module, run: Callable[..., Any], offload: bool, forward: Any, *args: Any
) -> Any:
    with save_on_cpu(pin_memory=True) if offload else contextlib.nullcontext():
        return run(functools.partial(_in_evaluation, layer, forward), *args)


def _in_evaluation(layer: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
    mode, layer.training = layer.training, False
    try:
        return forward(*args)
    finally:
        layer.training = mode
