"""The type that products and sums accumulate in, whatever the tensors are stored in."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["accumulation_dtype"]


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where any of the tensors is, else float32."""
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        return torch.float64
    return torch.float32
