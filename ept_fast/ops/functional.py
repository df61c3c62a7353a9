"""The two operations: check the arguments, choose a backend, call it."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ept_fast import reference
from ept_fast.backends.triton.runtime import facts_of
from ept_fast.checks import (
    check_reconstruct,
    check_splice,
    check_splice_values,
    check_text,
    constant,
    values_are_checked,
)
from ept_fast.ops import dispatch
from ept_fast.ops.path import How, own_path, path
from ept_fast.ops.reconstruct import gate_weights as _gate_weights
from ept_fast.ops.reconstruct import reconstruct
from ept_fast.ops.splice import splice
from ept_fast.ops.types import Flags, Parameters, SpliceInputs, Text
from ept_fast.precision import accumulation_dtype

__all__ = [
    "gate_weights",
    "prompt_path",
    "reconstruct_and_splice",
    "reconstruct_prompt",
    "splice_prompt",
]


def reconstruct_prompt(
    short_prompt: Tensor,
    offset_a: Tensor | None = None,
    offset_b: Tensor | None = None,
    space_down: Tensor | None = None,
    space_up: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    space_down_bias: Tensor | None = None,
    space_up_bias: Tensor | None = None,
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
        gate_weight: G, ``[(T,) d, K]``. With K = 1 both of the gate may be absent: it is 1.
        gate_bias: b, ``[(T,) K]``.
        space_down_bias: u, added to F·D_k, ``[(T,) K, h]``; with the next or not at all.
        space_up_bias: v, added to H_k·U_k, ``[(T,) K, d]``.
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
        *(short_prompt, offset_a, offset_b, space_down, space_up, gate_weight, gate_bias),
        *(space_down_bias, space_up_bias),
    )
    flags = Flags(constant(scaling), activation, gate, constant(temperature))
    parameters, flags, chosen = _prepared(parameters, flags, fusion, backend)
    if chosen == dispatch.REFERENCE:
        return reference.reconstruct_prompt(*parameters, **_by_name(flags))
    if short_prompt.dim() == 3:
        return reconstruct(parameters, flags, chosen)
    return reconstruct(parameters.with_task_axis(), flags, chosen).squeeze(0)


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
    if not parameters.has_gate:  # one subspace
        p = parameters.short_prompt
        return p.new_ones((*p.shape[:-1], 1), dtype=accumulation_dtype(*parameters))
    if chosen == dispatch.REFERENCE:
        chosen = "eager"
    if parameters.short_prompt.dim() == 3:
        return _gate_weights(parameters, flags, chosen)
    return _gate_weights(parameters.with_task_axis(), flags, chosen).squeeze(0)


def _prepared(
    parameters: Parameters, flags: Flags, fusion: bool, backend: str | None
) -> tuple[Parameters, Flags, str]:
    """Checked, without the offset unless it is fused; and the backend for them."""
    check_reconstruct(parameters, flags, fusion)
    parameters = parameters.seen(fusion)
    scaling, activation, gate, temperature = flags
    flags = Flags(float(scaling), activation, gate, float(temperature))
    return parameters, flags, dispatch.select(backend, parameters)


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
    prompt_rows: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Put the prompt before the text and add the low-rank offset to the text's real tokens.

    METHOD, Operation 2. A token's offset goes by its rank among the row's real tokens, so neither
    the side nor the amount of padding changes it, and padding gets none. Differentiable once, in
    ``prompt``, ``offset_a``, ``offset_b`` and ``inputs_embeds``; ``weight`` is frozen. Types may be
    float64, float32, bfloat16 or float16 and may differ.

    Args:
        prompt: P′, ``[m, d]``, or ``[T, m, d]`` with ``task_ids``, or ``[R, d]`` with
            ``prompt_rows``.
        input_ids: ``[B, S]`` int64 or int32, looked up in ``weight``; or else ``inputs_embeds``.
        weight: the frozen embedding table, ``[V, d]``.
        inputs_embeds: ``[B, S, d]``.
        offset_a: A, ``[(T,) n, r]`` with n >= S; with ``offset_b`` or not at all.
        offset_b: B, ``[(T,) r, d]``.
        scaling: c, the factor of A·B.
        attention_mask: ``[B, S]``, bool or integers, of 0 and 1; ones by default.
        task_ids: ``[B]`` int64 or int32, the prompt of each row.
        prompt_rows: ``[B, m]`` int64 or int32: each row has a prompt of its own, whose token j is
            ``prompt[prompt_rows[b, j]]``, or zeros for -1. Nothing of ``[B, m, d]`` is made.
        backend: as in :func:`reconstruct_prompt`.

    Returns:
        ``[B, m + S, d]`` in the type of the embeddings.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, device or number that does not fit; a missing partner tensor; neither
            or both of ``input_ids`` and ``inputs_embeds``; S > n; a mask with values other than 0
            and 1.
        IndexError: a token id outside the vocabulary, a task id outside the bank, a row that the
            prompt does not have. This and the values of the mask are looked at on a CPU, elsewhere
            only under ``EPT_FAST_CHECK=1``.
        RuntimeError: the backend asked for does not support the call.

    Example:
        >>> splice_prompt(torch.ones(2, 8), inputs_embeds=torch.zeros(1, 3, 8)).shape
        torch.Size([1, 5, 8])
    """
    scaling = constant(scaling)
    inputs = SpliceInputs(
        *(prompt, input_ids, weight, inputs_embeds, offset_a, offset_b),
        *(attention_mask, task_ids, prompt_rows),
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
        head, a, b, *_ = Parameters(prompt, offset_a, offset_b).with_task_axis()
        inputs = inputs._replace(prompt=head, offset_a=a, offset_b=b)
    return splice(inputs, float(scaling), chosen)


class _Checked(NamedTuple):
    """What is known of arguments of both operations that were checked.

    Attributes:
        flags: with numbers for constants.
        first, second: the backends of the operations.
        how: how one backend does both; None if two do.
    """

    flags: Flags
    first: str
    second: str
    how: How | None


_CHECKED = 512
_checked: dict[Hashable, _Checked] = {}
_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None)}


