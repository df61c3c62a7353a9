"""Both operations in a row, as registered operators, their fakes, and one autograd Function.

The gradients of A and B have two halves, one from each operation: they are added here, in the type
that sums accumulate in, and rounded once. P′ is neither kept nor given to autograd.

A backend may have ``path_forward``, ``path_backward`` and ``path_kept`` of its own; for others the
path is composed of their four functions. The operators serve compiled code and their bodies eager
mode, as in :mod:`ept_fast.ops.reconstruct`. Tensors have no task axis here if there is but one
prompt: adding it outside would cost autograd a view for each of them.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ept_fast.backends.fused import has_empty
from ept_fast.checks import check_splice_values, values_are_checked
from ept_fast.ops import dispatch
from ept_fast.ops.types import Flags, Needs, Parameters, Saved, Text
from ept_fast.precision import without_autocast

__all__ = ["How", "own_path", "path"]

_PARAMETERS = len(Parameters._fields)
_SAVED = len(Saved._fields)
_WIDE = "eager"  # the backend that can leave the offset's gradients unrounded


class How(NamedTuple):
    """What a call is besides its tensors.

    Attributes:
        flags: the choices of the first operation, and the scaling of both.
        fusion: whether the first operation sees the offset.
        backend: its name.
        own: the backend's module if it has a path of its own for these tensors, else None.
        known: something equal for calls with the same backend, choices, and shapes, strides, types,
            devices and alignment of all tensors, and no others; None if they are not known.
    """

    flags: Flags
    fusion: bool
    backend: str
    own: Any
    known: Hashable = None


def own_path(backend: str, parameters: Parameters) -> Any:
    """The backend's module if it has a path of its own for these tensors, else None."""
    module = dispatch.load(backend)
    return module if hasattr(module, "path_forward") and not has_empty(*parameters) else None


# Composed of a backend's four functions


def _composed_forward(
    backend: str, parameters: Parameters, text: Text, flags: Flags, fusion: bool
) -> list[Tensor]:
    module = dispatch.load(backend)
    given = parameters.with_task_axis()
    prompt, saved = module.reconstruct_forward(given.seen(fusion), flags)
    out, kept = module.splice_forward(text.behind(prompt, given), flags.scaling)
    return [out, *saved, *kept]


def _composed_backward(
    backend: str,
    grad: Tensor,
    parameters: Parameters,
    text: Text,
    kept: list[Tensor],
    flags: Flags,
    fusion: bool,
    needs: Needs,
) -> list[Tensor | None]:
    module = dispatch.load(backend)
    given = parameters.with_task_axis()
    # In the type of the sums, so that the sum of both halves is rounded and they are not.
    options = {"wide_offset": True} if backend == _WIDE else {}
    d_prompt, *of_text = module.splice_backward(
        grad,
        text.behind(given.short_prompt, given),  # P′ has its shape and type
        kept[_SAVED:],
        flags.scaling,
        needs.prompt,
        needs.offset,
        **options,
    )
    found: list[Any] = [None] * _PARAMETERS
    if needs.prompt:
        seen, saved = given.seen(fusion), Saved(*kept[:_SAVED])
        found = list(module.reconstruct_backward(d_prompt, seen, saved, flags, **options))
    if needs.offset:
        for i, half in zip((1, 2), of_text, strict=True):
            found[i] = half.add_(found[i]) if needs.prompt and fusion else half
    return [
        None if each is None or p is None else each.to(p.dtype).view(p.shape)
        for each, p in zip(found, parameters, strict=True)
    ]


# A call


def _forward(
    parameters: Parameters, text: Text, how: How, places: list[Tensor] | None = None
) -> list[Tensor]:
    """The output, then what the backward needs."""
    flags, fusion, backend, own, known = how
    device = parameters.short_prompt.device
    if values_are_checked(device):
        check_splice_values(text.behind(parameters.short_prompt, parameters))
    if own is not None:
        return own.path_forward(parameters, text, flags, fusion, known, places)  # type: ignore[no-any-return]
    with without_autocast(device):
        return _composed_forward(backend, parameters, text, flags, fusion)


def _backward(
    grad: Tensor, parameters: Parameters, text: Text, kept: list[Tensor], how: How, needs: Needs
) -> list[Tensor | None]:
    """For each parameter its gradient if ``needs`` asks for it."""
    flags, fusion, backend, own, known = how
    if own is not None:
        return own.path_backward(  # type: ignore[no-any-return]
            grad, parameters, text, kept, flags, fusion, needs, known
        )
    with without_autocast(grad.device):
        return _composed_backward(backend, grad, parameters, text, kept, flags, fusion, needs)


# The operators


def _forward_body(
    parameters: list[Tensor | None],
    text: list[Tensor | None],
    scaling: float,
    activation: str,
    gate: str,
    temperature: float,
    fusion: bool,
    backend: str,
) -> list[Tensor]:
    given = Parameters(*parameters)  # type: ignore[arg-type]
    flags = Flags(scaling, activation, gate, temperature)
    how = How(flags, fusion, backend, own_path(backend, given))
    return _forward(given, Text(*text), how)


