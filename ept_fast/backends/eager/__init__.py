"""The factored algebra of METHOD in plain PyTorch, with the backward written out.

Operation 1 reduces over d at the start and expands over d at the end; between them everything is
m, n, r and K·h small. Operation 2 walks the text in tiles that stay in a core's cache: a tile of
the offset is computed once and added to every row of the batch that shares it. Neither makes
anything of size n×d.

The splice is planned on the host, so this backend waits for the device where the mask or the task
ids live on one. Symbols are METHOD's; every tensor has the task axis T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ept_fast.kernels.launch import EagerSpliceConfig, eager_splice_config
from ept_fast.precision import accumulation_dtype

__all__ = [
    "available",
    "reconstruct_backward",
    "reconstruct_forward",
    "splice_backward",
    "splice_forward",
    "supports",
]


def available() -> tuple[bool, str]:
    """Whether the backend works on this machine, and why."""
    return True, "plain PyTorch, any device and type"


def supports(tensors: dict[str, Tensor | None], by_name: bool = False) -> tuple[bool, str]:
    """Whether it serves these tensors: always."""
    return available()


# Operation 1


def is_degenerate(*tensors: Tensor | None) -> bool:
    """Whether any tensor has no elements: what is left of a call then is done here."""
    return any(tensor is not None and tensor.numel() == 0 for tensor in tensors)


def _side_by_side(space_down: Tensor, gate_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[D | G], [T, d, K·h + K]."""
    tasks, spaces, width, dim = space_down.shape
    down = space_down.permute(0, 2, 1, 3).reshape(tasks, width, spaces * dim)
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


