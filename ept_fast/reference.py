"""The definition of the two operations in plain PyTorch, read as the specification.

Nothing here is fast and nothing here is clever: every intermediate of METHOD's equations is
materialised, autograd differentiates them, and every other backend is checked against the result.
The only subtleties are the ones the definition itself asks for: products and sums accumulate in
float32 (float64 for float64 input) and each output element is rounded once.

The arguments are taken as valid; :mod:`ept_fast.ops.functional` is the checked entrance.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ept_fast.ops.activations import ACTIVATIONS
from ept_fast.precision import accumulation_dtype

__all__ = ["reconstruct_prompt", "splice_prompt"]


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
) -> Tensor:
    """Operation 1 of METHOD, written as its five equations.

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

    Returns:
        P′, ``[(T,) m, d]`` in the type of ``short_prompt``.
    """
    inputs = (short_prompt, offset_a, offset_b, space_down, space_up, gate_weight, gate_bias)
    dtype = accumulation_dtype(*inputs, space_down_bias, space_up_bias)
    with torch.autocast(short_prompt.device.type, enabled=False):
        p = short_prompt.to(dtype)
        fused = p
        if fusion and offset_a is not None and offset_b is not None:
            delta = scaling * (offset_a.to(dtype) @ offset_b.to(dtype))  # ΔE [(T,) n, d]
            scores = p @ delta.mT / p.shape[-1] ** 0.5  # [(T,) m, n]
            fused = p + scores.softmax(-1) @ delta
        if space_down is None or space_up is None:
            return fused.to(short_prompt.dtype)
        hidden = fused.unsqueeze(-3) @ space_down.to(dtype)  # [(T,) K, m, h]
        if space_down_bias is not None:
            hidden = hidden + space_down_bias.to(dtype).unsqueeze(-2)
        spaces = ACTIVATIONS[activation].function(hidden) @ space_up.to(dtype)  # [(T,) K, m, d]
        if space_up_bias is not None:
            spaces = spaces + space_up_bias.to(dtype).unsqueeze(-2)
        if gate_weight is None or gate_bias is None:  # one space
            return (fused + spaces.squeeze(-3)).to(short_prompt.dtype)
        logits = (fused @ gate_weight.to(dtype) + gate_bias.to(dtype).unsqueeze(-2)) / temperature
        if gate == "prompt":
            logits = logits.mean(-2, keepdim=True).expand_as(logits)
        weights = logits.softmax(-1)  # g [(T,) m, K]
        mixed = (weights.mT.unsqueeze(-1) * spaces).sum(-3)  # [(T,) m, d]
        return (fused + mixed).to(short_prompt.dtype)


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
) -> Tensor:
    """Operation 2 of METHOD: the prompt before the text, the offset onto the text's real tokens.

    Args:
        prompt: P′, ``[m, d]``, or ``[T, m, d]`` with ``task_ids``.
        input_ids: ``[B, S]`` integers, looked up in ``weight``; or else ``inputs_embeds``.
        weight: the frozen embedding table, ``[V, d]``; it gets no gradient.
        inputs_embeds: ``[B, S, d]``.
        offset_a: A, ``[(T,) n, r]`` with n >= S; with ``offset_b`` or not at all.
        offset_b: B, ``[(T,) r, d]``.
        scaling: c, the factor of A·B.
        attention_mask: ``[B, S]`` of 0 and 1; ones by default.
        task_ids: ``[B]`` integers, the prompt of each row.
        prompt_rows: ``[B, m]`` integers: the prompt is ``[R, d]``, and row b has its row
            ``prompt_rows[b, j]`` for token j, or zeros for -1.

    Returns:
        ``[B, m + S, d]`` in the type of the embeddings.
    """
    with torch.autocast(prompt.device.type, enabled=False):
        if inputs_embeds is not None:
            embeds = inputs_embeds
        else:
            assert input_ids is not None
            assert weight is not None
            embeds = F.embedding(input_ids, weight.detach())
        dtype = accumulation_dtype(prompt, embeds, offset_a, offset_b)
        text = embeds.to(dtype)
        batch, length, _ = text.shape
        if offset_a is not None and offset_b is not None:
            delta = scaling * (offset_a.to(dtype) @ offset_b.to(dtype))  # ΔE [(T,) n, d]
            if attention_mask is None:
                mask = torch.ones(batch, length, dtype=torch.bool, device=text.device)
            else:
                mask = attention_mask != 0
            position = (mask.cumsum(-1) - 1).clamp_min(0)  # rank among the row's real tokens
            if task_ids is None:
                offset = delta[position]
            else:
                offset = delta[task_ids.long().unsqueeze(-1), position]
            text = torch.where(mask.unsqueeze(-1), text + offset, text)
        if prompt_rows is not None:
            zeros = prompt.new_zeros(1, prompt.shape[-1])
            head = torch.cat([prompt, zeros]).to(dtype)[prompt_rows.long()]  # -1 is the last
        elif task_ids is None:
            head = prompt.to(dtype).expand(batch, *prompt.shape)
        else:
            head = prompt.to(dtype)[task_ids.long()]
        return torch.cat([head, text], dim=1).to(embeds.dtype)
