"""What is asked of a backbone's embedding layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module  # the hooks of all modules

from ept_fast.storage.sharded import check_whole

__all__ = [
    "NOISE",
    "check_width",
    "embedding_device",
    "embedding_weight",
    "in_training_mode",
    "is_plain_table",
]

# What transformers sets on the layer for NEFTune, whose hook adds noise in training mode only.
NOISE = "neftune_noise_alpha"


def embedding_weight(embedding: nn.Module) -> Tensor:
    """The layer's table, ``[V, d]``; TypeError if it has none."""
    weight = getattr(embedding, "weight", None)
    if isinstance(weight, Tensor):
        check_whole({"embedding.weight": weight})
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        raise TypeError(
            f"embedding: expected a layer with a weight table [V, d], "
            f"got {type(embedding).__name__}"
        )
    return weight


def embedding_device(embedding: nn.Module) -> torch.device:
    """The device of an embedding layer's table, or that to which it is brought for each call.

    Raises:
        ValueError: a table without values, which nothing brings.
    """
    device = embedding_weight(embedding).device
    if device.type != "meta":
        return device
    # accelerate keeps what it offloads to the CPU or to a disk on the meta device between calls.
    place = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    if place is None:
        raise ValueError("embedding.weight: expected values on a device, got none (device meta)")
    return torch.device(place)


def check_width(embedding: nn.Module, hidden_size: int) -> None:
    """Raise ValueError unless the layer has this width."""
    width = int(getattr(embedding, "embedding_dim", embedding_weight(embedding).shape[-1]))
    if width != hidden_size:
        raise ValueError(f"embedding: expected width hidden_size {hidden_size}, got {width}")


@contextlib.contextmanager
def in_training_mode(embedding: nn.Module) -> Iterator[None]:
    """Training mode for a layer of a frozen model, which is in evaluation mode otherwise."""
    before, embedding.training = embedding.training, True
    try:
        yield
    finally:
        embedding.training = before


def is_plain_table(embedding: nn.Module) -> TypeGuard[nn.Embedding]:
    """Whether calling the layer is just a lookup in ``weight``."""
    return (
        type(embedding) is nn.Embedding
        and "forward" not in vars(embedding)  # where accelerate and others put their hooks
        and embedding.max_norm is None
        and not embedding._forward_hooks
        and not embedding._forward_pre_hooks
        and not every_module._global_forward_hooks
        and not every_module._global_forward_pre_hooks
    )
