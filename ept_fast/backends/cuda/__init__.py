"""The fused kernels in CUDA C++, for NVIDIA GPUs on which Triton is missing, known bad or off.

The library is looked for, built and loaded by the first call that needs it, and by nothing before.
What is left of a call with an empty tensor, or of a prompt alone, is plain PyTorch's to do. Each
direction is one call of the library, of both operations in a row too; there the halves of the
offset's gradients are rounded each, and added.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ept_fast.backends import eager
from ept_fast.backends.fused import (
    CALLS,
    has_empty,
    is_plain,
    needs_float64,
    splice_flags,
    target,
    too_large,
)
from ept_fast.config import GATES
from ept_fast.ops.activations import ACTIVATIONS
from ept_fast.ops.types import (
    Flags,
    Needs,
    Parameters,
    Saved,
    SpliceGrads,
    SpliceInputs,
    Text,
)

__all__ = ["available", "supports", *CALLS]

_OLDEST = 75


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
    if not refusal and isinstance(tensors, SpliceInputs) and tensors.prompt_rows is not None:
        refusal = "prompt_rows, which these kernels do not gather"
    refusal = refusal or too_large(tensors)
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


_overrides = torch.library.Library("ept_fast", "IMPL")  # type: ignore[no-untyped-call]


@functools.cache
def _operator(name: str) -> Any:
    """One of the library's operators. The Functions that call it are its autograd: torch's own, for
    an operator that has none, would look at every tensor in every call.
    """
    from ept_fast.backends.cuda import library

    library.load()
    _overrides.impl(name, torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
    return getattr(torch.ops.ept_fast, name).default


_ACTIVATIONS = {name: number for number, name in enumerate(ACTIVATIONS)}
_GATES = {name: number for number, name in enumerate(GATES)}


def _numbers(flags: Flags) -> tuple[float, int, int, float]:
    """The flags as the operators take them."""
    scaling, activation, gate, temperature = flags
    return scaling, _ACTIVATIONS[activation], _GATES[gate], temperature


def reconstruct_forward(parameters: Parameters, flags: Flags) -> tuple[Tensor, Saved]:
    """P′ [T, m, d] and what the backward needs."""
    if is_plain(parameters):
        return eager.reconstruct_forward(parameters, flags)
    no_text = Text()
    prompt, *saved = _operator("cuda_forward")(*parameters, *no_text, *_numbers(flags), True)
    return prompt, Saved(*saved)


def reconstruct_backward(
    grad: Tensor, parameters: Parameters, saved: Saved, flags: Flags
) -> Parameters:
    """Gradients of the parameters in their types, from Y = dL/dP′ [T, m, d]."""
    if is_plain(parameters):
        return eager.reconstruct_backward(grad, parameters, saved, flags)
    kept = [tensor.contiguous() for tensor in saved]
    found = _backward(grad, parameters, Text(), kept, flags, True, Needs(True, False))
    return Parameters(*found)  # type: ignore[arg-type]


def splice_forward(inputs: SpliceInputs, scaling: float) -> tuple[Tensor, list[Tensor]]:
    """The prompt before the text and the low-rank offset onto its real tokens, [B, m + S, d]."""
    if has_empty(*inputs):
        return eager.splice_forward(inputs, scaling)
    parameters, text = inputs.parts()
    return path_forward(parameters, text, splice_flags(scaling), fusion=False)[0], []


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
    parameters, text = inputs.parts()
    needs = Needs(need_prompt, need_offset)
    nothing = [grad.new_empty(0)]
    found = _backward(grad, parameters, text, nothing, splice_flags(scaling), False, needs)
    return SpliceGrads(*found[: len(SpliceGrads._fields)])  # type: ignore[arg-type]


def splice_kept(inputs: SpliceInputs) -> list[Tensor]:
    """The forward keeps nothing."""
    return []


def path_forward(
    parameters: Parameters,
    text: Text,
    flags: Flags,
    fusion: bool,
    known: Hashable = None,
    places: list[Tensor] | None = None,
) -> list[Tensor]:
    """Both operations: the spliced text [B, m + S, d] and what the backward needs.

    ``places`` stays as it is: no kernel here writes mask and positions.
    """
    found: list[Tensor] = _operator("cuda_forward")(*parameters, *text, *_numbers(flags), fusion)
    return found


def path_kept(parameters: Parameters, text: Text, fusion: bool) -> list[Tensor]:
    """An empty tensor of the size of what :func:`path_forward` keeps."""
    saved = Saved.empty(parameters.with_task_axis().seen(fusion))
    size = sum(-(-4 * tensor.numel() // 16) * 16 for tensor in saved)
    return [parameters.short_prompt.new_empty(size, dtype=torch.uint8)]


def path_backward(
    grad: Tensor,
    parameters: Parameters,
    text: Text,
    kept: list[Tensor],
    flags: Flags,
    fusion: bool,
    needs: Needs,
    known: Hashable = None,
) -> list[Tensor | None]:
    """The gradient of each parameter in its type; empty or None where ``needs`` does not ask for
    it.
    """
    if has_empty(grad):
        return [
            torch.zeros_like(t) if need and t is not None else grad.new_empty(0)
            for t, need in zip(parameters, needs.of(parameters, fusion), strict=True)
        ]
    return _backward(grad, parameters, text, kept, flags, fusion, needs)


def _backward(
    grad: Tensor,
    parameters: Parameters,
    text: Text,
    kept: list[Tensor],
    flags: Flags,
    fusion: bool,
    needs: Needs,
) -> list[Tensor | None]:
    grads: list[Tensor | None] = _operator("cuda_backward")(
        grad,
        *parameters,
        text.attention_mask,
        text.task_ids,
        kept,
        *needs,
        *_numbers(flags),
        fusion,
    )
    return grads if parameters.has_biases else [*grads, None, None]
