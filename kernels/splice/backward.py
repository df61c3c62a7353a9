"""The splice's backward, first launch: sums of the gradient over rows, and their products.

A program owns a block of channels and some blocks of positions, for some rows of one task. It adds
up the gradient of a tile over the rows, each element read once from the column that its position
lies in, and multiplies the sum into its part of dA and dB; prompt blocks write theirs of dP'. The
second launch (:mod:`.finish`) adds the parts in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ept_fast.kernels.splice.plan import Rows, columns_of, row_at
from ept_fast.kernels.tiles import (
    Matrix,
    axis,
    dot_split,
    inside,
    load,
    matrix,
    pointers,
    store,
    transposed,
)

__all__ = ["splice_backward_kernel"]


@triton.jit
def _part_of(sums, task, part, columns):
    """Where a part goes: of the task's gradient itself, or among the parts."""
    ptr = sums[0] + task * sums[1] + part * sums[2]
    return Matrix(ptr, tl.cast(columns, tl.int64), 1)


@triton.jit
def _sum_over_rows(grad, rows, first, last, places, d):
    """A tile of the gradient of real tokens, added up over the rows of slots [first, last)."""
    summed = tl.zeros((places.offs.shape[0], d.offs.shape[0]), tl.float32)
    for slot in tl.range(first, last, disable_licm=True):
        row = row_at(rows, slot)
        summed += load(matrix(grad, row), columns_of(rows, row, places), d)
    return summed


@triton.jit(do_not_specialize=["batch", "length", "num_tasks"])
def splice_backward_kernel(
    grad,  # [B, m + S, d]
    sum_p,  # where sums go: strides of the task and of the part; None if not needed
    sum_a,
    sum_b,
    offset_a,  # [T, n, r]
    offset_b,  # [T, r, d]
    tables,  # of the plan
    scaling,
    batch,
    length,
    num_tasks,
    sizes,  # m, d, r
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    TILES_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TERMS_G: tl.constexpr,
    TERMS: tl.constexpr,
    ORDER: tl.constexpr,
):
    m, hidden_size, rank = sizes
    prompt_blocks = 0
    if sum_p is not None:
        prompt_blocks = tl.cdiv(m, BLOCK_S)
    chunks_s = 0
    if sum_a is not None:
        chunks_s = tl.cdiv(length, BLOCK_S * TILES)
    chunks_d = tl.cdiv(hidden_size, BLOCK_D * TILES_D)
    chunks_b = tl.cdiv(batch, ROWS)
    pid = tl.program_id(0)
    chunk_d = pid % chunks_d
    pid = pid // chunks_d
    block = pid % (prompt_blocks + chunks_s)
    pid = pid // (prompt_blocks + chunks_s)
    chunk_b = pid % chunks_b
    group = (pid // chunks_b).to(tl.int64)
    part = group * chunks_b + chunk_b
    task = 0
    begin = 0
    end = batch
    if tables[1] is not None:
        task = tl.load(tables[1] + group * 3)
        begin = tl.load(tables[1] + group * 3 + 1)
        end = tl.load(tables[1] + group * 3 + 2)
        if task >= num_tasks:
            return
    first = begin + chunk_b * ROWS
    last = tl.minimum(first + ROWS, end)
    own = tl.cast(task, tl.int64)
    first_d = chunk_d * TILES_D * BLOCK_D

    if sum_p is not None:
        if block < prompt_blocks:
            rows = Rows(tables[0], None, None, length, num_tasks)
            places = axis(block * BLOCK_S, m, BLOCK_S)
            for tile_d in range(TILES_D):
                d = axis(first_d + tile_d * BLOCK_D, hidden_size, BLOCK_D)
                summed = _sum_over_rows(grad, rows, first, last, places, d)
                store(_part_of(sum_p, own, part, hidden_size), summed, places, d)
    if sum_a is not None:
        if block >= prompt_blocks:
            chunk_s = block - prompt_blocks
            _text_sums(
                (grad[0] + tl.cast(m, tl.int64) * grad[2], grad[1], grad[2], grad[3]),
                Rows(tables[0], tables[2], tables[3], length, num_tasks),
                first,
                last,
                matrix(offset_a, own),
                matrix(offset_b, own),
                _part_of(sum_a, own, part * chunks_d + chunk_d, rank),
                _part_of(sum_b, own, part * chunks_s + chunk_s, hidden_size),
                scaling,
                chunk_s * TILES * BLOCK_S,
                first_d,
                hidden_size,
                rank,
                TILES,
                TILES_D,
                BLOCK_S,
                BLOCK_D,
                BLOCK_R,
                TERMS_G,
                TERMS,
                ORDER,
            )


@triton.jit
def _text_sums(
    grad,
    rows,
    first,
    last,
    a,
    b,
    sum_a,
    sum_b,
    scaling,
    first_s,
    first_d,
    hidden_size,
    rank,
    TILES: tl.constexpr,
    TILES_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TERMS_G: tl.constexpr,
    TERMS: tl.constexpr,
    ORDER: tl.constexpr,
):
    """One program's part of dA and dB."""
    r = axis(0, rank, BLOCK_R)
    end_s = tl.minimum(first_s + TILES * BLOCK_S, rows.length)
    for tile_d in range(TILES_D):
        if TILES_D > 1:
            tl.debug_barrier()  # its threads may read what others of them have written
        d = axis(first_d + tile_d * BLOCK_D, hidden_size, BLOCK_D)
        d_b = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        for start_s in range(first_s, end_s, BLOCK_S):
            s = axis(start_s, rows.length, BLOCK_S)
            summed = _sum_over_rows(grad, rows, first, last, s, d)
            d_a = scaling * dot_split(summed, load(transposed(b), d, r), TERMS_G, TERMS, ORDER)
            if TILES_D > 1:
                # What this very program has written for the blocks of channels before.
                before = inside(s, r) & (tile_d > 0)
                d_a += tl.load(pointers(sum_a, s, r), mask=before, other=0.0).to(tl.float32)
            store(sum_a, d_a, s, r)
            d_b += dot_split(load(transposed(a), r, s), summed, TERMS, TERMS_G, ORDER)
        store(sum_b, d_b * scaling, r, d)
