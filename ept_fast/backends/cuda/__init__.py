"""The fused kernels in CUDA C++, for NVIDIA GPUs on which Triton is missing, known bad or off.

The library is looked for, built and loaded by the first call that needs it, and by nothing before.
What is left of a call with an empty tensor, or of a prompt alone, is plain PyTorch's to do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ept_fast.backends import eager
from ept_fast.backends.eager import is_degenerate
from ept_fast.kernels.launch import target

__all__ = [
    "available",
    "reconstruct_backward",
    "reconstruct_forward",
    "splice_backward",
    "splice_forward",
    "supports",
]

_Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
_Three = tuple[Tensor, Tensor, Tensor]
_OLDEST = 75
# The limits of csrc/kernels.h, in its names.
_MAX_RANK = 256
_MAX_SPACES = 512
_MAX_SIZE = 1 << 30


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


def supports(tensors: dict[str, Tensor | None], by_name: bool = False) -> tuple[bool, str]:
    """Whether it serves these tensors, and why (not).

    Where it is not asked for by name, the library is built and loaded for the answer, so that a
    build that fails leaves the call to the next backend.
    """
    device = None
    for name, tensor in tensors.items():
        if tensor is not None:
            device = tensor.device
            if tensor.dtype == torch.float64:
                return False, f"{name} is float64, the kernels compute in float32"
    if device is None or device.type != "cuda" or torch.version.hip is not None:
        return False, "not on an NVIDIA GPU"
    ok, reason = _sizes_fit(tensors)
    if not ok:
        return False, reason
    refusal = _refusal(device, prepare=not by_name)
    return not refusal, refusal or reason


def _refusal(device: torch.device, prepare: bool) -> str:
    """Why neither this GPU nor the library would do; empty where both do."""
    from ept_fast.backends.cuda import library

    architecture = target(device)
    capability = int(architecture.removeprefix("sm_"))
    if capability < _OLDEST:
        return f"{architecture} is older than sm_{_OLDEST}"
    return library.problem(capability, prepare)


# The compiler asks while it traces a call, and cannot trace a build: the answer is a constant.
_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _sizes_fit(tensors: dict[str, Tensor | None]) -> tuple[bool, str]:
    for name, tensor in tensors.items():
        if tensor is not None and any(size > _MAX_SIZE for size in tensor.shape):
            return False, f"{name} has an axis of more than {_MAX_SIZE}"
    offset_a, down = tensors.get("offset_a"), tensors.get("space_down")
    if offset_a is not None and offset_a.shape[-1] > _MAX_RANK:
        return False, f"rank {offset_a.shape[-1]} is more than {_MAX_RANK}"
    if down is not None and down.shape[-3] * max(1, down.shape[-1]) > _MAX_SPACES:
        return False, (
            f"{down.shape[-3]} subspaces of width {down.shape[-1]} are more than "
            f"{_MAX_SPACES} together"
        )
    return True, "fused kernels"


def _operators() -> Any:
    """torch's namespace of this package, with the library's operators in it."""
    from ept_fast.backends.cuda import library

    library.load()
    return torch.ops.ept_fast


def _is_plain(short_prompt: Tensor, *rest: Tensor | None) -> bool:
    """Whether nothing is left of operation 1 but a copy, or a tensor is empty."""
    return is_degenerate(short_prompt, *rest) or all(tensor is None for tensor in rest)


def reconstruct_forward(
    short_prompt: Tensor,
    offset_a: Tensor | None,
    offset_b: Tensor | None,
    space_down: Tensor | None,
    space_up: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    scaling: float,
    activation: str,
    gate: str,
    temperature: float,
) -> _Seven:
    """P′ [T, m, d] and what the backward needs, as in :mod:`ept_fast.backends.eager`."""
    seven = (short_prompt, offset_a, offset_b, space_down, space_up, gate_weight, gate_bias)
    if _is_plain(*seven):
        return eager.reconstruct_forward(*seven, scaling, activation, gate, temperature)
    result: _Seven = _operators().cuda_reconstruct_forward(
        *seven, scaling, activation, gate, temperature
    )
    return result


def reconstruct_backward(
    grad: Tensor,
    short_prompt: Tensor,
    offset_a: Tensor | None,
    offset_b: Tensor | None,
    space_down: Tensor | None,
    space_up: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    query: Tensor,
    stats: Tensor,
    mix: Tensor,
    hidden: Tensor,
    gates: Tensor,
    cross: Tensor,
    scaling: float,
    activation: str,
    gate: str,
    temperature: float,
) -> _Seven:
    """Gradients of the seven tensors, as in :mod:`ept_fast.backends.eager`."""
    seven = (short_prompt, offset_a, offset_b, space_down, space_up, gate_weight, gate_bias)
    saved = (query, stats, mix, hidden, gates, cross)
    if _is_plain(*seven):
        return eager.reconstruct_backward(
            grad, *seven, *saved, scaling, activation, gate, temperature
        )
    result: _Seven = _operators().cuda_reconstruct_backward(
        grad, *seven, *saved, scaling, activation, gate, temperature
    )
    return result


def splice_forward(
    prompt: Tensor,
    input_ids: Tensor | None,
    weight: Tensor | None,
    inputs_embeds: Tensor | None,
    offset_a: Tensor | None,
    offset_b: Tensor | None,
    attention_mask: Tensor | None,
    task_ids: Tensor | None,
    scaling: float,
) -> Tensor:
    """The prompt before the text and the offset onto its real tokens, [B, m + S, d]."""
    given = (
        prompt,
        input_ids,
        weight,
        inputs_embeds,
        offset_a,
        offset_b,
        attention_mask,
        task_ids,
    )
    if is_degenerate(*given):
        return eager.splice_forward(*given, scaling)
    result: Tensor = _operators().cuda_splice_forward(*given, scaling)
    return result


def splice_backward(
    grad: Tensor,
    prompt: Tensor,
    offset_a: Tensor | None,
    offset_b: Tensor | None,
    attention_mask: Tensor | None,
    task_ids: Tensor | None,
    scaling: float,
    need_prompt: bool,
    need_offset: bool,
) -> _Three:
    """Gradients of prompt, offset_a and offset_b in their types from that of the output."""
    given = (grad, prompt, offset_a, offset_b, attention_mask, task_ids)
    if is_degenerate(*given):
        return eager.splice_backward(*given, scaling, need_prompt, need_offset)
    result: _Three = _operators().cuda_splice_backward(*given, scaling, need_prompt, need_offset)
    return result
