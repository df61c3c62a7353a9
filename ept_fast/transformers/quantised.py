"""Quantised layers that lose their gradients once they are used without."""

from __future__ import annotations

from torch import nn

__all__ = ["allow_packing", "prevent_packing"]

_FLAG = "support_avx512bf16_for_cpu"


def prevent_packing(model: nn.Module) -> list[nn.Module]:
    """Have bitsandbytes leave its 4-bit weights in the layout that gradients pass through.

    On a CPU, in evaluation mode, a product that needs no gradient repacks them for good, for a
    kernel that has none; a frozen backbone stays in that mode, and would train nothing afterwards.

    Returns:
        The layers that packed before, for :func:`allow_packing`.

    Raises:
        ValueError: weights that are packed already.
    """
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"model: expected 4-bit weights as they were loaded, got {name}.weight packed for "
                f"a CPU, as it is after a forward in evaluation mode; load the model again"
            )
    layers = [module for module in model.modules() if getattr(module, _FLAG, False)]
    for layer in layers:
        setattr(layer, _FLAG, False)
    return layers


def allow_packing(layers: list[nn.Module]) -> None:
    """Undo :func:`prevent_packing`."""
    for layer in layers:
        setattr(layer, _FLAG, True)
