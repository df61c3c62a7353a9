"""Operation 2 as registered operators, their fakes, and an autograd Function.

The operators serve compiled code and their bodies eager mode, as in
:mod:`ept_fast.ops.reconstruct`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ept_fast.checks import check_splice_values, values_are_checked
from ept_fast.ops import dispatch
from ept_fast.ops.types import SpliceInputs
from ept_fast.precision import without_autocast

__all__ = ["splice"]


def _forward(inputs: list[Tensor | None], scaling: float, backend: str) -> list[Tensor]:
    given = SpliceInputs(*inputs)  # type: ignore[arg-type]
    device = given.prompt.device
    if values_are_checked(device):
        check_splice_values(given)
    with without_autocast(device):
        out, kept = dispatch.load(backend).splice_forward(given, scaling)
    return [out, *kept]


def _backward(
    grad: Tensor,
    inputs: list[Tensor | None],
    kept: list[Tensor],
    scaling: float,
    need_prompt: bool,
    need_offset: bool,
    backend: str,
) -> list[Tensor]:
    with without_autocast(grad.device):
        grads = dispatch.load(backend).splice_backward(
            grad,
            SpliceInputs(*inputs),  # type: ignore[arg-type]
            kept,
            scaling,
            need_prompt,
            need_offset,
        )
    return list(grads)


_forward_op = torch.library.custom_op("ept_fast::splice_forward", _forward, mutates_args=())
_backward_op = torch.library.custom_op("ept_fast::splice_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(inputs: list[Tensor | None], scaling: float, backend: str) -> list[Tensor]:
    given = SpliceInputs(*inputs)  # type: ignore[arg-type]
    batch, length = given.text.shape[:2]
    out = given.source.new_empty(batch, given.num_tokens + length, given.prompt.shape[2])
    return [out, *dispatch.load(backend).splice_kept(given)]


@_backward_op.register_fake
def _(
    grad: Tensor,
    inputs: list[Tensor | None],
    kept: list[Tensor],
    scaling: float,
    need_prompt: bool,
    need_offset: bool,
    backend: str,
) -> list[Tensor]:
    given = SpliceInputs(*inputs)  # type: ignore[arg-type]

    def like(tensor: Tensor | None, needed: bool) -> Tensor:
        if tensor is None or not needed:
            return grad.new_empty(0)
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    return [
        like(given.prompt, need_prompt),
        like(given.offset_a, need_offset),
        like(given.offset_b, need_offset),
    ]


class _Splice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scaling: float, backend: str, *inputs: Tensor | None) -> Tensor:
        run = _forward_op if torch.compiler.is_compiling() else _forward
        without_text = SpliceInputs(*inputs)._replace(  # type: ignore[arg-type]
            input_ids=None, weight=None, inputs_embeds=None
        )
        out, *kept = run(list(inputs), scaling, backend)
        ctx.save_for_backward(*without_text, *kept)
        ctx.scaling, ctx.backend = scaling, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        saved: tuple[Any, ...] = ctx.saved_tensors  # once: checkpointing computes them again
        number = len(SpliceInputs._fields)
        inputs, kept = SpliceInputs(*saved[:number]), list(saved[number:])
        needs = SpliceInputs(*ctx.needs_input_grad[2:])
        grads: dict[str, Tensor] = {}
        if needs.inputs_embeds:
            grads["inputs_embeds"] = grad[:, inputs.num_tokens :]
        need_offset = bool(needs.offset_a or needs.offset_b)
        if needs.prompt or need_offset:
            run = _backward_op if torch.compiler.is_compiling() else _backward
            need = (bool(needs.prompt), need_offset)
            found = run(grad, list(inputs), kept, ctx.scaling, *need, ctx.backend)
            grads |= dict(zip(("prompt", "offset_a", "offset_b"), found, strict=True))
        return (
            None,
            None,
            *(
                grads[name] if need else None
                for name, need in zip(SpliceInputs._fields, needs, strict=True)
            ),
        )


def splice(inputs: SpliceInputs, scaling: float, backend: str) -> Tensor:
    """``[B, m + S, d]``, differentiable."""
    if backend == "eager" and not torch.compiler.is_compiling():  # which is plain PyTorch
        floats = (inputs.prompt, inputs.inputs_embeds, inputs.offset_a, inputs.offset_b)
        trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in floats)
        if not trains:
            return _forward(list(inputs), scaling, backend)[0]
    result: Tensor = _Splice.apply(scaling, backend, *inputs)  # type: ignore[no-untyped-call]
    return result
