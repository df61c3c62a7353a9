"""What the Triton backend serves: each call described once, then carried out by its plan.

What a forward keeps for its backward is one tensor of bytes. Forward and backward list what is in
it with the same functions, in the same order. Operation 2 alone is both operations in a row with
nothing for the first to do.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ept_fast.backends import eager
from ept_fast.backends.fused import CALLS, is_plain, splice_flags
from ept_fast.backends.triton import runtime
from ept_fast.backends.triton.runtime import Plan
from ept_fast.kernels import reconstruct, splice
from ept_fast.kernels.reconstruct.config import backward_config as reconstruct_backward_config
from ept_fast.kernels.reconstruct.config import forward_config as reconstruct_forward_config
from ept_fast.kernels.splice.config import backward_config, forward_config
from ept_fast.ops.types import (
    OF_EPT,
    Flags,
    Needs,
    Parameters,
    Saved,
    SpliceGrads,
    SpliceInputs,
    Text,
)

__all__ = [
    "describe_path_backward",
    "describe_path_forward",
    "describe_reconstruct_backward",
    "describe_reconstruct_forward",
    *CALLS,
]

_PARAMETERS = len(Parameters._fields)

# Operation 1


def describe_reconstruct_forward(plan: Plan, flags: Flags, sizes: Any) -> None:
    """Fill a plan for the tensors of :class:`Parameters`."""
    parameters = Parameters(*plan.inputs)
    p = parameters.short_prompt
    out = plan.returned(p.shape, p.dtype)
    reconstruct.forward(plan, parameters, flags, out, plan.returned, sizes)


def reconstruct_forward(parameters: Parameters, flags: Flags) -> tuple[Tensor, Saved]:
    """P′ ``[T, m, d]`` and what the backward needs."""
    if is_plain(parameters):
        return eager.reconstruct_forward(parameters, flags)
    describe, sizes = describe_reconstruct_forward, reconstruct_forward_config
    (out, *saved), _ = runtime.call(describe, parameters, flags, sizes)
    return out, Saved(*saved)


def describe_reconstruct_backward(plan: Plan, flags: Flags, sizes: Any) -> None:
    """Fill a plan for Y and the tensors of :class:`Parameters` and :class:`Saved`."""
    grad, *rest = plan.inputs
    parameters, saved = Parameters(*rest[:_PARAMETERS]), Saved(*rest[_PARAMETERS:])
    into: Any = Parameters(*(t and plan.returned_like(t) for t in parameters))  # type: ignore[arg-type]
    reconstruct.backward(plan, grad, parameters, flags, saved, into, None, sizes)


def reconstruct_backward(
    grad: Tensor, parameters: Parameters, saved: Saved, flags: Flags
) -> Parameters:
    """Gradients of the parameters in their types, from Y = dL/dP′ ``[T, m, d]``."""
    if is_plain(parameters):
        return eager.reconstruct_backward(grad, parameters, saved, flags)
    tensors = (grad, *parameters, *(tensor.contiguous() for tensor in saved))
    describe, sizes = describe_reconstruct_backward, reconstruct_backward_config
    found = iter(runtime.call(describe, tensors, flags, sizes)[0])
    return Parameters(*(None if t is None else next(found) for t in parameters))  # type: ignore[arg-type]


# Both operations


def _seen(parameters: Any, fusion: bool) -> Any:
    """What the first operation sees; None if it changes nothing."""
    seen = parameters.seen(fusion)
    return seen if seen.has_offset or seen.has_spaces else None


def describe_path_forward(
    plan: Plan,
    flags: Flags,
    fusion: bool,
    first_sizes: Any,
    second_sizes: Any,
    with_places: bool = False,
) -> None:
    """Fill a plan for the tensors of :class:`Parameters` and :class:`Text`."""
    parameters = Parameters(*plan.inputs[:_PARAMETERS]).with_task_axis()
    text = Text(*plan.inputs[_PARAMETERS:])
    prompt: Any = parameters.short_prompt
    if seen := _seen(parameters, fusion):
        prompt = plan.scratch(prompt.shape, prompt.dtype)
        reconstruct.forward(plan, seen, flags, prompt, plan.kept, first_sizes)
    inputs = text.behind(prompt, parameters)
    splice.forward(plan, inputs, flags.scaling, plan.kept, second_sizes, with_places)


def path_forward(
    parameters: Parameters,
    text: Text,
    flags: Flags,
    fusion: bool,
    known: Hashable = None,
    places: list[Tensor] | None = None,
) -> list[Tensor]:
    """The spliced text ``[B, m + S, d]`` and what the backward needs.

    ``known`` stands for all that the launches depend on (:func:`.runtime.plan_of`). ``places``, if
    given, gets the mask and the positions of prompt and text, ``[B, m + S]``.
    """
    choices = (flags, fusion, reconstruct_forward_config, forward_config, places is not None)
    tensors = (*parameters, *text)
    (out, *written), kept = runtime.call(describe_path_forward, tensors, *choices, known=known)
    if places is not None:
        places += written
    return [out, out.new_empty(0, dtype=torch.uint8) if kept is None else kept]


class _Size:
    """Adds up the bytes of what is asked for, as a plan lays it out."""

    def __init__(self) -> None:
        self.bytes = 0

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.bytes += runtime.rounded(prod(shape) * dtype.itemsize)


def path_kept(parameters: Parameters, text: Text, fusion: bool) -> list[Tensor]:
    """An empty tensor of the size of what :func:`path_forward` keeps."""
    size, given = _Size(), parameters.with_task_axis()
    if seen := _seen(given, fusion):
        reconstruct.saved(size, seen)
    inputs = text.behind(given.short_prompt, given)
    splice.kept(size, inputs, *inputs.text.shape[:2])
    return [parameters.short_prompt.new_empty(size.bytes, dtype=torch.uint8)]


def describe_path_backward(
    plan: Plan, flags: Flags, fusion: bool, needs: Needs, first_sizes: Any, second_sizes: Any
) -> None:
    """Fill a plan for the gradient, the tensors of :class:`Parameters` and :class:`Text`, and what
    is kept.
    """
    grad, *rest, memory = plan.inputs
    parameters: Any = Parameters(*rest[:_PARAMETERS]).with_task_axis()
    text, find = Text(*rest[_PARAMETERS:]), plan.pieces_of(memory)
    seen = _seen(parameters, fusion)
    saved = reconstruct.saved(find, seen) if seen else None
    found = (
        plan.returned_like(t) if each else None
        for t, each in zip(rest[:_PARAMETERS], needs.of(parameters, fusion), strict=True)
    )
    into: Any = Parameters(*found)  # type: ignore[arg-type]
    halves = None
    ends: Any = SpliceGrads(into.short_prompt, into.offset_a, into.offset_b)
    if not needs.offset:
        ends = ends._replace(offset_a=None, offset_b=None)
    if seen and needs.prompt:
        ends = ends._replace(prompt=plan.scratch(parameters.short_prompt.shape))
        if seen.has_offset and needs.offset:
            halves = plan.scratch(into.offset_a.shape), plan.scratch(into.offset_b.shape)
            ends = ends._replace(offset_a=halves[0], offset_b=halves[1])
    inputs = text.behind(parameters.short_prompt, parameters)
    with plan.passing():
        splice.backward(plan, grad, inputs, flags.scaling, find, ends, second_sizes)
    if seen and needs.prompt:
        reconstruct.backward(plan, ends.prompt, seen, flags, saved, into, halves, first_sizes)


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
    """The gradient of each parameter in its type and shape; None where not needed.

    ``known`` is the forward's.
    """
    tensors = (grad, *parameters, *text, *kept)
    if known is not None:
        known = known, runtime.facts_of((grad,)), runtime.layouts_of(tensors)
    choices = (flags, fusion, needs, reconstruct_backward_config, backward_config)
    found, _ = runtime.call(describe_path_backward, tensors, *choices, known=known)
    if len(found) == OF_EPT and not parameters.has_biases:
        return [*found, None, None]
    rest = iter(found)
    return [next(rest) if each else None for each in needs.of(parameters, fusion)]


# Operation 2


def _describe_gathered(plan: Plan, scaling: float, sizes: Any) -> None:
    """Fill a plan for the tensors of :class:`SpliceInputs` with ``prompt_rows``."""
    splice.forward(plan, SpliceInputs(*plan.inputs), scaling, plan.kept, sizes, False)


def _describe_gathered_backward(
    plan: Plan, scaling: float, asked: tuple[bool, bool, bool], sizes: Any
) -> None:
    """Fill a plan for the gradient, the places of the rows and where each row's start, the tensors
    of :class:`SpliceInputs`, and what is kept.
    """
    grad, places, starts, *rest, memory = plan.inputs
    inputs = SpliceInputs(*rest)
    ends = (inputs.prompt, inputs.offset_a, inputs.offset_b)
    d_p, d_a, d_b = (
        plan.returned_like(t) if each else None  # type: ignore[arg-type]
        for t, each in zip(ends, asked, strict=True)
    )
    into: Any = SpliceGrads(None, d_a, d_b)  # type: ignore[arg-type]
    find = plan.pieces_of(memory)
    splice.backward(plan, grad, inputs, scaling, find, into, sizes)
    if d_p is not None:
        splice.gather_backward(plan, grad, d_p, places, starts, inputs.num_tokens)


def splice_forward(inputs: SpliceInputs, scaling: float) -> tuple[Tensor, list[Tensor]]:
    """The prompt before the text and the low-rank offset onto its real tokens, ``[B, m + S, d]``;
    and where the rows' tokens lie, for the backward.
    """
    if inputs.prompt_rows is not None:
        (out,), memory = runtime.call(_describe_gathered, inputs, scaling, forward_config)
        return out, [out.new_empty(0, dtype=torch.uint8) if memory is None else memory]
    out, *kept = path_forward(*inputs.parts(), splice_flags(scaling), False)
    return out, kept


def splice_kept(inputs: SpliceInputs) -> list[Tensor]:
    """Empty tensors of the sizes that :func:`splice_forward` keeps."""
    return path_kept(*inputs.parts(), False)


def splice_backward(
    grad: Tensor,
    inputs: SpliceInputs,
    kept: list[Tensor],
    scaling: float,
    need_prompt: bool,
    need_offset: bool,
) -> SpliceGrads:
    """Gradients of prompt, offset_a and offset_b in their types; empty where not needed."""
    if inputs.prompt_rows is not None:
        # Of each row of the prompt the places that have it, in their order.
        rows, places = inputs.prompt_rows.flatten().sort(stable=True)
        every = torch.arange(inputs.prompt.shape[1] + 1, dtype=rows.dtype, device=rows.device)
        tensors = (grad, places, torch.searchsorted(rows, every), *inputs, *kept)
        offset = need_offset and inputs.offset_a is not None
        asked = (need_prompt, offset, offset)
        describe = _describe_gathered_backward
        returned = iter(runtime.call(describe, tensors, scaling, asked, backward_config)[0])
        return SpliceGrads(*(next(returned) if each else grad.new_empty(0) for each in asked))
    parameters, text = inputs.parts()
    given = Text(attention_mask=text.attention_mask, task_ids=text.task_ids)
    needs = Needs(need_prompt, need_offset)
    found = path_backward(grad, parameters, given, kept, splice_flags(scaling), False, needs)
    return SpliceGrads(*(grad.new_empty(0) if each is None else each for each in found[:3]))
