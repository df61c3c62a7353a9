"""Operation 2 in plain PyTorch: the text in tiles that stay in a core's cache.

A tile of the offset is computed once and added to every row of the batch that shares it; nothing of
size n×d is made. The splice is planned on the host, so this backend waits for the device if the
mask or the task ids live on one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ept_fast.ops.types import SpliceGrads, SpliceInputs
from ept_fast.precision import accumulation_dtype

__all__ = ["TileConfig", "splice_backward", "splice_forward", "tile_config"]

# One tile of the text and the offset tile that is added to it stay together in the second-level
# caches of a few cores (1 MiB and more each on current server CPUs).
_TILE_BYTES = 512 * 1024
# Under this many positions the fixed cost of a tensor operation outweighs the cache.
_MIN_POSITIONS = 16
_DEVICE_TILE_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True)
class TileConfig:
    """Tiles of the splice on a CPU.

    Attributes:
        positions: text positions a tile covers.
        rows: most rows of the batch, side by side, that one tensor operation covers.
    """

    positions: int
    rows: int


def tile_config(length: int, width: int, itemsize: int, device: str = "cpu") -> TileConfig:
    """The tile for text of ``length`` positions, ``width`` channels and ``itemsize`` bytes each.

    Tiles of one text are of nearly equal size. A device that is no CPU gets tiles large enough to
    fill it.
    """
    row_bytes = max(1, width * itemsize)
    budget = _TILE_BYTES if device == "cpu" else _DEVICE_TILE_BYTES
    most = max(budget // row_bytes, _MIN_POSITIONS)
    tiles = max(1, -(-length // most))
    positions = max(1, -(-length // tiles))
    return TileConfig(positions=positions, rows=max(1, budget // (positions * row_bytes)))


@dataclass(frozen=True)
class _Row:
    """The columns of the real tokens of one row of the batch.

    ``columns`` lists their columns if they are not one stretch from ``start`` on.
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
    """The real tokens of every row; all of them without a mask."""
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

    def __init__(self, inputs: SpliceInputs, config: TileConfig) -> None:
        self.input_ids, self.weight = inputs.input_ids, inputs.weight
        self.inputs_embeds = inputs.inputs_embeds
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


def splice_kept(inputs: SpliceInputs) -> list[Tensor]:
    """The forward keeps nothing."""
    return []


def splice_forward(inputs: SpliceInputs, scaling: float) -> tuple[Tensor, list[Tensor]]:
    """The prompt before the text and the offset onto its real tokens, [B, m + S, d]."""
    prompt, _, _, _, offset_a, offset_b, attention_mask, task_ids, prompt_rows = inputs
    source = inputs.source
    dtype = accumulation_dtype(prompt, source, offset_a, offset_b)
    batch, length = inputs.text.shape[:2]
    m, width = inputs.num_tokens, prompt.shape[2]
    out = source.new_empty(batch, m + length, width)
    if prompt_rows is not None:
        head, there = out[:, :m].zero_(), prompt_rows >= 0
        head[there] = prompt[0, prompt_rows[there].long()].to(out.dtype)
    else:
        for first, last, task in _runs(batch, task_ids):
            out[first:last, :m] = prompt[task]
    config = tile_config(length, width, dtype.itemsize, out.device.type)
    text = _Text(inputs, config)
    body = out[:, m:]
    if offset_a is None:
        for low in range(0, length, config.positions):
            high = min(low + config.positions, length)
            for first in range(0, batch, config.rows):
                last = min(first + config.rows, batch)
                body[first:last, low:high] = text.tile(first, last, low, high)
        return out, []
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
    return out, []


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
    inputs: SpliceInputs,
    kept: list[Tensor],
    scaling: float,
    need_prompt: bool,
    need_offset: bool,
    *,
    wide_offset: bool = False,
) -> SpliceGrads:
    """Gradients of prompt, offset_a and offset_b in their types from that of the output.

    Each gradient element of the text is read once. ``wide_offset``: the gradients of offset_a and
    offset_b stay in the accumulation type.
    """
    prompt, _, _, _, offset_a, offset_b, attention_mask, task_ids, prompt_rows = inputs
    dtype = accumulation_dtype(grad, prompt, offset_a, offset_b)
    batch, total, width = grad.shape
    m = inputs.num_tokens
    length = total - m
    d_prompt, d_a, d_b = (grad.new_empty(0) for _ in range(3))
    if need_prompt and prompt_rows is not None:
        # As nn.Embedding's backward, which has one order on every device; -1 counts as row R.
        count = prompt.shape[1]
        ids = prompt_rows.long().where(prompt_rows >= 0, count)
        given = grad[:, :m].to(dtype), ids, count + 1, count, False
        summed = torch.ops.aten.embedding_dense_backward(*given)[:count]
        d_prompt = summed.to(prompt.dtype).unsqueeze(0)
    elif need_prompt:
        summed = prompt.new_zeros(prompt.shape, dtype=dtype)
        for first, last, task in _runs(batch, task_ids):
            summed[task] += grad[first:last, :m].sum(0, dtype=dtype)
        d_prompt = summed.to(prompt.dtype)
    if not need_offset or offset_a is None or offset_b is None:
        return SpliceGrads(d_prompt, d_a, d_b)
    d_a = offset_a.new_zeros(offset_a.shape, dtype=dtype)
    d_b = offset_b.new_zeros(offset_b.shape, dtype=dtype)
    config = tile_config(length, width, dtype.itemsize, grad.device.type)
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
    if not wide_offset:
        d_a, d_b = d_a.to(offset_a.dtype), d_b.to(offset_b.dtype)
    return SpliceGrads(d_prompt, d_a, d_b)


def _sum_row(summed: Tensor, body: Tensor, row: _Row, low: int, high: int) -> None:
    """Add the gradients of positions [low, high) of one row."""
    if high <= low:
        return
    part = summed[: high - low]
    if row.columns is None:
        part += body[row.row, row.start + low : row.start + high]
    else:
        part += body[row.row].index_select(0, row.columns[low:high])
