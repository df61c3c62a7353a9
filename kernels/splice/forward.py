"""The splice's forward: a program owns a block of positions and of channels, for some slots.

Prompt blocks write P' before the text of their rows. Text blocks compute the offset of their tile
once for each run of rows with one task and add it to that tile of every row in it, wherever the
row's padding puts it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ept_fast.kernels.splice.plan import Rows, columns_of, row_at, run_at
from ept_fast.kernels.tiles import Axis, axis, dot_split, inside, load, matrix, pointers, store

__all__ = ["splice_forward_kernel"]


@triton.jit
def _known(rows, task, places):
    """Of the places of a task's tile, all or none: whether the bank has the task."""
    mask = places.mask
    if rows.slots_ptr is not None:
        mask = mask & (tl.full(mask.shape, task, tl.int32) < rows.num_tasks)
    return Axis(places.offs, mask)


@triton.jit
def _load_or_nan(of, i, j):
    """A tile in float32, NaN outside."""
    return tl.load(pointers(of, i, j), mask=inside(i, j), other=float("nan")).to(tl.float32)


@triton.jit
def _load_text(ids, source, vocabulary, row, columns, d):
    """A tile of a row's embeddings; NaN for ids that are not in the table."""
    if ids is not None:
        ids_ptrs = ids[0] + row * ids[1] + columns.offs * ids[2]
        tokens = tl.load(ids_ptrs, mask=columns.mask, other=0).to(tl.int64)
        columns = Axis(tokens, columns.mask & (tokens >= 0) & (tokens < vocabulary))
    return _load_or_nan(matrix(source, row), columns, d)


@triton.jit
def _offset_tile(
    a,
    b,
    s,
    d,
    rank,
    TILES_R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TERMS: tl.constexpr,
    ORDER: tl.constexpr,
):
    """A·B at positions and channels."""
    tile = tl.zeros((s.offs.shape[0], d.offs.shape[0]), tl.float32)
    for tile_r in range(TILES_R):
        r = axis(tile_r * BLOCK_R, rank, BLOCK_R)
        tile += dot_split(load(a, s, r), load(b, r, d), TERMS, TERMS, ORDER)
    return tile


@triton.jit(do_not_specialize=["batch", "length", "num_tasks"])
def splice_forward_kernel(
    out,  # [B, m + S, d]
    prompt,  # [T, m, d]
    ids,  # [B, S] or None
    source,  # [V, d] with a stride of 0 before, or [B, S, d]
    offset_a,  # [T, n, r] or None
    offset_b,  # [T, r, d] or None
    tables,  # of the plan
    scaling,
    batch,
    length,
    num_tasks,
    sizes,  # m, d, r, V
    ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILES_R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TERMS: tl.constexpr,
    ORDER: tl.constexpr,
):
    m, hidden_size, rank, vocabulary = sizes
    chunks_d = tl.cdiv(hidden_size, BLOCK_D)
    prompt_blocks = tl.cdiv(m, BLOCK_S)
    blocks = prompt_blocks + tl.cdiv(length, BLOCK_S)
    pid = tl.program_id(0)
    d = axis((pid % chunks_d) * BLOCK_D, hidden_size, BLOCK_D)
    block = (pid // chunks_d) % blocks
    slot = pid // (chunks_d * blocks) * ROWS
    last = tl.minimum(slot + ROWS, batch)
    rows = Rows(tables[0], tables[2], tables[3], length, num_tasks)

    if block < prompt_blocks:
        places = axis(block * BLOCK_S, m, BLOCK_S)
        while slot < last:
            task, end = run_at(rows, slot, last)
            of = matrix(prompt, tl.cast(task, tl.int64))
            tile = _load_or_nan(of, _known(rows, task, places), d)
            for each in range(slot, end):
                store(matrix(out, row_at(rows, each)), tile, places, d)
            slot = end
    else:
        s = axis((block - prompt_blocks) * BLOCK_S, length, BLOCK_S)
        behind = (out[0] + tl.cast(m, tl.int64) * out[2], out[1], out[2], out[3])
        while slot < last:
            task, end = run_at(rows, slot, last)
            known = _known(rows, task, s)
            if offset_a is not None:
                a = matrix(offset_a, tl.cast(task, tl.int64))
                b = matrix(offset_b, tl.cast(task, tl.int64))
                tile = _offset_tile(a, b, known, d, rank, TILES_R, BLOCK_R, TERMS, ORDER)
                tile = scaling * tile
            for each in range(slot, end):
                row = row_at(rows, each)
                columns = columns_of(rows, row, s)
                places = Axis(columns.offs, known.mask)
                text = _load_text(ids, source, vocabulary, row, places, d)
                if offset_a is not None:
                    text = tl.where(columns.mask[:, None], text + tile, text)
                store(matrix(behind, row), text, Axis(columns.offs, s.mask), d)
            slot = end
