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

__all__ = ["Checkpointing", "Own", "set_mode"]


class Checkpointing:
    """The switches of gradient checkpointing, for a module with a frozen ``backbone``.

    A layer checks for training mode before it recomputes, and some drop out by the same flag. So
    the flag is on around the layer (:func:`set_mode`) and off inside it, in both of its
    computations. The model's own method would besides have the text's embeddings require gradients.

    Attributes:
        is_gradient_checkpointing: whether layers are recomputed.
    """

    backbone: Any
    training: bool
    is_gradient_checkpointing: bool = False

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute the backbone's layers in the backward pass, to save their activations.

        Args:
            gradient_checkpointing_kwargs: of ``torch.utils.checkpoint.checkpoint``, such as
                ``{"use_reentrant": False}``.
            every_n_layers: 1 for all layers, 2 for the first, the third and so on.
            offload: whether what is kept for the recomputation goes to the CPU.

        Raises:
            ValueError: the backbone has no layers that can be recomputed.
        """
        check_count("every_n_layers", every_n_layers, 1)
        layers = _layers(self.backbone)
        if not layers:
            raise ValueError(
                f"model: expected one whose layers support gradient checkpointing, "
                f"got {type(self.backbone).__name__}"
            )
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        run = functools.partial(checkpoint, **options)
        for index, layer in enumerate(layers):
            layer.gradient_checkpointing = index % every_n_layers == 0
            layer._gradient_checkpointing_func = functools.partial(_recompute, layer, run, offload)
        self.is_gradient_checkpointing = True
        set_mode(self.backbone, self.training)

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations again."""
        if self.is_gradient_checkpointing:
            for layer in _layers(self.backbone):
                layer.training = layer.gradient_checkpointing = False
        self.is_gradient_checkpointing = False

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """:meth:`gradient_checkpointing_enable` by its newer name."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    activation_checkpointing_disable = gradient_checkpointing_disable

    def check_keeps_cache(self) -> None:
        """Raise ValueError in training mode with checkpointing: layers keep no cache then."""
        if self.training and self.is_gradient_checkpointing:
            raise ValueError(
                "model: expected evaluation mode (model.eval()) with gradient checkpointing, as "
                "its layers keep no cache in training mode, got training mode"
            )


class Own:
    """The model's own recomputation, switched off if it was on.

    Attributes:
        options: of ``torch.utils.checkpoint.checkpoint``, as it was switched on; None if it was
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
