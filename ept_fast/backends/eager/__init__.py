"""The operations in plain PyTorch, for any device and type."""

from __future__ import annotations

import sys
from functools import partial

from ept_fast.backends import composed
from ept_fast.backends.eager.reconstruct import reconstruct_backward, reconstruct_forward
from ept_fast.backends.eager.splice import splice_backward, splice_forward
from ept_fast.ops.types import Parameters, SpliceInputs

__all__ = [
    "available",
    "path_backward",
    "path_forward",
    "path_kept",
    "reconstruct_backward",
    "reconstruct_forward",
    "splice_backward",
    "splice_forward",
    "supports",
]


def available() -> tuple[bool, str]:
    """Whether the backend works on this machine, and why."""
    return True, "plain PyTorch, any device and type"


def supports(tensors: Parameters | SpliceInputs, by_name: bool = False) -> tuple[bool, str]:
    """Whether it serves these tensors: always."""
    return available()


path_forward = partial(composed.path_forward, sys.modules[__name__])
path_backward = partial(composed.path_backward, sys.modules[__name__], wide_offset=True)
path_kept = composed.path_kept
