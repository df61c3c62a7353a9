"""The fused kernels in Triton, for GPUs; on a CPU only under Triton's interpreter, for tests.

Triton is imported by the first call that runs a kernel. The interpreter (``TRITON_INTERPRET=1``
before anything imports triton) is thousands of times slower than the ``eager`` backend, so it
serves calls that name this backend and no others.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from functools import partial

import torch
from torch import Tensor

from ept_fast.backends import composed, eager
from ept_fast.backends.fused import has_empty, needs_float64, too_large
from ept_fast.kernels.launch import target
from ept_fast.ops.types import Flags, Parameters, Saved, SpliceGrads, SpliceInputs

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

_OLDEST = (3, 5, 0)
# Architecture, the first version that is good again, what is wrong before it. From the compilers'
# own trackers: triton-lang/triton pull request 8485 and issue 10331.
_KNOWN_BAD = (
    ("sm_103", (3, 5, 1), "its matrix products crash"),
    ("sm_121", (3, 6, 0), "its assembler does not know the architecture"),
)
_MAX_TOKENS = 512


def _version() -> tuple[int, ...] | None:
    """Triton's version, without importing it."""
    for name in ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm"):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return tuple(int(part) for part in re.findall(r"\d+", found)[:3])
    return None


_VERSION = _version()


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _refusal(version: tuple[int, ...] | None, architecture: str) -> str:
    """Why this version of Triton does not serve this architecture; empty if it does."""
    if version is None:
        return "triton is not installed"
    name = _dotted(version)
    if version < _OLDEST:
        return f"triton {name} is older than {_dotted(_OLDEST)}"
    if architecture.startswith("sm_") and int(architecture[3:]) < 80:
        return f"{architecture} is older than sm_80"
    for bad, good_again, what in _KNOWN_BAD:
        if architecture == bad and version < good_again:
            return f"triton {name} on {bad}: {what} before {_dotted(good_again)}"
    return ""


def available() -> tuple[bool, str]:
    """Whether the backend works on this machine, and why (not)."""
    if _interpreted():
        refusal = _refusal(_VERSION, "cpu")
        return not refusal, refusal or "the interpreter on a CPU, only if it is asked for"
    if not torch.cuda.is_available():
        return False, _refusal(_VERSION, "cpu") or "no GPU"
    architecture = target(torch.device("cuda", torch.cuda.current_device()))
    refusal = _refusal(_VERSION, architecture)
    return not refusal, refusal or f"fused kernels for {architecture}"


def supports(tensors: Parameters | SpliceInputs, by_name: bool = False) -> tuple[bool, str]:
    """Whether it serves these tensors, and why (not)."""
    wide = needs_float64(tensors)
    if wide:
        return False, wide
    device = tensors[0].device
    if device.type not in ("cpu", "cuda"):
        return False, "neither a GPU that Triton serves nor a CPU"
    if device.type == "cpu":
        if not _interpreted():
            return False, "CPU tensors, and TRITON_INTERPRET=1 is not set"
        if not by_name:
            return False, "the interpreter serves a CPU only if it is asked for by name"
    elif _interpreted():
        return False, "GPU tensors, and TRITON_INTERPRET=1 is set"
    refusal = _refusal(_VERSION, target(device)) or too_large(tensors) or _too_long(tensors)
    return not refusal, refusal or "fused kernels"


def _too_long(tensors: Parameters | SpliceInputs) -> str:
    m = tensors[0].shape[-2]
    if isinstance(tensors, Parameters) and m > _MAX_TOKENS:
        return f"{m} virtual tokens are more than {_MAX_TOKENS}"
    return ""


def reconstruct_forward(parameters: Parameters, flags: Flags) -> tuple[Tensor, Saved]:
    """P′ [T, m, d] and what the backward needs."""
    from ept_fast.kernels import reconstruct

    owner = eager if has_empty(*parameters) else reconstruct
    result: tuple[Tensor, Saved] = owner.reconstruct_forward(parameters, flags)
    return result


def reconstruct_backward(
    grad: Tensor, parameters: Parameters, saved: Saved, flags: Flags
) -> Parameters:
    """Gradients of the parameters in their types, from Y = dL/dP′ [T, m, d]."""
    from ept_fast.kernels import reconstruct

    owner = eager if has_empty(*parameters) else reconstruct
    result: Parameters = owner.reconstruct_backward(grad, parameters, saved, flags)
    return result


def splice_forward(inputs: SpliceInputs, scaling: float) -> Tensor:
    """The prompt before the text and the offset onto its real tokens, [B, m + S, d]."""
    from ept_fast.kernels import splice

    return splice.splice_forward(inputs, scaling)


def splice_backward(
    grad: Tensor, inputs: SpliceInputs, scaling: float, need_prompt: bool, need_offset: bool
) -> SpliceGrads:
    """Gradients of prompt, offset_a and offset_b in their types from that of the output."""
    from ept_fast.kernels import splice

    return splice.splice_backward(grad, inputs, scaling, need_prompt, need_offset)


path_forward = partial(composed.path_forward, sys.modules[__name__])
path_backward = partial(composed.path_backward, sys.modules[__name__])
path_kept = composed.path_kept
