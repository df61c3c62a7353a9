"""The two operations: check the arguments, choose a backend, call it."""

from __future__ import annotations

import torch
from torch import Tensor

from ept_fast import reference
from ept_fast.checks import (
    check_reconstruct,
    check_splice,
    check_splice_values,
    constant,
    values_are_checked,
)
from ept_fast.ops import dispatch, operators

__all__ = ["reconstruct_prompt", "splice_prompt"]


def _with_task_axis(tensor: Tensor | None, single: bool) -> Tensor | None:
    return tensor.unsqueeze(0) if single and tensor is not None else tensor


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
    bfloat16 or float16 and may differ. Products and sums accumulate in float32 (float64 where any
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
        activation: ``"gelu"`` (exact), ``"relu"``, ``"silu"`` or ``"identity"``.
        gate: ``"token"``: one softmax a token; ``"prompt"``: one for all tokens of the prompt.
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
    scaling, temperature = constant(scaling), constant(temperature)
    check_reconstruct(
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
        fusion,
    )
    tensors = {
        "short_prompt": short_prompt,
        "offset_a": offset_a if fusion else None,
        "offset_b": offset_b if fusion else None,
        "space_down": space_down,
        "space_up": space_up,
        "gate_weight": gate_weight,
        "gate_bias": gate_bias,
    }
    chosen = dispatch.select(backend, tensors)
    if chosen == dispatch.REFERENCE:
        return reference.reconstruct_prompt(
            short_prompt,
            offset_a,
            offset_b,
            space_down,
            space_up,
            gate_weight,
            gate_bias,
            scaling=scaling,
            activation=activation,
            gate=gate,
            temperature=temperature,
            fusion=fusion,
        )
    single = short_prompt.dim() == 2
    first, *rest = (_with_task_axis(tensor, single) for tensor in tensors.values())
    assert first is not None
    a, b, down, up, weight, bias = rest
    prompt = operators.reconstruct(
        first,
        a,
        b,
        down,
        up,
        weight,
        bias,
        float(scaling),
        activation,
        gate,
        float(temperature),
        chosen,
    )
    return prompt.squeeze(0) if single else prompt


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
        attention_mask: ``[B, S]``, bool or integers, of 0 and 1; ones where it is not given.
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
    check_splice(
        prompt,
        input_ids,
        weight,
        inputs_embeds,
        offset_a,
        offset_b,
        scaling,
        attention_mask,
        task_ids,
    )
    tensors = {
        "prompt": prompt,
        "input_ids": input_ids,
        "weight": weight,
        "inputs_embeds": inputs_embeds,
        "offset_a": offset_a,
        "offset_b": offset_b,
        "attention_mask": attention_mask,
        "task_ids": task_ids,
    }
    chosen = dispatch.select(backend, tensors)
    if chosen == dispatch.REFERENCE:
        if values_are_checked(prompt.device) and not torch.compiler.is_compiling():
            vocabulary = 0 if weight is None else weight.shape[0]
            tasks = prompt.shape[0] if prompt.dim() == 3 else 1
            check_splice_values(input_ids, vocabulary, attention_mask, task_ids, tasks)
        return reference.splice_prompt(
            prompt,
            input_ids=input_ids,
            weight=weight,
            inputs_embeds=inputs_embeds,
            offset_a=offset_a,
            offset_b=offset_b,
            scaling=scaling,
            attention_mask=attention_mask,
            task_ids=task_ids,
        )
    single = prompt.dim() == 2
    return operators.splice(
        prompt.unsqueeze(0) if single else prompt,
        input_ids,
        None if weight is None else weight.detach(),
        inputs_embeds,
        _with_task_axis(offset_a, single),
        _with_task_axis(offset_b, single),
        attention_mask,
        task_ids,
        float(scaling),
        chosen,
    )
