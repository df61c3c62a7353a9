"""Both operations in a row as registered operators, their fakes, and one autograd Function.

The operators serve compiled code and their bodies eager mode, as in
:mod:`ept_fast.ops.reconstruct`. P′ is not kept, and the two halves of the gradients of A and B are
the backend's to add.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ept_fast.checks import check_splice_values, values_are_checked
from ept_fast.ops import dispatch
from ept_fast.ops.types import Flags, Parameters, Text
from ept_fast.precision import without_autocast

__all__ = ["path"]

_PARAMETERS, _TEXT = len(Parameters._fields), len(Text._fields)


def _forward(
    parameters: list[Tensor | None],
    text: list[Tensor | None],
    scaling: float,
    activation: str,
    gate: str,
    temperature: float,
    fusion: bool,
    backend: str,
) -> list[Tensor]:
    given, around = Parameters(*parameters), Text(*text)  # type: ignore[arg-type]
    device = given.short_prompt.device
    if values_are_checked(device):
        check_splice_values(around.spliced(given.short_prompt, given.offset_a, given.offset_b))
    flags = Flags(scaling, activation, gate, temperature)
    with without_autocast(device):
        out, kept = dispatch.load(backend).path_forward(given, around, flags, fusion)
    return [out, *kept]


def _backward(
    grad: Tensor,
    parameters: list[Tensor | None],
    text: list[Tensor | None],
    kept: list[Tensor],
    needs: list[bool],
    scaling: float,
    activation: str,
    gate: str,
    temperature: float,
    fusion: bool,
    backend: str,
) -> list[Tensor]:
    with without_autocast(grad.device):
        grads = dispatch.load(backend).path_backward(
            grad,
            Parameters(*parameters),  # type: ignore[arg-type]
            Text(*text),
            kept,
            Flags(scaling, activation, gate, temperature),
            fusion,
            Parameters(*needs),  # type: ignore[arg-type]
        )
    return [grad.new_empty(0) if found is None else found for found in grads]


_forward_op = torch.library.custom_op("ept_fast::path_forward", _forward, mutates_args=())
_backward_op = torch.library.custom_op("ept_fast::path_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(
    parameters: list[Tensor | None],
    text: list[Tensor | None],
    scaling: float,
    activation: str,
    gate: str,
    temperature: float,
    fusion: bool,
    backend: str,
) -> list[Tensor]:
    given, around = Parameters(*parameters), Text(*text)  # type: ignore[arg-type]
    inputs = around.spliced(given.short_prompt, given.offset_a, given.offset_b)
    batch, length = inputs.text.shape[:2]
    _, m, width = given.short_prompt.shape
    out = inputs.source.new_empty(batch, m + length, width)
    return [out, *dispatch.load(backend).path_kept(given, around, fusion)]


@_backward_op.register_fake
def _(
    grad: Tensor,
    parameters: list[Tensor | None],
    text: list[Tensor | None],
    kept: list[Tensor],
    needs: list[bool],
    scaling: float,
    activation: str,
    gate: str,
    temperature: float,
    fusion: bool,
    backend: str,
) -> list[Tensor]:
    return [
        torch.empty_like(each, memory_format=torch.contiguous_format)
        if each is not None and need
        else grad.new_empty(0)
        for each, need in zip(parameters, needs, strict=True)
    ]


class _Path(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, flags: Flags, fusion: bool, backend: str, *tensors: Tensor | None
    ) -> Tensor:
        run = _forward_op if torch.compiler.is_compiling() else _forward
        parameters, text = list(tensors[:_PARAMETERS]), Text(*tensors[_PARAMETERS:])
        out, *kept = run(parameters, list(text), *flags, fusion, backend)
        ctx.save_for_backward(*parameters, text.attention_mask, text.task_ids, *kept)
        ctx.choices = (*flags, fusion, backend)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        saved: tuple[Any, ...] = ctx.saved_tensors  # once: checkpointing computes them again
        parameters, rest = list(saved[:_PARAMETERS]), saved[_PARAMETERS:]
        needs = list(ctx.needs_input_grad[3 : 3 + _PARAMETERS])
        of_text = Text(*ctx.needs_input_grad[3 + _PARAMETERS :])
        grads: list[Tensor | None] = [None] * _PARAMETERS
        if any(needs):
            run = _backward_op if torch.compiler.is_compiling() else _backward
            text = Text(attention_mask=rest[0], task_ids=rest[1])
            found = run(grad, parameters, list(text), list(rest[2:]), needs, *ctx.choices)
            grads = [g if need else None for g, need in zip(found, needs, strict=True)]
        embeds = grad[:, parameters[0].shape[1] :] if of_text.inputs_embeds else None
        return None, None, None, *grads, *Text(inputs_embeds=embeds)


def path(parameters: Parameters, text: Text, flags: Flags, fusion: bool, backend: str) -> Tensor:
    """``[B, m + S, d]``, differentiable."""
    if backend == "eager" and not torch.compiler.is_compiling():  # which is plain PyTorch
        floats = (*parameters, text.inputs_embeds)
        trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in floats)
        if not trains:
            return _forward(list(parameters), list(text), *flags, fusion, backend)[0]
    result: Tensor = _Path.apply(flags, fusion, backend, *parameters, *text)  # type: ignore[no-untyped-call]
    return result
