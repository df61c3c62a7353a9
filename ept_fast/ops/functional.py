"""The two operations, and both in a row: check the arguments, choose a backend, call it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ept_fast import reference
from ept_fast.checks import (
    check_reconstruct,
    check_splice,
    check_splice_values,
    check_text,
    constant,
    values_are_checked,
)
from ept_fast.ops import dispatch
from ept_fast.ops.path import path
from ept_fast.ops.reconstruct import gate_weights as _gate_weights
from ept_fast.ops.reconstruct import reconstruct
from ept_fast.ops.splice import splice
from ept_fast.ops.types import Flags, Parameters, SpliceInputs, Text

__all__ = ["gate_weights", "reconstruct_and_splice", "reconstruct_prompt", "splice_prompt"]


def reconstruct_prompt(
    short_prompt: Tensor,
    offset_a: Tensor | None = None,
    offset_b: Tensor | None = None,
    space_down: Tensor | None = None,
    space_up: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    activation: str = "gelu",
    gate: str = "token",
    temperature: float = 1.0,
    fusion: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Reconstruct the prompt: fuse it with the low-rank offset and add the gated subspaces.

    METHOD, Operation 1; "the paper" is arXiv 2405.11464. Differentiable once, in every tensor. All
    tensors may have a leading axis T, for a bank of T prompts; types may be float64, float32,
    bfloat16 or float16 and may differ. Products and sums accumulate in float32 (float64 if any
    tensor is), and each element is rounded once.

    Args:
        short_prompt: P, ``[(T,) m, d]``.
        offset_a: A, ``[(T,) n, r]``; with ``offset_b`` or not at all.
        offset_b: B, ``[(T,) r, d]``.
        space_down: D, ``[(T,) K, d, h]``; with the next three or not at all.
        space_up: U, ``[(T,) K, h, d]``.
        gate_weight: G, ``[(T,) d, K]``.
        gate_bias: b, ``[(T,) K]``.
        scaling: c, the factor of A·B.
        activation: φ, a name of :data:`ept_fast.ops.activations.ACTIVATIONS`.
        gate: ``"token"``: one softmax per token; ``"prompt"``: one for all tokens of the prompt.
        temperature: τ > 0, divides the gate's logits.
        fusion: whether the prompt attends to the offset.
        backend: ``"triton"``, ``"cuda"``, ``"eager"`` or ``"reference"``; else
            ``EPT_FAST_BACKEND``; else the first that supports the call.

    Returns:
        P′, ``[(T,) m, d]`` in the type of ``short_prompt``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, device, name or number that does not fit, or a missing partner tensor.
        RuntimeError: the backend asked for does not support the call.

    Example:
        >>> reconstruct_prompt(torch.ones(4, 8), torch.zeros(16, 2), torch.ones(2, 8)).shape
        torch.Size([4, 8])
    """
    parameters = Parameters(
        short_prompt, offset_a, offset_b, space_down, space_up, gate_weight, gate_bias
    )
    flags = Flags(constant(scaling), activation, gate, constant(temperature))
    parameters, flags, chosen = _prepared(parameters, flags, fusion, backend)
    if chosen == dispatch.REFERENCE:
        return reference.reconstruct_prompt(*parameters, **_by_name(flags))
    if short_prompt.dim() == 3:
        return reconstruct(parameters, flags, chosen)
    return reconstruct(Parameters(*_with_task_axis(parameters)), flags, chosen).squeeze(0)


def gate_weights(
    parameters: Parameters, flags: Flags, *, fusion: bool = True, backend: str | None = None
) -> Tensor:
    """The gate's weight of every subspace for every prompt token.

    Args:
        parameters: as of :func:`reconstruct_prompt`, with subspaces, with or without a task axis.
        flags, fusion, backend: as there; ``"reference"`` is served by ``"eager"``.

    Returns:
        g, ``[(T,) m, K]`` in float32, or float64 if any tensor is.
    """
    parameters, flags, chosen = _prepared(parameters, flags, fusion, backend)
    if chosen == dispatch.REFERENCE:
        chosen = "eager"
    if parameters.short_prompt.dim() == 3:
        return _gate_weights(parameters, flags, chosen)
    return _gate_weights(Parameters(*_with_task_axis(parameters)), flags, chosen).squeeze(0)


