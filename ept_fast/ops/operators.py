"""The registered operators, their fakes, and the autograd Function of each operation.

Under ``torch.compile`` the Functions call the registered operators, which the compiler does not
look into; in eager mode they call the bodies directly, since crossing the library boundary would
cost more than the work of a short prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ept_fast.checks import check_splice_values, values_are_checked
from ept_fast.ops import dispatch
from ept_fast.precision import accumulation_dtype

__all__ = ["reconstruct", "splice"]

_Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
_Three = tuple[Tensor, Tensor, Tensor]


@contextmanager
def _without_autocast(device: torch.device) -> Iterator[None]:
    """Types are the operations' own business: they accumulate in float32 whatever the storage."""
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            yield
    else:
        yield


# Bodies: what runs, on tensors with a task axis


def _reconstruct_forward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with _without_autocast(short_prompt.device):
        result: _Seven = dispatch.load(backend).reconstruct_forward(
            short_prompt,
            offset_a,
            offset_b,
            space_down,
            space_up,
            gate_weight,
            gate_bias,
            scaling,
            activation,
            gate,
            temperature,
        )
    return result


def _reconstruct_backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with _without_autocast(grad.device):
        result: _Seven = dispatch.load(backend).reconstruct_backward(
            grad,
            short_prompt,
            offset_a,
            offset_b,
            space_down,
            space_up,
            gate_weight,
            gate_bias,
            query,
            stats,
            mix,
            hidden,
            gates,
            cross,
            scaling,
            activation,
            gate,
            temperature,
        )
    return result


def _splice_forward(
    prompt: Tensor,
    input_ids: Tensor | None,
    weight: Tensor | None,
    inputs_embeds: Tensor | None,
    offset_a: Tensor | None,
    offset_b: Tensor | None,
    attention_mask: Tensor | None,
    task_ids: Tensor | None,
    scaling: float,
    backend: str,
) -> Tensor:
    if values_are_checked(prompt.device):
        vocabulary = 0 if weight is None else weight.shape[0]
        check_splice_values(input_ids, vocabulary, attention_mask, task_ids, prompt.shape[0])
    with _without_autocast(prompt.device):
        result: Tensor = dispatch.load(backend).splice_forward(
            prompt,
            input_ids,
            weight,
            inputs_embeds,
            offset_a,
            offset_b,
            attention_mask,
            task_ids,
            scaling,
        )
    return result


