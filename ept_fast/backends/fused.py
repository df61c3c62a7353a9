"""What the backends of fused kernels have in common: their calls, the architecture of a GPU,
limits, and what is left to eager.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ept_fast.ops.types import Flags, Parameters, SpliceInputs

__all__ = [
    "CALLS",
    "MAX_RANK",
    "MAX_SIZE",
    "MAX_SPACES",
    "MAX_TOKENS",
    "has_empty",
    "is_plain",
    "needs_float64",
    "splice_flags",
    "target",
    "too_large",
]

# What each of them serves.
CALLS = (
    "path_backward",
    "path_forward",
    "path_kept",
    "reconstruct_backward",
    "reconstruct_forward",
    "splice_backward",
    "splice_forward",
    "splice_kept",
)
# The largest sizes that every backend of kernels serves. csrc/kernels.h has the same names.
MAX_RANK = 256  # r
MAX_SPACES = 512  # K·h; K·(h + 1) with biases beside a gate
MAX_TOKENS = 512  # m of operation 1
MAX_SIZE = 1 << 30  # any one axis


_forced_target: str | None = None


@functools.cache
def _architecture(device: torch.device) -> str:
    """Asked of the driver once for each device."""
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def target(device: torch.device) -> str:
    """The architecture that kernels for this device are compiled for: "sm_90", "gfx942", "cpu"."""
    if _forced_target is not None:
        return _forced_target
    return "cpu" if device.type == "cpu" else _architecture(device)


# What `torch.compiler.assume_constant_result` does, without its import of the whole compiler: the
# compiler asks for the target while it traces a call, and cannot trace the driver's answer.
target._dynamo_marked_constant = True  # type: ignore[attr-defined]


def splice_flags(scaling: float) -> Flags:
    """Those of both operations in a row with nothing for the first to do."""
    return Flags(scaling, "identity", "token", 1.0)


def needs_float64(tensors: Parameters | SpliceInputs) -> str:
    """Why the kernels, which compute in float32, do not serve these types; empty if they do."""
    for name, tensor in zip(tensors._fields, tensors, strict=True):
        if tensor is not None and tensor.dtype == torch.float64:
            return f"{name} is float64, the kernels compute in float32"
    return ""


def too_large(tensors: Parameters | SpliceInputs) -> str:
    """Why the kernels do not serve these sizes; empty if they do."""
    if tensors.offset_a is not None and tensors.offset_a.shape[-1] > MAX_RANK:
        return f"rank {tensors.offset_a.shape[-1]} is more than {MAX_RANK}"
    m = tensors[0].shape[-2]
    if isinstance(tensors, Parameters) and m > MAX_TOKENS:
        return f"{m} virtual tokens are more than {MAX_TOKENS}"
    down = tensors.space_down if isinstance(tensors, Parameters) else None
    if down is not None:
        biases = isinstance(tensors, Parameters) and tensors.has_biases and tensors.has_gate
        if down.shape[-3] * (max(1, down.shape[-1]) + biases) > MAX_SPACES:
            with_biases = " and biases" if biases else ""
            return (
                f"{down.shape[-3]} subspaces of width {down.shape[-1]}{with_biases} are more than "
                f"{MAX_SPACES} together"
            )
    for name, tensor in zip(tensors._fields, tensors, strict=True):
        if tensor is not None and any(size > MAX_SIZE for size in tensor.shape):
            return f"{name} has an axis of more than {MAX_SIZE}"
    return ""


def has_empty(*tensors: Tensor | None) -> bool:
    """Whether any tensor has no elements: the eager backend does what is left of such a call."""
    for tensor in tensors:  # noqa: SIM110 - every call asks, and this takes half the time
        if tensor is not None and tensor.numel() == 0:
            return True
    return False


def is_plain(parameters: Parameters) -> bool:
    """Whether nothing is left of operation 1 but a copy, or a tensor is empty."""
    return has_empty(*parameters) or not (parameters.has_offset or parameters.has_spaces)
