"""Gradient checkpointing in a frozen model that stays in evaluation mode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

__all__ = ["disable", "enable", "set_mode"]


def enable(backbone: nn.Module, options: dict[str, Any] | None) -> None:
    """Have the backbone's layers recomputed in the backward pass, without their dropout.

    A layer checks for training mode before it recomputes, and some drop out by the same flag. So
    the flag is on around the layer (:func:`set_mode`) and off inside it, in both of its
    computations. The model's own method would besides have the text's embeddings require gradients.

    Raises:
        ValueError: the model has no layers that can be recomputed.
    """
    layers = _layers(backbone)
    if not layers:
        raise ValueError(
            f"model: expected one whose layers support gradient checkpointing, "
            f"got {type(backbone).__name__}"
        )
    run = functools.partial(checkpoint, **{"use_reentrant": False, **(options or {})})
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(_recompute, layer, run)


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


def _recompute(layer: nn.Module, run: Callable[..., Any], forward: Any, *args: Any) -> Any:
    return run(functools.partial(_in_evaluation, layer, forward), *args)


def _in_evaluation(layer: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
    mode, layer.training = layer.training, False
    try:
        return forward(*args)
    finally:
        layer.training = mode