def _backward_body(
    grad: Tensor,
    parameters: list[Tensor | None],
    text: list[Tensor | None],
    kept: list[Tensor],
    scaling: float,
    activation: str,
    gate: str,
    temperature: float,
    fusion: bool,
    need_prompt: bool,
    need_offset: bool,
    backend: str,
) -> list[Tensor]:
    given = Parameters(*parameters)  # type: ignore[arg-type]
    flags = Flags(scaling, activation, gate, temperature)
    how = How(flags, fusion, backend, own_path(backend, given))
    found = _backward(grad, given, Text(*text), kept, how, Needs(need_prompt, need_offset))
    return [grad.new_empty(0) if each is None else each for each in found]


_forward_op = torch.library.custom_op("ept_fast::path_forward", _forward_body, mutates_args=())
_backward_op = torch.library.custom_op("ept_fast::path_backward", _backward_body, mutates_args=())


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
    given, behind = Parameters(*parameters), Text(*text)  # type: ignore[arg-type]
    inputs = behind.behind(given.short_prompt, given)
    batch, length = inputs.text.shape[:2]
    m, width = given.short_prompt.shape[-2:]
    out = inputs.source.new_empty(batch, m + length, width)
    if module := own_path(backend, given):
        return [out, *module.path_kept(given, behind, fusion)]
    tasked = given.with_task_axis()
    spliced = dispatch.load(backend).splice_kept(behind.behind(tasked.short_prompt, tasked))
    return [out, *Saved.empty(tasked.seen(fusion)), *spliced]


@_backward_op.register_fake
def _(
    grad: Tensor,
    parameters: list[Tensor | None],
    text: list[Tensor | None],
    kept: list[Tensor],
    scaling: float,
    activation: str,
    gate: str,
    temperature: float,
    fusion: bool,
    need_prompt: bool,
    need_offset: bool,
    backend: str,
) -> list[Tensor]:
    given = Parameters(*parameters)  # type: ignore[arg-type]
    needed = Needs(need_prompt, need_offset).of(given, fusion)
    return [
        torch.empty_like(each, memory_format=torch.contiguous_format)
        if need and each is not None
        else grad.new_empty(0)
        for each, need in zip(given, needed, strict=True)
    ]


class _Path(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        how: How,
        places: list[Tensor] | None,
        text: Text,
        inputs_embeds: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        parameters = Parameters(*tensors)  # type: ignore[arg-type]
        if torch.compiler.is_compiling():
            given = (list(parameters), list(text), *how.flags, how.fusion, how.backend)
            found = _forward_op(*given)
        else:
            found = _forward(parameters, text, how, places)
        ctx.save_for_backward(*parameters, text.attention_mask, text.task_ids, *found[1:])
        ctx.how = how
        out: Tensor = found[0]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        # Results that may be differentiated again have to refuse it, which costs others time.
        return _refusing(ctx, grad) if torch.is_grad_enabled() else _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> Any:
    saved: tuple[Any, ...] = ctx.saved_tensors  # once: checkpointing computes them again
    how: How = ctx.how
    parameters = Parameters(*saved[:_PARAMETERS])
    mask, task_ids, *kept = saved[_PARAMETERS:]
    text = Text(attention_mask=mask, task_ids=task_ids)
    asked = ctx.needs_input_grad
    wanted = asked[-_PARAMETERS:]
    needs = Needs.for_gradients(wanted, how.fusion)
    grads: list[Tensor | None] = [None] * _PARAMETERS
    if needs.prompt or needs.offset:
        if torch.compiler.is_compiling():
            given = (list(parameters), list(text), kept, *how.flags, how.fusion, *needs)
            found = _backward_op(grad, *given, how.backend)
        else:
            found = _backward(grad, parameters, text, kept, how, needs)
        grads = [*found]
        if not all(wanted):
            grads = [each if need else None for each, need in zip(found, wanted, strict=True)]
    embeds = None
    if asked[-_PARAMETERS - 1]:
        embeds = grad[:, parameters.short_prompt.shape[-2] :]
    return None, None, None, embeds, *grads


_refusing = once_differentiable(_gradients)


def path(
    parameters: Parameters, text: Text, how: How, places: list[Tensor] | None = None
) -> Tensor:
    """``[B, m + S, d]``, differentiable.

    Args:
        parameters: with or without a task axis; the offset is spliced in any case.
        text: what the prompt is put before.
        how: the rest of the call, for these parameters.
        places: gets the mask and the positions of prompt and text, ``[B, m + S]``, if the backend
            writes them.
    """
    if how.backend == "eager" and not torch.compiler.is_compiling():  # which is plain PyTorch
        floats = (*parameters, text.inputs_embeds)
        trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in floats)
        if not trains:
            return _forward(parameters, text, how)[0]
    if torch.compiler.is_compiling():
        places = None  # the operator writes none, as the compiler makes one loop of what does
    # Autograd looks at each argument, so the text's tensors without a gradient are one.
    given = (how, places, text, text.inputs_embeds, *parameters)
    result: Tensor = _Path.apply(*given)  # type: ignore[no-untyped-call]
    return result