def _splice_backward(
    grad: Tensor,
    prompt: Tensor,
    offset_a: Tensor | None,
    offset_b: Tensor | None,
    attention_mask: Tensor | None,
    task_ids: Tensor | None,
    scaling: float,
    need_prompt: bool,
    need_offset: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with _without_autocast(grad.device):
        result: _Three = dispatch.load(backend).splice_backward(
            grad,
            prompt,
            offset_a,
            offset_b,
            attention_mask,
            task_ids,
            scaling,
            need_prompt,
            need_offset,
        )
    return result


# Operators and their fakes

_reconstruct_forward_op = torch.library.custom_op(
    "ept_fast::reconstruct_forward", _reconstruct_forward, mutates_args=()
)
_reconstruct_backward_op = torch.library.custom_op(
    "ept_fast::reconstruct_backward", _reconstruct_backward, mutates_args=()
)
_splice_forward_op = torch.library.custom_op(
    "ept_fast::splice_forward", _splice_forward, mutates_args=()
)
_splice_backward_op = torch.library.custom_op(
    "ept_fast::splice_backward", _splice_backward, mutates_args=()
)


@_reconstruct_forward_op.register_fake
def _(
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
    backend: str,
) -> _Seven:
    dtype = accumulation_dtype(
        short_prompt, offset_a, offset_b, space_down, space_up, gate_weight, gate_bias
    )
    tasks, m, _ = short_prompt.shape

    def saved(*shape: int) -> Tensor:
        return short_prompt.new_empty(shape, dtype=dtype)

    query = stats = mix = hidden = gates = cross = saved(0)
    if offset_a is not None:
        rank = offset_a.shape[2]
        query, stats, mix = saved(tasks, m, rank), saved(tasks, 2, m), saved(tasks, m, rank)
    if space_down is not None:
        spaces, dim = space_down.shape[1], space_down.shape[3]
        hidden, gates = saved(tasks, m, spaces * dim), saved(tasks, m, spaces)
        if offset_a is not None:
            cross = saved(tasks, offset_a.shape[2], spaces * dim + spaces)
    # Outputs may not share storage, the empty ones neither.
    outputs = [x if x.numel() else saved(0) for x in (query, stats, mix, hidden, gates, cross)]
    return torch.empty_like(short_prompt, memory_format=torch.contiguous_format), *outputs  # type: ignore[return-value]


def _like(tensor: Tensor | None, other: Tensor) -> Tensor:
    if tensor is None:
        return other.new_empty(0)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


@_reconstruct_backward_op.register_fake
def _(
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
    backend: str,
) -> _Seven:
    tensors = (short_prompt, offset_a, offset_b, space_down, space_up, gate_weight, gate_bias)
    first, *rest = (_like(tensor, query) for tensor in tensors)
    return (first, *rest)  # type: ignore[return-value]


@_splice_forward_op.register_fake
def _(
    prompt: Tensor,
    input_ids: Tensor | None,
    weight: Tensor | None,
    inputs_embeds: Tensor | None,
    offset_a: Tensor | None,
    offset_b: Tensor | None,
    attention_mask: Tensor | None,
    task_ids: Tensor | None,
    scaling: float,
    backend: str,
) -> Tensor:
    text = input_ids if inputs_embeds is None else inputs_embeds
    source = weight if inputs_embeds is None else inputs_embeds
    assert text is not None
    assert source is not None
    return source.new_empty(text.shape[0], prompt.shape[1] + text.shape[1], prompt.shape[2])


@_splice_backward_op.register_fake
def _(
    grad: Tensor,
    prompt: Tensor,
    offset_a: Tensor | None,
    offset_b: Tensor | None,
    attention_mask: Tensor | None,
    task_ids: Tensor | None,
    scaling: float,
    need_prompt: bool,
    need_offset: bool,
    backend: str,
) -> _Three:
    return (
        _like(prompt if need_prompt else None, grad),
        _like(offset_a if need_offset else None, grad),
        _like(offset_b if need_offset else None, grad),
    )


# Autograd


class _Reconstruct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        run = _reconstruct_forward_op if torch.compiler.is_compiling() else _reconstruct_forward
        prompt, *saved = run(*args)
        ctx.save_for_backward(*args[:7], *saved)
        ctx.flags = args[7:]
        return prompt

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        run = _reconstruct_backward_op if torch.compiler.is_compiling() else _reconstruct_backward
        grads = run(grad, *ctx.saved_tensors, *ctx.flags)
        needed = [
            g if need else None for g, need in zip(grads, ctx.needs_input_grad[:7], strict=True)
        ]
        return (*needed, None, None, None, None, None)


class _Splice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        prompt: Tensor,
        input_ids: Tensor | None,
        weight: Tensor | None,
        inputs_embeds: Tensor | None,
        offset_a: Tensor | None,
        offset_b: Tensor | None,
        attention_mask: Tensor | None,
        task_ids: Tensor | None,
        scaling: float,
        backend: str,
    ) -> Tensor:
        run = _splice_forward_op if torch.compiler.is_compiling() else _splice_forward
        ctx.save_for_backward(prompt, offset_a, offset_b, attention_mask, task_ids)
        ctx.flags = (scaling, backend)
        return run(
            prompt,
            input_ids,
            weight,
            inputs_embeds,
            offset_a,
            offset_b,
            attention_mask,
            task_ids,
            scaling,
            backend,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        prompt, offset_a, offset_b, attention_mask, task_ids = ctx.saved_tensors
        scaling, backend = ctx.flags
        needs = ctx.needs_input_grad
        need_prompt, need_offset = needs[0], needs[4] or needs[5]
        d_prompt = d_a = d_b = None
        if need_prompt or need_offset:
            run = _splice_backward_op if torch.compiler.is_compiling() else _splice_backward
            d_prompt, d_a, d_b = run(
                grad,
                prompt,
                offset_a,
                offset_b,
                attention_mask,
                task_ids,
                scaling,
                need_prompt,
                need_offset,
                backend,
            )
        return (
            d_prompt if need_prompt else None,
            None,
            None,
            grad[:, prompt.shape[1] :] if needs[3] else None,
            d_a if needs[4] else None,
            d_b if needs[5] else None,
            None,
            None,
            None,
            None,
        )


def reconstruct(
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
    backend: str,
) -> Tensor:
    """Differentiable operation 1 on tensors with a task axis, [T, m, d]."""
    result: Tensor = _Reconstruct.apply(  # type: ignore[no-untyped-call]
        short_prompt,
        offset_a,
        offset_b,
        space_down,
        space_up,
        gate_weight,
        gate_bias,
        scaling,
        activation,
        gate,
        temperature,
        backend,
    )
    return result


def splice(
    prompt: Tensor,
    input_ids: Tensor | None,
    weight: Tensor | None,
    inputs_embeds: Tensor | None,
    offset_a: Tensor | None,
    offset_b: Tensor | None,
    attention_mask: Tensor | None,
    task_ids: Tensor | None,
    scaling: float,
    backend: str,
) -> Tensor:
    """Differentiable operation 2 on tensors with a task axis, [B, m + S, d]."""
    arguments = (
        prompt,
        input_ids,
        weight,
        inputs_embeds,
        offset_a,
        offset_b,
        attention_mask,
        task_ids,
        scaling,
        backend,
    )
    if backend == "eager" and not torch.compiler.is_compiling():  # which is plain PyTorch
        floats = (prompt, inputs_embeds, offset_a, offset_b)
        trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in floats)
        if not trains:
            return _splice_forward(*arguments)
    result: Tensor = _Splice.apply(*arguments)  # type: ignore[no-untyped-call]
    return result
