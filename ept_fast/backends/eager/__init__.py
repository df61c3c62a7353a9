"""The operations in plain PyTorch, for any device and type."""

from __future__ import annotations

from ept_fast.backends.eager.reconstruct import reconstruct_backward, reconstruct_forward
from ept_fast.backends.eager.splice import splice_backward, splice_forward, splice_kept
from ept_fast.ops.types import Parameters, SpliceInputs

__all__ = [
    "available",
    "reconstruct_backward",
    "reconstruct_forward",
    "splice_backward",
    "splice_forward",
    "splice_kept",
    "supports",
]


def available() -> tuple[bool, str]:
    """Whether the backend works on this machine, and why."""
    return True, "plain PyTorch, any device and type"


def supports(tensors: Parameters | SpliceInputs, by_name: bool = False) -> tuple[bool, str]:
    """Whether it serves these tensors: always."""
    return available()