def _activate(hidden: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return F.gelu(hidden)
    if activation == "relu":
        return F.relu(hidden)
    if activation == "silu":
        return F.silu(hidden)
    return hidden


def _activation_backward(grad: Tensor, hidden: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        gelu: Tensor = torch.ops.aten.gelu_backward(grad, hidden)
        return gelu
    if activation == "relu":
        return torch.where(hidden > 0, grad, 0)
    if activation == "silu":
        silu: Tensor = torch.ops.aten.silu_backward(grad, hidden)
        return silu
    return grad


def reconstruct_forward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """P′ [T, m, d] and what the backward needs.

    Returns:
        prompt [T, m, d]; query Q [T, m, r]; stats [T, 2, m], in the kernels the softmax's row
        maxima and row sums, zeros here, where the backward makes the whole softmax again; mix O
        [T, m, r]; hidden Hin [T, m, K·h]; gates g [T, m, K]; cross S [T, r, K·h + K]. All but the
        prompt in the accumulation type; those that do not apply are empty.
    """
    dtype = accumulation_dtype(
        short_prompt, offset_a, offset_b, space_down, space_up, gate_weight, gate_bias
    )
    p = short_prompt.to(dtype)
    result = p
    query, stats, mix, hidden, gates, cross = (p.new_empty(0) for _ in range(6))
    b = None
    if offset_a is not None and offset_b is not None:
        a, b = offset_a.to(dtype), offset_b.to(dtype)
        query = p @ b.mT
        stats = p.new_zeros(p.shape[0], 2, p.shape[1])
        mix = (_weights(query, a, scaling, p.shape[-1]) @ a) * scaling
        result = torch.baddbmm(result, mix, b)
    if space_down is not None and space_up is not None and gate_weight is not None:
        assert gate_bias is not None
        spaces, dim = space_down.shape[1], space_down.shape[3]
        down = _side_by_side(space_down, gate_weight, dtype)
        x = p @ down
        if b is not None:
            cross = b @ down
            x = torch.baddbmm(x, mix, cross)
        hidden = x[..., : spaces * dim].contiguous()
        logits = (x[..., spaces * dim :] + gate_bias.to(dtype).unsqueeze(1)) / temperature
        if gate == "prompt":
            logits = logits.mean(1, keepdim=True).expand_as(logits)
        gates = logits.softmax(-1)
        phi = _by_space(_activate(hidden, activation), spaces, dim)
        gated = (phi * gates.unsqueeze(-1)).flatten(-2)  # g_k·φ(H_k) [T, m, K·h]
        result = torch.baddbmm(result, gated, _stacked(space_up, dtype))
    prompt = result.to(short_prompt.dtype)
    return (
        prompt.clone() if prompt is short_prompt else prompt,
        query,
        stats,
        mix,
        hidden,
        gates,
        cross,
    )


def reconstruct_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the seven tensors, in their order and types, from Y = dL/dP′ [T, m, d].

    Those of tensors that are not given are empty.
    """
    dtype = accumulation_dtype(
        short_prompt, offset_a, offset_b, space_down, space_up, gate_weight, gate_bias
    )
    y, p = grad.to(dtype), short_prompt.to(dtype)
    d_p = y
    d_a, d_b, d_down, d_up, d_gate_weight, d_gate_bias = (p.new_empty(0) for _ in range(6))
    a = b = d_mix = None
    if offset_a is not None and offset_b is not None:
        a, b = offset_a.to(dtype), offset_b.to(dtype)
        d_mix = y @ b.mT
        d_b = mix.mT @ y
    if space_down is not None and space_up is not None and gate_weight is not None:
        assert gate_bias is not None
        spaces, dim = space_down.shape[1], space_down.shape[3]
        down, up = _side_by_side(space_down, gate_weight, dtype), _stacked(space_up, dtype)
        d_gated = _by_space(y @ up.mT, spaces, dim)
        phi = _by_space(_activate(hidden, activation), spaces, dim)
        d_up = (phi * gates.unsqueeze(-1)).flatten(-2).mT @ y
        d_gates = (d_gated * phi).sum(-1)
        d_hidden = _activation_backward(
            (d_gated * gates.unsqueeze(-1)).flatten(-2), hidden, activation
        )
        if gate == "prompt":
            d_gates = d_gates.mean(1, keepdim=True).expand_as(d_gates)
        # dz / τ, the gradient of the logits before the temperature
        d_z = gates * (d_gates - (gates * d_gates).sum(-1, keepdim=True)) / temperature
        d_x = torch.cat([d_hidden, d_z], dim=-1)  # [T, m, K·h + K]
        d_gate_bias = d_z.sum(1)
        d_p = torch.baddbmm(d_p, d_x, down.mT)
        d_down = p.mT @ d_x
        if b is not None:
            assert d_mix is not None
            d_mix = torch.baddbmm(d_mix, d_x, cross.mT)
            d_cross = mix.mT @ d_x
            d_b = torch.baddbmm(d_b, d_cross, down.mT)
            d_down = torch.baddbmm(d_down, b.mT, d_cross)
        d_gate_weight = d_down[..., spaces * dim :].to(gate_weight.dtype).contiguous()
        d_down = _by_space(d_down[..., : spaces * dim], spaces, dim).permute(0, 2, 1, 3)
        d_down = d_down.to(space_down.dtype).contiguous()
        d_up = d_up.reshape(space_up.shape).to(space_up.dtype)
        d_gate_bias = d_gate_bias.to(gate_bias.dtype)
    if a is not None and b is not None:
        assert offset_a is not None
        assert offset_b is not None
        assert d_mix is not None
        weights = _weights(query, a, scaling, p.shape[-1])
        d_a = (weights.mT @ d_mix) * scaling
        d_weights = (d_mix @ a.mT) * scaling
        d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, dtype)
        del d_weights
        d_scores.mul_(scaling / p.shape[-1] ** 0.5)
        d_query = d_scores @ a
        d_a = torch.baddbmm(d_a, d_scores.mT, query).to(offset_a.dtype)
        d_p = torch.baddbmm(d_p, d_query, b)
        d_b = torch.baddbmm(d_b, d_query.mT, p).to(offset_b.dtype)
    d_p = d_p.to(short_prompt.dtype)
    if d_p.data_ptr() == grad.data_ptr():
        d_p = d_p.clone()
    return d_p, d_a, d_b, d_down, d_up, d_gate_weight, d_gate_bias


# Operation 2


@dataclass(frozen=True)
class _Row:
    """Where the real tokens of one row of the batch lie.

    ``columns`` lists their columns where they are not one stretch from ``start`` on.
    """

    row: int
    start: int
    count: int
    columns: Tensor | None


def _runs(batch: int, task_ids: Tensor | None) -> list[tuple[int, int, int]]:
    """Neighbouring rows of one task as (first, last, task)."""
    if task_ids is None:
        return [(0, batch, 0)] if batch else []
    runs: list[tuple[int, int, int]] = []
    for row, task in enumerate(task_ids.tolist()):
        if runs and runs[-1][2] == task:
            runs[-1] = (runs[-1][0], row + 1, task)
        else:
            runs.append((row, row + 1, task))
    return runs


def _rows(batch: int, length: int, attention_mask: Tensor | None) -> list[_Row]:
    """The real tokens of every row; all of them where there is no mask."""
    if attention_mask is None or length == 0:
        return [_Row(row, 0, length, None) for row in range(batch)]
    mask = (attention_mask != 0).cpu()
    number = mask.sum(1)
    first = mask.to(torch.uint8).argmax(1)
    last = length - 1 - mask.flip(1).to(torch.uint8).argmax(1)
    # A row of padding only counts as one stretch of no tokens, from column 0.
    gaps = ((number > 0) & (last - first + 1 != number)).tolist()
    starts, counts = first.tolist(), number.tolist()
    return [
        _Row(row, starts[row], counts[row], _columns(attention_mask[row]) if gaps[row] else None)
        for row in range(batch)
    ]


def _columns(chosen: Tensor) -> Tensor:
    return chosen.nonzero().squeeze(1)


@dataclass(frozen=True)
class _Group:
    """The rows of one task: runs of rows whose text starts in column 0, and the other rows.

    In the first, a tile of positions is a tile of columns, padding and all, and neighbours go
    together; the others go one by one.
    """

    aligned: list[list[_Row]]
    shifted: list[_Row]
    longest: int


def _groups(
    batch: int, length: int, attention_mask: Tensor | None, task_ids: Tensor | None
) -> dict[int, _Group]:
    rows = _rows(batch, length, attention_mask)
    groups: dict[int, _Group] = {}
    longest: dict[int, int] = {}
    for first, last, task in _runs(batch, task_ids):
        group = groups.setdefault(task, _Group([], [], 0))
        neighbours: list[_Row] = []
        for row in rows[first:last]:
            longest[task] = max(longest.get(task, 0), row.count)
            if row.columns is None and row.start == 0:
                neighbours.append(row)
                continue
            group.shifted.append(row)
            if neighbours:
                group.aligned.append(neighbours)
                neighbours = []
        if neighbours:
            group.aligned.append(neighbours)
    return {t: _Group(g.aligned, g.shifted, longest[t]) for t, g in groups.items()}


class _Text:
    """The text's embeddings, read a tile at a time: looked up, or given."""

    def __init__(
        self,
        input_ids: Tensor | None,
        weight: Tensor | None,
        inputs_embeds: Tensor | None,
        config: EagerSpliceConfig,
    ) -> None:
        self.input_ids, self.weight, self.inputs_embeds = input_ids, weight, inputs_embeds
        self.scratch: Tensor | None = None
        self.config = config

    def tile(self, first: int, last: int, start: int, stop: int) -> Tensor:
        """Rows [first, last) × columns [start, stop) × d; valid until the next call."""
        if self.inputs_embeds is not None:
            return self.inputs_embeds[first:last, start:stop]
        assert self.input_ids is not None
        return self._lookup(self.input_ids[first:last, start:stop])

    def columns(self, row: int, columns: Tensor) -> Tensor:
        """The given columns of one row, [columns, d]; valid until the next call."""
        if self.inputs_embeds is not None:
            return self.inputs_embeds[row].index_select(0, columns)
        assert self.input_ids is not None
        return self._lookup(self.input_ids[row, columns])

    def _lookup(self, ids: Tensor) -> Tensor:
        assert self.weight is not None
        width = self.weight.shape[1]
        if self.scratch is None:
            self.scratch = self.weight.new_empty(self.config.positions * self.config.rows, width)
        found = self.scratch[: ids.numel()]
        torch.index_select(self.weight, 0, ids.reshape(-1), out=found)
        return found.view(*ids.shape, width)


def splice_forward(
    prompt: Tensor,
    input_ids: Tensor | None,
    weight: Tensor | None,
    inputs_embeds: Tensor | None,
    offset_a: Tensor | None,
    offset_b: Tensor | None,
    attention_mask: Tensor | None,
    task_ids: Tensor | None,
    scaling: float,
) -> Tensor:
    """The prompt before the text and the offset onto its real tokens, [B, m + S, d].

    ``offset_a`` without ``offset_b`` is the offset itself, a table [T, n, d].
    """
    source = inputs_embeds if inputs_embeds is not None else weight
    ids = inputs_embeds if inputs_embeds is not None else input_ids
    assert source is not None
    assert ids is not None
    dtype = accumulation_dtype(prompt, source, offset_a, offset_b)
    batch, length = ids.shape[0], ids.shape[1]
    m, width = prompt.shape[1], prompt.shape[2]
    out = source.new_empty(batch, m + length, width)
    for first, last, task in _runs(batch, task_ids):
        out[first:last, :m] = prompt[task]
    config = eager_splice_config(length, width, dtype.itemsize, out.device.type)
    text = _Text(input_ids, weight, inputs_embeds, config)
    body = out[:, m:]
    if offset_a is None:
        for low in range(0, length, config.positions):
            high = min(low + config.positions, length)
            for first in range(0, batch, config.rows):
                last = min(first + config.rows, batch)
                body[first:last, low:high] = text.tile(first, last, low, high)
        return out
    for task, group in _groups(batch, length, attention_mask, task_ids).items():
        a = offset_a[task].to(dtype)
        b = None if offset_b is None else offset_b[task].to(dtype)
        if b is not None:
            a = a * scaling
        for row in group.shifted:
            _copy_padding(body, text, row, length, config.positions)
        for low in range(0, length, config.positions):
            high = min(low + config.positions, length)
            tile = a[low : min(high, group.longest)]
            if b is not None:
                tile = tile @ b
            for rows in group.aligned:
                _write_aligned(body, text, rows, tile, low, high, config.rows)
            for row in group.shifted:
                _write_shifted(body, text, row, tile, low, min(high, row.count))
    return out


def _write_aligned(
    body: Tensor, text: _Text, rows: list[_Row], tile: Tensor, low: int, high: int, most: int
) -> None:
    """Write columns [low, high) of neighbouring rows, real tokens and padding."""
    for begin in range(0, len(rows), most):
        chunk = rows[begin : begin + most]
        first, last = chunk[0].row, chunk[-1].row + 1
        target, found = body[first:last, low:high], text.tile(first, last, low, high)
        if all(row.count >= high for row in chunk):
            torch.add(found, tile, out=target)
            continue
        target.copy_(found)
        for row in chunk:
            real = min(row.count, high) - low
            if real > 0:  # what stands there is the embedding itself: one rounding, as above
                target[row.row - first, :real] += tile[:real]


def _write_shifted(body: Tensor, text: _Text, row: _Row, tile: Tensor, low: int, high: int) -> None:
    """Write the real tokens of positions [low, high) of one row."""
    if high <= low:
        return
    offset = tile[: high - low]
    if row.columns is None:
        start, stop = row.start + low, row.start + high
        found = text.tile(row.row, row.row + 1, start, stop)[0]
        torch.add(found, offset, out=body[row.row, start:stop])
    else:
        columns = row.columns[low:high]
        found = text.columns(row.row, columns)
        body[row.row].index_copy_(0, columns, (found + offset).to(body.dtype))


def _copy_padding(body: Tensor, text: _Text, row: _Row, length: int, most: int) -> None:
    """Write the embeddings of one row's columns without a real token."""
    if row.columns is not None:
        padding = torch.ones(length, dtype=torch.bool, device=body.device)
        padding = _columns(padding.index_fill_(0, row.columns, False))
        for columns in torch.split(padding, most):
            body[row.row].index_copy_(0, columns, text.columns(row.row, columns))
        return
    for start, stop in ((0, row.start), (row.start + row.count, length)):
        for low in range(start, stop, most):
            high = min(low + most, stop)
            body[row.row, low:high] = text.tile(row.row, row.row + 1, low, high)[0]


def splice_backward(
    grad: Tensor,
    prompt: Tensor,
    offset_a: Tensor | None,
    offset_b: Tensor | None,
    attention_mask: Tensor | None,
    task_ids: Tensor | None,
    scaling: float,
    need_prompt: bool,
    need_offset: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of prompt, offset_a and offset_b in their types from that of the output.

    Each gradient element of the text is read once. What is not needed is empty.
    """
    dtype = accumulation_dtype(grad, prompt, offset_a, offset_b)
    batch, total, width = grad.shape
    m = prompt.shape[1]
    length = total - m
    d_prompt, d_a, d_b = (grad.new_empty(0) for _ in range(3))
    if need_prompt:
        summed = prompt.new_zeros(prompt.shape, dtype=dtype)
        for first, last, task in _runs(batch, task_ids):
            summed[task] += grad[first:last, :m].sum(0, dtype=dtype)
        d_prompt = summed.to(prompt.dtype)
    if not need_offset or offset_a is None or offset_b is None:
        return d_prompt, d_a, d_b
    d_a = offset_a.new_zeros(offset_a.shape, dtype=dtype)
    d_b = offset_b.new_zeros(offset_b.shape, dtype=dtype)
    config = eager_splice_config(length, width, dtype.itemsize, grad.device.type)
    body = grad[:, m:]
    tile = grad.new_empty(config.positions, width, dtype=dtype)
    for task, group in _groups(batch, length, attention_mask, task_ids).items():
        a, b = offset_a[task].to(dtype) * scaling, offset_b[task].to(dtype) * scaling
        rows = [*(row for run in group.aligned for row in run), *group.shifted]
        for low in range(0, group.longest, config.positions):
            high = min(low + config.positions, group.longest)
            summed = tile[: high - low].zero_()
            for row in rows:
                _sum_row(summed, body, row, low, min(high, row.count))
            torch.mm(summed, b.mT, out=d_a[task, low:high])
            d_b[task].addmm_(a[low:high].mT, summed)
    return d_prompt, d_a.to(offset_a.dtype), d_b.to(offset_b.dtype)


def _sum_row(summed: Tensor, body: Tensor, row: _Row, low: int, high: int) -> None:
    """Add the gradients of positions [low, high) of one row."""
    if high <= low:
        return
    part = summed[: high - low]
    if row.columns is None:
        part += body[row.row, row.start + low : row.start + high]
    else:
        part += body[row.row].index_select(0, row.columns[low:high])
