"""Operation 1 in plain PyTorch: METHOD's factored algebra, with the backward written out.

It reduces over d at the start and expands over d at the end; between them everything is m, n, r and
K·h small. Symbols are METHOD's; every tensor has the task axis T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ept_fast.ops.activations import ACTIVATIONS
from ept_fast.ops.types import Flags, Parameters, Saved
from ept_fast.precision import accumulation_dtype

__all__ = ["reconstruct_backward", "reconstruct_forward"]


def _side_by_side(space_down: Tensor, gate_weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[D | G], [T, d, K·h + K], or D alone."""
    tasks, spaces, width, dim = space_down.shape
    down = space_down.permute(0, 2, 1, 3).reshape(tasks, width, spaces * dim)
    if gate_weight is None:
        return down.to(dtype)
    return torch.cat([down.to(dtype), gate_weight.to(dtype)], dim=-1)


def _stacked(space_up: Tensor, dtype: torch.dtype) -> Tensor:
    """U, [T, K·h, d]."""
    return space_up.to(dtype).flatten(1, 2)


def _by_space(tensor: Tensor, spaces: int, dim: int) -> Tensor:
    """[T, m, K·h] as [T, m, K, h]."""
    return tensor.reshape(*tensor.shape[:-1], spaces, dim)


def _weights(query: Tensor, a: Tensor, scaling: float, width: int) -> Tensor:
    """W [T, m, n], the softmax of the scores Q·(c·A)ᵀ/√d."""
    return (query @ a.mT).mul_(scaling / width**0.5).softmax(-1)


def _gate(x: Tensor, bias: Tensor, flags: Flags) -> Tensor:
    """g [T, m, K], of the fused prompt's products with G."""
    logits = (x + bias.unsqueeze(1)) / flags.temperature
    if flags.gate == "prompt":
        logits = logits.mean(1, keepdim=True).expand_as(logits)
    return logits.softmax(-1)


def _gate_backward(grad: Tensor, gates: Tensor, flags: Flags) -> Tensor:
    """The gradient of the products with G, from that of g."""
    if flags.gate == "prompt":
        grad = grad.mean(1, keepdim=True).expand_as(grad)
    return gates * (grad - (gates * grad).sum(-1, keepdim=True)) / flags.temperature


def reconstruct_forward(parameters: Parameters, flags: Flags) -> tuple[Tensor, Saved]:
    """P′ [T, m, d] and what the backward needs."""
    dtype = accumulation_dtype(*parameters)
    short_prompt, offset_a, offset_b, space_down, space_up, *gate, down_bias, up_bias = parameters
    gate_weight, gate_bias = gate
    p = short_prompt.to(dtype)
    result = p
    query, stats, attended, hidden, gates, cross = (p.new_empty(0) for _ in Saved._fields)
    b = None
    if offset_a is not None and offset_b is not None:
        a, b = offset_a.to(dtype), offset_b.to(dtype)
        query = p @ b.mT
        stats = p.new_zeros(p.shape[0], 2, p.shape[1])
        attended = (_weights(query, a, flags.scaling, p.shape[-1]) @ a) * flags.scaling
        result = torch.baddbmm(result, attended, b)
    if space_down is not None and space_up is not None:
        spaces, dim = space_down.shape[1], space_down.shape[3]
        down = _side_by_side(space_down, gate_weight, dtype)
        x = p @ down
        if b is not None:
            cross = b @ down
            x = torch.baddbmm(x, attended, cross)
        hidden = x[..., : spaces * dim].contiguous()
        if down_bias is not None:
            hidden += down_bias.to(dtype).flatten(1).unsqueeze(1)
        if gate_bias is not None:
            gates = _gate(x[..., spaces * dim :], gate_bias.to(dtype), flags)
        gated = phi = ACTIVATIONS[flags.activation].function(hidden)
        if gate_bias is not None:
            gated = (_by_space(phi, spaces, dim) * gates.unsqueeze(-1)).flatten(-2)
        # g_k·φ(H_k) [T, m, K·h]
        result = torch.baddbmm(result, gated, _stacked(space_up, dtype))
        if up_bias is not None:
            bias = up_bias.to(dtype)
            result = result + bias if gate_bias is None else torch.baddbmm(result, gates, bias)
    prompt = result.to(short_prompt.dtype)
    if prompt is short_prompt:
        prompt = prompt.clone()
    return prompt, Saved(query, stats, attended, hidden, gates, cross)


