"""The calls of the operations on a GPU: each described once, then carried out by its plan.

What a forward keeps for its backward is one tensor of bytes. Forward and backward list what is in
it with the same functions, in the same order.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ept_fast.kernels import reconstruct, runtime, splice
from ept_fast.kernels.reconstruct.config import backward_config as reconstruct_backward_config
from ept_fast.kernels.reconstruct.config import forward_config as reconstruct_forward_config
from ept_fast.kernels.runtime import Plan
from ept_fast.kernels.splice.config import backward_config, forward_config
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
    "describe_path_backward",
    "describe_path_forward",
    "describe_reconstruct_backward",
    "describe_reconstruct_forward",
    "describe_splice_backward",
    "describe_splice_forward",
    "path_backward",
    "path_forward",
    "path_kept",
    "reconstruct_backward",
    "reconstruct_forward",
    "splice_backward",
    "splice_forward",
    "splice_kept",
]


class _Size:
    """Adds up the bytes of what is asked for, as a plan lays it out."""

    def __init__(self) -> None:
        self.bytes = 0

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.bytes += runtime.rounded(prod(shape) * dtype.itemsize)


def _kept(results: runtime.Results) -> Tensor:
    """The memory that is kept; empty if there is nothing to keep."""
    if results.kept is not None:
        return results.kept
    return results.returned[0].new_empty(0, dtype=torch.uint8)


# Reconstruct


def describe_reconstruct_forward(plan: Plan, flags: Flags, sizes: Any) -> None:
    """Fill a plan for the tensors of :class:`Parameters`."""
    parameters = Parameters(*plan.inputs)
    p = parameters.short_prompt
    out = plan.returned(p.shape, p.dtype)
    reconstruct.forward(plan, parameters, flags, out, plan.returned, sizes)


def reconstruct_forward(parameters: Parameters, flags: Flags) -> tuple[Tensor, Saved]:
    """P′ ``[T, m, d]`` and what the backward needs, with an offset or subspaces."""
    results = runtime.call(
        describe_reconstruct_forward, parameters, flags, reconstruct_forward_config
    )
    out, *saved = results.returned
    return out, Saved(*saved)


def describe_reconstruct_backward(plan: Plan, flags: Flags, sizes: Any) -> None:
    """Fill a plan for Y and the tensors of :class:`Parameters` and :class:`Saved`."""
    grad, *rest = plan.inputs
    parameters, saved = Parameters(*rest[:7]), Saved(*rest[7:])
    into: Any = Parameters(*(t and plan.returned_like(t) for t in parameters))  # type: ignore[arg-type]
    reconstruct.backward(plan, grad, parameters, flags, saved, into, None, sizes)


def reconstruct_backward(
    grad: Tensor, parameters: Parameters, saved: Saved, flags: Flags
) -> Parameters:
    """Gradients of the parameters in their types; None for those that are absent."""
    tensors = (grad, *parameters, *(tensor.contiguous() for tensor in saved))
    found = iter(
        runtime.call(
            describe_reconstruct_backward, tensors, flags, reconstruct_backward_config
        ).returned
    )
    return Parameters(*(None if t is None else next(found) for t in parameters))  # type: ignore[arg-type]


# Splice


def describe_splice_forward(plan: Plan, scaling: float, sizes: Any) -> None:
    """Fill a plan for the tensors of :class:`SpliceInputs`."""
    splice.forward(plan, SpliceInputs(*plan.inputs), scaling, plan.kept, sizes)


def splice_forward(inputs: SpliceInputs, scaling: float) -> tuple[Tensor, list[Tensor]]:
    """The spliced text ``[B, m + S, d]`` and the plan of the rows."""
    results = runtime.call(describe_splice_forward, inputs, scaling, forward_config)
    return results.returned[0], [_kept(results)]


def splice_kept(inputs: SpliceInputs) -> list[Tensor]:
    """An empty tensor of the size of what :func:`splice_forward` keeps."""
    size = _Size()
    splice.kept(size, inputs, *inputs.text.shape[:2])
    return [inputs.prompt.new_empty(size.bytes, dtype=torch.uint8)]


def describe_splice_backward(
    plan: Plan, scaling: float, need_prompt: bool, need_offset: bool, sizes: Any
) -> None:
    """Fill a plan for the gradient, the tensors of :class:`SpliceInputs` and what is kept."""
    grad, *rest, kept = plan.inputs
    inputs = SpliceInputs(*rest)
    needs = (need_prompt, need_offset, need_offset)
    tensors = (inputs.prompt, inputs.offset_a, inputs.offset_b)
    into = splice.Gradients(
        *(
            plan.returned(t.shape, t.dtype) if need and t is not None else None
            for t, need in zip(tensors, needs, strict=True)
        )
    )
    splice.backward(plan, grad, inputs, scaling, plan.pieces_of(kept), into, sizes)


def splice_backward(
    grad: Tensor,
    inputs: SpliceInputs,
    kept: list[Tensor],
    scaling: float,
    need_prompt: bool,
    need_offset: bool,
) -> SpliceGrads:
    """Gradients of prompt, offset_a and offset_b in their types; empty where not needed."""
    given = inputs._replace(input_ids=None, weight=None, inputs_embeds=None)
    results = runtime.call(
        describe_splice_backward,
        (grad, *given, *kept),
        scaling,
        need_prompt,
        need_offset,
        backward_config,
    )
    found = iter(results.returned)
    wanted = (need_prompt, *(need_offset and t is not None for t in (given[4], given[5])))
    return SpliceGrads(*(next(found) if each else grad.new_empty(0) for each in wanted))


# Both


def _seen(parameters: Any, fusion: bool) -> Any:
    """What the first operation sees; None if it changes nothing."""
    seen = parameters.seen(fusion)
    return seen if seen.has_offset or seen.has_spaces else None


def describe_path_forward(
    plan: Plan, flags: Flags, fusion: bool, first_sizes: Any, second_sizes: Any
) -> None:
    """Fill a plan for the tensors of :class:`Parameters` and :class:`Text`."""
    parameters, text = Parameters(*plan.inputs[:7]).with_task_axis(), Text(*plan.inputs[7:])
    prompt: Any = parameters.short_prompt
    if seen := _seen(parameters, fusion):
        prompt = plan.scratch(prompt.shape, prompt.dtype)
        reconstruct.forward(plan, seen, flags, prompt, plan.kept, first_sizes)
    inputs = text.behind(prompt, parameters)
    splice.forward(plan, inputs, flags.scaling, plan.kept, second_sizes)


def path_forward(
    parameters: Parameters, text: Text, flags: Flags, fusion: bool, known: Hashable
) -> list[Tensor]:
    """The spliced text ``[B, m + S, d]`` and what the backward needs."""
    results = runtime.call(
        describe_path_forward,
        (*parameters, *text),
        flags,
        fusion,
        reconstruct_forward_config,
        forward_config,
        known=known,
    )
    return [results.returned[0], _kept(results)]


def path_kept(parameters: Parameters, text: Text, fusion: bool) -> list[Tensor]:
    """An empty tensor of the size of what :func:`path_forward` keeps."""
    size = _Size()
    given = parameters.with_task_axis()
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
    parameters: Any = Parameters(*rest[:7]).with_task_axis()
    text = Text(*rest[7:])
    find = plan.pieces_of(memory)
    seen = _seen(parameters, fusion)
    saved = reconstruct.saved(find, seen) if seen else None
    found = (
        plan.returned_like(t) if each else None
        for t, each in zip(rest[:7], needs.of(parameters, fusion), strict=True)
    )
    into: Any = Parameters(*found)  # type: ignore[arg-type]
    halves = None
    ends = splice.Gradients(into.short_prompt, into.offset_a, into.offset_b)
    if not needs.offset:
        ends = ends._replace(offset_a=None, offset_b=None)
    if seen and needs.prompt:
        ends = ends._replace(prompt=plan.scratch(parameters.short_prompt.shape))
        if seen.has_offset and needs.offset:
            halves = (
                plan.scratch(parameters.offset_a.shape),
                plan.scratch(parameters.offset_b.shape),
            )
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
) -> list[Tensor]:
    """The gradient of each parameter in its type and shape; empty where not needed."""
    returned = runtime.call(
        describe_path_backward,
        (grad, *parameters, *text, *kept),
        flags,
        fusion,
        needs,
        reconstruct_backward_config,
        backward_config,
    ).returned
    found = iter(returned)
    return [next(found) if each else grad.new_empty(0) for each in needs.of(parameters, fusion)]
