"""The type that products and sums accumulate in, whatever the tensors are stored in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["accumulation_dtype", "without_autocast"]


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any of the tensors is, else float32."""
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        return torch.float64
    return torch.float32


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Autocast off: the operations choose their types themselves."""
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            yield
    else:
        yield
