"""The fused kernels in Triton, for GPUs; on a CPU only under Triton's interpreter, for tests.

Triton is imported by the first call that runs a kernel. The interpreter (``TRITON_INTERPRET=1``
before anything imports triton) is thousands of times slower than the ``eager`` backend, so it
serves calls that name this backend and no others.
"""

from __future__ import annotations

import os
from collections.abc import Hashable

import torch
from torch import Tensor

from ept_fast.backends import eager
from ept_fast.backends.fused import is_plain, needs_float64, too_large
from ept_fast.kernels.launch import launcher, target, triton_version
from ept_fast.ops.types import (
    Flags,
    Needs,
    Parameters,
    Saved,
    SpliceGrads,
    SpliceInputs,
    Text,
)

__all__ = [
    "available",
    "path_backward",
    "path_forward",
    "path_kept",
    "reconstruct_backward",
    "reconstruct_forward",
    "splice_backward",
    "splice_forward",
    "splice_kept",
    "supports",
]

_OLDEST = (3, 5, 0)
# Architecture, the first version that is good again, what is wrong before it. From the compilers'
# own trackers: triton-lang/triton pull request 8485 and issue 10331.
_KNOWN_BAD = (
    ("sm_103", (3, 5, 1), "its matrix products crash"),
    ("sm_121", (3, 6, 0), "its assembler does not know the architecture"),
)
_VERSION = triton_version()


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
    how = f", {launcher()[1]}" if architecture.startswith("sm_") else ""
    return not refusal, refusal or f"fused kernels for {architecture}{how}"


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
    refusal = _refusal(_VERSION, target(device)) or too_large(tensors)
    return not refusal, refusal or "fused kernels"


def reconstruct_forward(parameters: Parameters, flags: Flags) -> tuple[Tensor, Saved]:
    """P′ [T, m, d] and what the backward needs."""
    if is_plain(parameters):
        return eager.reconstruct_forward(parameters, flags)
    from ept_fast.kernels import calls

    return calls.reconstruct_forward(parameters, flags)


def reconstruct_backward(
    grad: Tensor, parameters: Parameters, saved: Saved, flags: Flags
) -> Parameters:
    """Gradients of the parameters in their types, from Y = dL/dP′ [T, m, d]."""
    if is_plain(parameters):
        return eager.reconstruct_backward(grad, parameters, saved, flags)
    from ept_fast.kernels import calls

    return calls.reconstruct_backward(grad, parameters, saved, flags)


def splice_forward(inputs: SpliceInputs, scaling: float) -> tuple[Tensor, list[Tensor]]:
    """The prompt before the text and the low-rank offset onto its real tokens, [B, m + S, d]; and
    where the rows' tokens lie, for the backward.
    """
    from ept_fast.kernels import calls

    return calls.splice_forward(inputs, scaling)


def splice_kept(inputs: SpliceInputs) -> list[Tensor]:
    """Empty tensors of the sizes that :func:`splice_forward` keeps."""
    from ept_fast.kernels import calls

    return calls.splice_kept(inputs)


def splice_backward(
    grad: Tensor,
    inputs: SpliceInputs,
    kept: list[Tensor],
    scaling: float,
    need_prompt: bool,
    need_offset: bool,
) -> SpliceGrads:
    """Gradients of prompt, offset_a and offset_b in their types from that of the output."""
    from ept_fast.kernels import calls

    return calls.splice_backward(grad, inputs, kept, scaling, need_prompt, need_offset)


def path_forward(
    parameters: Parameters, text: Text, flags: Flags, fusion: bool, known: Hashable = None
) -> list[Tensor]:
    """Both operations: the spliced text [B, m + S, d] and what the backward needs.

    ``known`` stands for all that the launches depend on (:func:`ept_fast.kernels.runtime.plan_of`).
    """
    from ept_fast.kernels import calls

    return calls.path_forward(parameters, text, flags, fusion, known)


def path_kept(parameters: Parameters, text: Text, fusion: bool) -> list[Tensor]:
    """Empty tensors of the sizes that :func:`path_forward` keeps."""
    from ept_fast.kernels import calls

    return calls.path_kept(parameters, text, fusion)


def path_backward(
    grad: Tensor,
    parameters: Parameters,
    text: Text,
    kept: list[Tensor],
    flags: Flags,
    fusion: bool,
    needs: Needs,
) -> list[Tensor]:
    """The gradient of each parameter in its type; empty where ``needs`` does not ask for it."""
    from ept_fast.kernels import calls

    return calls.path_backward(grad, parameters, text, kept, flags, fusion, needs)