def _prepared(
    parameters: Parameters, flags: Flags, fusion: bool, backend: str | None
) -> tuple[Parameters, Flags, str]:
    """Checked, without the offset unless it is fused; and the backend for them."""
    flags = _checked(parameters, flags, fusion)
    parameters = _seen(parameters, fusion)
    return parameters, flags, dispatch.select(backend, parameters)


def _checked(parameters: Parameters, flags: Flags, fusion: bool) -> Flags:
    """The flags with their numbers as floats, if operation 1 is defined for all of these."""
    check_reconstruct(parameters, flags, fusion)
    scaling, activation, gate, temperature = flags
    return Flags(float(scaling), activation, gate, float(temperature))


def _seen(parameters: Parameters, fusion: bool) -> Parameters:
    """What operation 1 computes with: the offset only if it is fused."""
    return parameters if fusion else parameters._replace(offset_a=None, offset_b=None)


def _with_task_axis(tensors: tuple[Tensor | None, ...]) -> list[Any]:
    return [None if tensor is None else tensor.unsqueeze(0) for tensor in tensors]


def _by_name(values: tuple[Any, ...]) -> dict[str, Any]:
    """The fields of a NamedTuple; the compiler cannot trace its own ``_asdict``."""
    return dict(zip(values._fields, values, strict=True))  # type: ignore[attr-defined]


