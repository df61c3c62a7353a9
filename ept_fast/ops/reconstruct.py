"""Operation 1 as registered operators, their fakes, and an autograd Function.

Under ``torch.compile`` the Function calls the registered operators, which the compiler does not
look into. In eager mode it calls their bodies directly, since crossing the library boundary costs
more than the work of a short prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ept_fast.ops import dispatch
from ept_fast.ops.types import Flags, Parameters, Saved
from ept_fast.precision import without_autocast

__all__ = ["gate_weights", "reconstruct"]


def _forward(
    parameters: list[Tensor | None],
    scaling: float,
    activation: str,
    gate: str,
    temperature: float,
    backend: str,
) -> list[Tensor]:
    given = Parameters(*parameters)  # type: ignore[arg-type]
    with without_autocast(given.short_prompt.device):
        prompt, saved = dispatch.load(backend).reconstruct_forward(
            given, Flags(scaling, activation, gate, temperature)
        )
    return [prompt, *saved]


def _backward(
    grad: Tensor,
    parameters: list[Tensor | None],
    saved: list[Tensor],
    scaling: float,
    activation: str,
    gate: str,
    temperature: float,
    backend: str,
) -> list[Tensor | None]:
    with without_autocast(grad.device):
        return list(
            dispatch.load(backend).reconstruct_backward(
                grad,
                Parameters(*parameters),  # type: ignore[arg-type]
                Saved(*saved),
                Flags(scaling, activation, gate, temperature),
            )
        )


def _backward_body(
    grad: Tensor,
    parameters: list[Tensor | None],
    saved: list[Tensor],
    scaling: float,
    activation: str,
    gate: str,
    temperature: float,
    backend: str,
) -> list[Tensor]:
    flags = scaling, activation, gate, temperature
    return [
        grad.new_empty(0) if given is None or found is None else found
        for given, found in zip(
            parameters, _backward(grad, parameters, saved, *flags, backend), strict=True
        )
    ]


_forward_op = torch.library.custom_op("ept_fast::reconstruct_forward", _forward, mutates_args=())
_backward_op = torch.library.custom_op(
    "ept_fast::reconstruct_backward", _backward_body, mutates_args=()
)


@_forward_op.register_fake
def _(
    parameters: list[Tensor | None],
    scaling: float,
    activation: str,
    gate: str,
    temperature: float,
    backend: str,
) -> list[Tensor]:
    given = Parameters(*parameters)  # type: ignore[arg-type]
    prompt = torch.empty_like(given.short_prompt, memory_format=torch.contiguous_format)
    return [prompt, *Saved.empty(given)]


@_backward_op.register_fake
def _(
    grad: Tensor,
    parameters: list[Tensor | None],
    saved: list[Tensor],
    scaling: float,
    activation: str,
    gate: str,
    temperature: float,
    backend: str,
) -> list[Tensor]:
    return [
        grad.new_empty(0)
        if each is None
        else torch.empty_like(each, memory_format=torch.contiguous_format)
        for each in parameters
    ]


class _Reconstruct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flags: Flags, backend: str, *parameters: Tensor | None) -> Tensor:
        run = _forward_op if torch.compiler.is_compiling() else _forward
        prompt, *saved = run(list(parameters), *flags, backend)
        ctx.save_for_backward(*parameters, *saved)
        ctx.flags, ctx.backend = flags, backend
        return prompt

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        run = _backward_op if torch.compiler.is_compiling() else _backward
        number = len(Parameters._fields)
        kept: tuple[Any, ...] = ctx.saved_tensors  # once: checkpointing computes them again
        flags: Flags = ctx.flags
        grads = run(grad, list(kept[:number]), list(kept[number:]), *flags, ctx.backend)
        needed = ctx.needs_input_grad[2:]
        return None, None, *(g if need else None for g, need in zip(grads, needed, strict=True))


def reconstruct(parameters: Parameters, flags: Flags, backend: str) -> Tensor:
    """P′ ``[T, m, d]``, differentiable."""
    result: Tensor = _Reconstruct.apply(flags, backend, *parameters)  # type: ignore[no-untyped-call]
    return result


@torch.no_grad()
def gate_weights(parameters: Parameters, flags: Flags, backend: str) -> Tensor:
    """The gate's weights g ``[T, m, K]``, as the operation computes them."""
    run = _forward_op if torch.compiler.is_compiling() else _forward
    _, *saved = run(list(parameters), *flags, backend)
    return Saved(*saved).gates
