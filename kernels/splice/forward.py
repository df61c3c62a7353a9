"""The splice's forward.

A program owns a block of positions and of channels, for some slots. Prompt blocks write P' before
the text of their rows, or for each row of the batch the rows of P' that it names. Text blocks
compute the offset of their tile once for each run of rows with one task and add it to that tile of
every row in it, wherever the row's padding puts it.
"""

import triton
import triton.language as tl

from ept_fast.kernels.splice.plan import columns_of, read, row_at
from ept_fast.kernels.tiles import Axis, axis, dot_split, inside, load, matrix, pointers, store


@triton.jit
def _run_at(tables, slot, last, num_tasks, places):
    """The task of a slot, the end of its run, at most ``last``, and the places: none of them are
    there if the bank does not have the task.
    """
    task = 0
    end = last
    mask = places.mask
    if tables[0] is not None:
        _, task, end = read(tables[0], slot)
        end = tl.minimum(end, last)
        mask = mask & (tl.full(mask.shape, task, tl.int32) < num_tasks)
    return tl.cast(task, tl.int64), end, Axis(places.offs, mask)


@triton.jit
def _load_or_nan(of, i, j):
    """A tile in float32, NaN outside."""
    return tl.load(pointers(of, i, j), mask=inside(i, j), other=float("nan")).to(tl.float32)


@triton.jit(do_not_specialize=["batch", "length", "num_tasks"])
def splice_forward_kernel(
    out,  # [B, m + S, d]
    prompt,  # [T, m, d]; with rows [1, R, d]
    rows,  # of the prompt for each token [B, m], and their number R; or None
    text,  # ids [B, S] and their embeddings [V, d], or None and [B, S, d]
    offset,  # A [T, n, r] and B [T, r, d], or None
    tables,  # of the plan
    filled,  # without a mask: mask and positions of prompt and text [B, m + S], or None
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
    """The prompt and the text of a block of positions and channels, for some slots."""
    m, hidden_size, rank, vocabulary = sizes
    ids, source = text
    chunks_d = tl.cdiv(hidden_size, BLOCK_D)
    prompt_blocks = tl.cdiv(m, BLOCK_S)
    blocks = prompt_blocks + tl.cdiv(length, BLOCK_S)
    pid = tl.program_id(0)
    d = axis((pid % chunks_d) * BLOCK_D, hidden_size, BLOCK_D)
    block = (pid // chunks_d) % blocks
    slot = pid // (chunks_d * blocks) * ROWS
    last = tl.minimum(slot + ROWS, batch)

    if filled is not None:
        if pid % chunks_d == 0:
            at = axis(block * BLOCK_S, m + length, BLOCK_S)
            for row in range(slot, last):
                ptrs = tl.cast(row, tl.int64) * (m + length) + at.offs
                tl.store(filled[0] + ptrs, 1, mask=at.mask)
                tl.store(filled[1] + ptrs, at.offs, mask=at.mask)
    if block < prompt_blocks:
        places = axis(block * BLOCK_S, m, BLOCK_S)
        if rows is not None:
            for each in range(slot, last):
                row = tl.cast(each, tl.int64)
                rows_ptrs = rows[0] + row * rows[1] + places.offs * rows[2]
                chosen = tl.load(rows_ptrs, mask=places.mask, other=-1).to(tl.int64)
                known = Axis(chosen, (chosen >= 0) & (chosen < rows[3]))
                tile = _load_or_nan(matrix(prompt, 0), known, d)
                tile = tl.where((chosen == -1)[:, None], 0.0, tile)
                store(matrix(out, row), tile, places, d)
        else:
            while slot < last:
                task, end, known = _run_at(tables, slot, last, num_tasks, places)
                tile = _load_or_nan(matrix(prompt, task), known, d)
                for each in range(slot, end):
                    store(matrix(out, row_at(tables, each)), tile, places, d)
                slot = end
    else:
        s = axis((block - prompt_blocks) * BLOCK_S, length, BLOCK_S)
        behind = (out[0] + tl.cast(m, tl.int64) * out[2], out[1], out[2], out[3])
        while slot < last:
            task, end, known = _run_at(tables, slot, last, num_tasks, s)
            tile = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
            if offset is not None:
                a, b = matrix(offset[0], task), matrix(offset[1], task)
                for tile_r in range(TILES_R):
                    r = axis(tile_r * BLOCK_R, rank, BLOCK_R)
                    tile += dot_split(load(a, known, r), load(b, r, d), TERMS, TERMS, ORDER)
                tile = scaling * tile
            for each in range(slot, end):
                row = row_at(tables, each)
                columns = columns_of(tables, length, row, s)
                places = Axis(columns.offs, known.mask)
                if ids is not None:
                    ids_ptrs = ids[0] + row * ids[1] + columns.offs * ids[2]
                    tokens = tl.load(ids_ptrs, mask=known.mask, other=0).to(tl.int64)
                    in_table = (tokens >= 0) & (tokens < vocabulary)
                    places = Axis(tokens, known.mask & in_table)
                words = _load_or_nan(matrix(source, row), places, d)
                if offset is not None:
                    words = tl.where(columns.mask[:, None], words + tile, words)
                store(matrix(behind, row), words, Axis(columns.offs, s.mask), d)
            slot = end