def splice_prompt(
    prompt: Tensor,
    *,
    input_ids: Tensor | None = None,
    weight: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    offset_a: Tensor | None = None,
    offset_b: Tensor | None = None,
    scaling: float = 1.0,
    attention_mask: Tensor | None = None,
    task_ids: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Put the prompt before the text and add the low-rank offset to the text's real tokens.

    METHOD, Operation 2. A token's offset goes by its rank among the row's real tokens, so neither
    the side nor the amount of padding changes it, and padding gets none. Differentiable once, in
    ``prompt``, ``offset_a``, ``offset_b`` and ``inputs_embeds``; ``weight`` is frozen. Types may be
    float64, float32, bfloat16 or float16 and may differ.

    Args:
        prompt: P′, ``[m, d]``, or ``[T, m, d]`` with ``task_ids``.
        input_ids: ``[B, S]`` int64 or int32, looked up in ``weight``; or else ``inputs_embeds``.
        weight: the frozen embedding table, ``[V, d]``.
        inputs_embeds: ``[B, S, d]``.
        offset_a: A, ``[(T,) n, r]`` with n >= S; with ``offset_b`` or not at all.
        offset_b: B, ``[(T,) r, d]``.
        scaling: c, the factor of A·B.
        attention_mask: ``[B, S]``, bool or integers, of 0 and 1; ones by default.
        task_ids: ``[B]`` int64 or int32, the prompt of each row.
        backend: as in :func:`reconstruct_prompt`.

    Returns:
        ``[B, m + S, d]`` in the type of the embeddings.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, device or number that does not fit; a missing partner tensor; neither
            or both of ``input_ids`` and ``inputs_embeds``; S > n; a mask with values other than 0
            and 1.
        IndexError: a token id outside the vocabulary, a task id outside the bank. This and the
            values of the mask are looked at on a CPU, elsewhere only under ``EPT_FAST_CHECK=1``.
        RuntimeError: the backend asked for does not support the call.

    Example:
        >>> splice_prompt(torch.ones(2, 8), inputs_embeds=torch.zeros(1, 3, 8)).shape
        torch.Size([1, 5, 8])
    """
    scaling = constant(scaling)
    inputs = SpliceInputs(
        prompt, input_ids, weight, inputs_embeds, offset_a, offset_b, attention_mask, task_ids
    )
    check_splice(inputs, scaling)
    chosen = dispatch.select(backend, inputs)
    if chosen == dispatch.REFERENCE:
        if values_are_checked(prompt.device) and not torch.compiler.is_compiling():
            check_splice_values(inputs)
        return reference.splice_prompt(**_by_name(inputs), scaling=scaling)
    if weight is not None:
        inputs = inputs._replace(weight=weight.detach())
    if prompt.dim() == 2:
        head, a, b = _with_task_axis((prompt, offset_a, offset_b))
        inputs = inputs._replace(prompt=head, offset_a=a, offset_b=b)
    return splice(inputs, float(scaling), chosen)


def reconstruct_and_splice(
    short_prompt: Tensor,
    offset_a: Tensor | None = None,
    offset_b: Tensor | None = None,
    space_down: Tensor | None = None,
    space_up: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    *,
    input_ids: Tensor | None = None,
    weight: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    task_ids: Tensor | None = None,
    scaling: float = 1.0,
    activation: str = "gelu",
    gate: str = "token",
    temperature: float = 1.0,
    fusion: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Reconstruct the prompt, put it before the text and add the offset: both operations in one.

    The result is, to the bit, that of :func:`splice_prompt` on :func:`reconstruct_prompt`'s. The
    arguments are checked once, one autograd Function stands for both, and P′ is not kept for the
    backward. With the ``eager`` backend the two halves of the gradients of A and B are added before
    they are rounded. Differentiable once, in every tensor of the prompt and in ``inputs_embeds``.

    Args:
        short_prompt: P, ``[m, d]``, or ``[T, m, d]`` with ``task_ids``.
        offset_a, offset_b, space_down, space_up, gate_weight, gate_bias: as of
            :func:`reconstruct_prompt`; the offset with n >= S.
        input_ids, weight, inputs_embeds, attention_mask, task_ids: as of :func:`splice_prompt`.
        scaling: c, the factor of A·B in both operations.
        activation, gate, temperature: as of :func:`reconstruct_prompt`.
        fusion: whether the prompt attends to the offset, which the text gets in any case.
        backend: as there. If each operation would go to another backend by itself, they run one
            after the other.

    Returns:
        ``[B, m + S, d]`` in the type of the embeddings.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as the two functions; of the prompt's
            tensors first.

    Example:
        >>> embeds = torch.zeros(1, 3, 8)
        >>> reconstruct_and_splice(torch.ones(2, 8), inputs_embeds=embeds).shape
        torch.Size([1, 5, 8])
    """
    parameters = Parameters(
        short_prompt, offset_a, offset_b, space_down, space_up, gate_weight, gate_bias
    )
    text = Text(input_ids, weight, inputs_embeds, attention_mask, task_ids)
    flags = Flags(constant(scaling), activation, gate, constant(temperature))
    flags = _checked(parameters, flags, fusion)
    check_text(text, "short_prompt", short_prompt, offset_a)
    chosen = dispatch.select(backend, _seen(parameters, fusion))
    # P′ has the shape and the type of the short prompt.
    of_splice = dispatch.select(backend, text.spliced(short_prompt, offset_a, offset_b))
    if chosen != of_splice or chosen == dispatch.REFERENCE:
        prompt = reconstruct_prompt(*parameters, **_by_name(flags), fusion=fusion, backend=backend)
        return splice_prompt(
            prompt,
            **_by_name(text),
            offset_a=offset_a,
            offset_b=offset_b,
            scaling=flags.scaling,
            backend=backend,
        )
    if weight is not None:
        text = text._replace(weight=weight.detach())
    if short_prompt.dim() == 2:
        parameters = Parameters(*_with_task_axis(parameters))
    return path(parameters, text, flags, fusion, chosen)