def _known(
    tensors: tuple[Tensor | None, ...], flags: Flags, fusion: bool, backend: str | None
) -> tuple[Hashable, _Checked | None]:
    """All that checks and the choice of a backend depend on, None if it is not known; and what is
    known of it. Compiled code must not look there: it would be compiled for what it finds.
    """
    if torch.compiler.is_compiling() or not _PLAIN.issuperset(map(type, tensors)):
        return None, None
    disabled = os.environ.get("EPT_FAST_DISABLE")
    named = backend or os.environ.get("EPT_FAST_BACKEND")
    types = tuple(map(type, (fusion, *flags)))  # 1 and True are equal
    try:
        facts = facts_of(tensors)
        key = (backend, named, disabled, dispatch.supporters(), fusion, flags, types, facts)
        return key, _checked.get(key)
    except (RuntimeError, TypeError):  # no storage, or not what it should be
        return None, None


def _check(
    parameters: Parameters,
    text: Text,
    flags: Flags,
    fusion: bool,
    backend: str | None,
    first_check: Callable[[Text], object] | None,
    known: Hashable,
) -> _Checked:
    """Check the arguments of both operations, and choose the backends."""
    if first_check is not None:
        first_check(text)
    flags = flags._replace(scaling=constant(flags.scaling), temperature=constant(flags.temperature))
    _, numbers, first = _prepared(parameters, flags, fusion, backend)
    prompt = parameters.short_prompt  # P′ has its shape and type
    check_text(text, "short_prompt", prompt, parameters.offset_a)
    second = dispatch.select(backend, text.behind(prompt, parameters))
    how = None
    if first == second != dispatch.REFERENCE:
        # The compiler needs no module: operators are opaque to it.
        own = None if torch.compiler.is_compiling() else own_path(first, parameters)
        how = How(numbers, fusion, first, own, known)
    return _Checked(numbers, first, second, how)


def prompt_path(
    parameters: Parameters,
    text: Text,
    flags: Flags,
    fusion: bool,
    backend: str | None,
    first_check: Callable[[Text], object] | None = None,
    places: list[Tensor] | None = None,
) -> Tensor:
    """:func:`reconstruct_and_splice` for arguments that are in their tuples already.

    ``first_check`` is called with the text unless arguments like these were checked before.
    ``places`` gets the mask and the positions of prompt and text, ``[B, m + S]``, if the backend
    writes them.
    """
    key, checked = _known((*parameters, *text), flags, fusion, backend)
    if checked is None:
        known = None if key is None else object()
        checked = _check(parameters, text, flags, fusion, backend, first_check, known)
        if key is not None:
            if len(_checked) >= _CHECKED:
                _checked.clear()
            _checked[key] = checked
    flags, first, second, how = checked
    if how is None:
        prompt = reconstruct_prompt(*parameters, **_by_name(flags), fusion=fusion, backend=first)
        inputs = _by_name(text.behind(prompt, parameters))
        return splice_prompt(**inputs, scaling=flags.scaling, backend=second)
    if text.weight is not None and text.weight.requires_grad:
        text = text._replace(weight=text.weight.detach())
    return path(parameters, text, how, places)


def reconstruct_and_splice(
    short_prompt: Tensor,
    offset_a: Tensor | None = None,
    offset_b: Tensor | None = None,
    space_down: Tensor | None = None,
    space_up: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    space_down_bias: Tensor | None = None,
    space_up_bias: Tensor | None = None,
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
    """Reconstruct the prompt and put it before the text: both operations in one.

    The same as :func:`splice_prompt` of :func:`reconstruct_prompt`, to the bit, in less time and
    memory: arguments are checked once, P′ is not kept, and the gradients of ``offset_a`` and
    ``offset_b``, which have a part from each operation, are rounded once. Differentiable once, in
    the parameters and ``inputs_embeds``.

    Args:
        short_prompt, offset_a, offset_b, space_down, space_up, gate_weight, gate_bias,
            space_down_bias, space_up_bias: as of :func:`reconstruct_prompt`; with a leading axis T
            together with ``task_ids``.
        input_ids, weight, inputs_embeds, attention_mask, task_ids: as of :func:`splice_prompt`.
        scaling: c, the factor of A·B.
        activation, gate, temperature: as of :func:`reconstruct_prompt`.
        fusion: whether the prompt attends to the offset; the text gets it in any case.
        backend: as of :func:`reconstruct_prompt`.

    Returns:
        ``[B, m + S, d]`` in the type of the embeddings.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as the two functions.

    Example:
        >>> reconstruct_and_splice(torch.ones(2, 8), inputs_embeds=torch.zeros(1, 3, 8)).shape
        torch.Size([1, 5, 8])
    """
    parameters = Parameters(
        *(short_prompt, offset_a, offset_b, space_down, space_up, gate_weight, gate_bias),
        *(space_down_bias, space_up_bias),
    )
    text = Text(input_ids, weight, inputs_embeds, attention_mask, task_ids)
    flags = Flags(scaling, activation, gate, temperature)
    return prompt_path(parameters, text, flags, fusion, backend)
