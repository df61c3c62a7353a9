"""The fused kernels in CUDA C++, for NVIDIA GPUs on which Triton is missing, known bad or off.

The library is looked for, built and loaded by the first call that needs it, and by nothing before.
What is left of a call with an empty tensor, or of a prompt alone, is plain PyTorch's to do. Of both
operations in a row the halves of the offset's gradients are rounded each, and added.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ept_fast.backends import eager
from ept_fast.backends.fused import has_empty, is_plain, needs_float64, too_large
from ept_fast.kernels.launch import target
from ept_fast.ops.types import Flags, Parameters, Saved, SpliceGrads, SpliceInputs

__all__ = [
    "available",
    "reconstruct_backward",
    "reconstruct_forward",
    "splice_backward",
    "splice_forward",
    "supports",
]

_OLDEST = 75
_MAX_SIZE = 1 << 30  # of an axis; kernels.h has it too


def available() -> tuple[bool, str]:
    """Whether the backend works on this machine, and why (not). Nothing is built for the answer."""
    from ept_fast.backends.cuda import library

    found = library.state()
    if torch.version.hip is not None:
        return False, "a ROCm build of torch"
    if not torch.cuda.is_available():
        return False, f"no GPU; {found.text}"
    refusal = _refusal(torch.device("cuda", torch.cuda.current_device()), prepare=False)
    return not refusal, refusal or found.text


def supports(tensors: Parameters | SpliceInputs, by_name: bool = False) -> tuple[bool, str]:
    """Whether it serves these tensors, and why (not).

    If it is not asked for by name, the library is built and loaded for the answer, so that a build
    that fails leaves the call to the next backend.
    """
    device = tensors[0].device
    refusal = needs_float64(tensors)
    if not refusal and (device.type != "cuda" or torch.version.hip is not None):
        refusal = "not on an NVIDIA GPU"
    refusal = refusal or too_large(tensors) or _too_long(tensors)
    refusal = refusal or _refusal(device, prepare=not by_name)
    return not refusal, refusal or "fused kernels"


def _refusal(device: torch.device, prepare: bool) -> str:
    """Why neither this GPU nor the library would do; empty if both do."""
    from ept_fast.backends.cuda import library

    architecture = target(device)
    capability = int(architecture.removeprefix("sm_"))
    if capability < _OLDEST:
        return f"{architecture} is older than sm_{_OLDEST}"
    return library.problem(capability, prepare)


# The compiler asks while it traces a call, and cannot trace a build: the answer is a constant.
_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _too_long(tensors: Parameters | SpliceInputs) -> str:
    for name, tensor in zip(tensors._fields, tensors, strict=True):
        if tensor is not None and any(size > _MAX_SIZE for size in tensor.shape):
            return f"{name} has an axis of more than {_MAX_SIZE}"
    return ""


def _operators() -> Any:
    """torch's namespace of this package, with the library's operators in it."""
    from ept_fast.backends.cuda import library

    library.load()
    return torch.ops.ept_fast


def reconstruct_forward(parameters: Parameters, flags: Flags) -> tuple[Tensor, Saved]:
    """P′ [T, m, d] and what the backward needs."""
    if is_plain(parameters):
        return eager.reconstruct_forward(parameters, flags)
    prompt, *saved = _operators().cuda_reconstruct_forward(list(parameters), *flags)
    return prompt, Saved(*saved)


def reconstruct_backward(
    grad: Tensor, parameters: Parameters, saved: Saved, flags: Flags
) -> Parameters:
    """Gradients of the parameters in their types, from Y = dL/dP′ [T, m, d]."""
    if is_plain(parameters):
        return eager.reconstruct_backward(grad, parameters, saved, flags)
    grads = _operators().cuda_reconstruct_backward(grad, list(parameters), list(saved), *flags)
    return Parameters(*grads)


def splice_forward(inputs: SpliceInputs, scaling: float) -> tuple[Tensor, list[Tensor]]:
    """The prompt before the text and the low-rank offset onto its real tokens, [B, m + S, d]."""
    if has_empty(*inputs):
        return eager.splice_forward(inputs, scaling)
    return _operators().cuda_splice_forward(list(inputs), scaling), []


def splice_backward(
    grad: Tensor,
    inputs: SpliceInputs,
    kept: list[Tensor],
    scaling: float,
    need_prompt: bool,
    need_offset: bool,
) -> SpliceGrads:
    """Gradients of prompt, offset_a and offset_b in their types from that of the output."""
    if has_empty(grad, *inputs):
        return eager.splice_backward(grad, inputs, kept, scaling, need_prompt, need_offset)
    return SpliceGrads(
        *_operators().cuda_splice_backward(grad, list(inputs), scaling, need_prompt, need_offset)
    )


def splice_kept(inputs: SpliceInputs) -> list[Tensor]:
    """The forward keeps nothing."""
    return []