def reconstruct_backward(
    grad: Tensor, parameters: Parameters, saved: Saved, flags: Flags, *, wide_offset: bool = False
) -> Parameters:
    """Gradients of the parameters in their types, from Y = dL/dP′ [T, m, d].

    ``wide_offset``: those of offset_a and offset_b stay in the accumulation type.
    """
    dtype = accumulation_dtype(*parameters)
    short_prompt, offset_a, offset_b, space_down, space_up, *gate, down_bias, up_bias = parameters
    gate_weight, gate_bias = gate
    query, _, attended, hidden, gates, cross = saved
    y, p = grad.to(dtype), short_prompt.to(dtype)
    d_p = y
    d_a = d_b = d_down = d_up = d_gate_weight = d_gate_bias = d_down_bias = d_up_bias = None
    a = b = d_attended = None
    if offset_a is not None and offset_b is not None:
        a, b = offset_a.to(dtype), offset_b.to(dtype)
        d_attended = y @ b.mT
        d_b = attended.mT @ y
    if space_down is not None and space_up is not None:
        activation = ACTIVATIONS[flags.activation]
        spaces, dim = space_down.shape[1], space_down.shape[3]
        down, up = _side_by_side(space_down, gate_weight, dtype), _stacked(space_up, dtype)
        d_gated = _by_space(y @ up.mT, spaces, dim)
        phi = _by_space(activation.function(hidden), spaces, dim)
        if gate_bias is None:
            d_up = phi.flatten(-2).mT @ y
            d_x = activation.backward(d_gated.flatten(-2), hidden)  # [T, m, h]
        else:
            d_up = (phi * gates.unsqueeze(-1)).flatten(-2).mT @ y
            d_z = (d_gated * phi).sum(-1)  # at first of g
            if up_bias is not None:
                d_z = torch.baddbmm(d_z, y, up_bias.to(dtype).mT)
            d_z = _gate_backward(d_z, gates, flags)
            d_hidden = activation.backward((d_gated * gates.unsqueeze(-1)).flatten(-2), hidden)
            d_x = torch.cat([d_hidden, d_z], dim=-1)  # [T, m, K·h + K]
            d_gate_bias = d_z.sum(1).to(gate_bias.dtype)
        if down_bias is not None:
            d_down_bias = d_x[..., : spaces * dim].sum(1).view(down_bias.shape).to(down_bias.dtype)
        if up_bias is not None:
            d_up_bias = y.sum(1, keepdim=True) if gate_bias is None else gates.mT @ y
            d_up_bias = d_up_bias.to(up_bias.dtype)
        d_p = torch.baddbmm(d_p, d_x, down.mT)
        d_down = p.mT @ d_x
        if b is not None:
            assert d_attended is not None
            assert d_b is not None
            d_attended = torch.baddbmm(d_attended, d_x, cross.mT)
            d_cross = attended.mT @ d_x
            d_b = torch.baddbmm(d_b, d_cross, down.mT)
            d_down = torch.baddbmm(d_down, b.mT, d_cross)
        if gate_weight is not None:
            d_gate_weight = d_down[..., spaces * dim :].to(gate_weight.dtype).contiguous()
        d_down = _by_space(d_down[..., : spaces * dim], spaces, dim).permute(0, 2, 1, 3)
        d_down = d_down.to(space_down.dtype).contiguous()
        d_up = d_up.reshape(space_up.shape).to(space_up.dtype)
    if a is not None and b is not None:
        assert offset_a is not None
        assert offset_b is not None
        assert d_attended is not None
        assert d_b is not None
        weights = _weights(query, a, flags.scaling, p.shape[-1])
        d_a = (weights.mT @ d_attended).mul_(flags.scaling)
        d_weights = (d_attended @ a.mT) * flags.scaling
        d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, dtype)
        del d_weights
        d_scores.mul_(flags.scaling / p.shape[-1] ** 0.5)
        d_query = d_scores @ a
        d_a.baddbmm_(d_scores.mT, query)
        if not wide_offset:
            d_a = d_a.to(offset_a.dtype)
        d_p = torch.baddbmm(d_p, d_query, b)
        d_b = torch.baddbmm(d_b, d_query.mT, p)
        if not wide_offset:
            d_b = d_b.to(offset_b.dtype)
    d_p = d_p.to(short_prompt.dtype)
    if d_p.data_ptr() == grad.data_ptr():
        d_p = d_p.clone()
    of_gate = d_gate_weight, d_gate_bias
    return Parameters(d_p, d_a, d_b, d_down, d_up, *of_gate, d_down_bias, d_up_bias)
