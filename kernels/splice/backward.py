"""The splice's backward: the sums over rows, and their finish.

A program owns a block of channels and some blocks of positions, for some rows of one task. It adds
up the gradient of a tile over the rows, each element read once from the column that its position
lies in, and multiplies the sum into its part of dA and dB; prompt blocks write theirs of dP'. A
second launch, the finish, adds the parts in order. What the first has written whole needs it only
for zeros: of tasks without rows, and of the offset's positions past the text.
"""

import triton
import triton.language as tl

from ept_fast.kernels import tiles
from ept_fast.kernels.splice.plan import columns_of, read, row_at
from ept_fast.kernels.tiles import axis, dot_split, load, matrix, pointers, store, transposed


@triton.jit
def _part_of(sums, stride_part, task, part, columns):
    """Where a part goes: of the task's gradient itself, or among the parts."""
    ptr = sums[0] + task * sums[1]
    if stride_part is not None:
        ptr = sums[0] + part * stride_part
    return tiles.Matrix(ptr, tl.cast(columns, tl.int64), 1)


@triton.jit
def _sum_over_rows(grad, tables, length, first, last, places, d):
    """A tile of the gradient of real tokens, added up over the rows of slots [first, last)."""
    summed = tl.zeros((places.offs.shape[0], d.offs.shape[0]), tl.float32)
    for slot in tl.range(first, last, disable_licm=True):
        row = row_at(tables, slot)
        summed += load(matrix(grad, row), columns_of(tables, length, row, places), d)
    return summed


@triton.jit(do_not_specialize=["batch", "length", "num_tasks"])
def splice_backward_kernel(
    grad,  # [B, m + S, d]
    sums,  # of P', A and B: where they go, stride of the task; None if not needed
    strides,  # of their parts; None if there are none
    offset,  # A [T, n, r] and B [T, r, d], or None
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
    """The sums over some rows of a task, for some blocks of positions and channels."""
    m, hidden_size, rank = sizes
    prompt_blocks, chunks_s = 0, 0
    if sums[0] is not None:
        prompt_blocks = tl.cdiv(m, BLOCK_S)
    if sums[1] is not None:
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
    task, begin, end = 0, 0, batch
    if tables[1] is not None:
        task, begin, end = read(tables[1], group)
        if task >= num_tasks:
            return
    task = tl.cast(task, tl.int64)
    first = begin + chunk_b * ROWS
    last = tl.minimum(first + ROWS, end)
    first_d = chunk_d * TILES_D * BLOCK_D

    if sums[0] is not None:
        if block < prompt_blocks:
            no_mask = (tables[0], None, None, None)
            places = axis(block * BLOCK_S, m, BLOCK_S)
            for tile_d in range(TILES_D):
                d = axis(first_d + tile_d * BLOCK_D, hidden_size, BLOCK_D)
                summed = _sum_over_rows(grad, no_mask, length, first, last, places, d)
                store(_part_of(sums[0], strides[0], task, part, hidden_size), summed, places, d)
    if sums[1] is not None:
        if block >= prompt_blocks:
            behind = (grad[0] + tl.cast(m, tl.int64) * grad[2], grad[1], grad[2], grad[3])
            chunk_s = block - prompt_blocks
            part_a, part_b = part * chunks_d + chunk_d, part * chunks_s + chunk_s
            sum_a = _part_of(sums[1], strides[1], task, part_a, rank)
            sum_b = _part_of(sums[2], strides[2], task, part_b, hidden_size)
            a, b = transposed(matrix(offset[0], task)), transposed(matrix(offset[1], task))
            r = axis(0, rank, BLOCK_R)
            first_s = chunk_s * TILES * BLOCK_S
            end_s = tl.minimum(first_s + TILES * BLOCK_S, length)
            for tile_d in range(TILES_D):
                if TILES_D > 1:
                    tl.debug_barrier()  # its threads may read what others of them have written
                d = axis(first_d + tile_d * BLOCK_D, hidden_size, BLOCK_D)
                d_b = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
                for start_s in range(first_s, end_s, BLOCK_S):
                    s = axis(start_s, length, BLOCK_S)
                    summed = _sum_over_rows(behind, tables, length, first, last, s, d)
                    d_a = scaling * dot_split(summed, load(b, d, r), TERMS_G, TERMS, ORDER)
                    if TILES_D > 1:
                        # What this very program has written for the blocks of channels before.
                        before = tiles.inside(s, r) & (tile_d > 0)
                        d_a += tl.load(pointers(sum_a, s, r), before, 0.0).to(tl.float32)
                    store(sum_a, d_a, s, r)
                    d_b += dot_split(load(a, r, s), summed, TERMS, TERMS_G, ORDER)
                store(sum_b, d_b * scaling, r, d)


_NUMBERS = ["batch", "size_p", "size_a", "size_b", "made_p", "made_a", "made_b"]


@triton.jit(do_not_specialize=[*_NUMBERS, "parts_p", "parts_a", "parts_b"])
def splice_finish_kernel(
    ends,  # of P', A and B: the gradient and its parts; None if there is nothing to do
    slots_ptr,  # of the plan, if groups go by slot
    batch,
    size_p,  # elements of a task
    size_a,
    size_b,
    made_p,  # those of them that are summed
    made_a,
    made_b,
    parts_p,  # of a group's sums; 0 if they have been written where they belong
    parts_a,
    parts_b,
    BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """One block of a task's gradient: its parts in order, and zeros past what is summed."""
    sizes, made = (size_p, size_a, size_b), (made_p, made_a, made_b)
    parts = (parts_p, parts_a, parts_b)
    blocks = 0
    for i in tl.static_range(3):
        if ends[i] is not None:
            blocks += tl.cdiv(sizes[i], BLOCK)
    pid = tl.program_id(0)
    block = pid % blocks
    task = pid // blocks
    group, number = task, batch  # rows of the task; or any number that is not 0
    if slots_ptr is not None:
        group, number = 0, 0
        for start in range(0, batch, BLOCK_B):
            b = axis(start, batch, BLOCK_B)
            tasks = tl.load(slots_ptr + (b.offs * 3 + 1), mask=b.mask, other=0)
            group += tl.sum((b.mask & (tasks < task)).to(tl.int32))
            number += tl.sum((b.mask & (tasks == task)).to(tl.int32))
    for i in tl.static_range(3):
        if ends[i] is not None:
            if (block >= 0) & (block < tl.cdiv(sizes[i], BLOCK)):
                offs = axis(block * BLOCK, sizes[i], BLOCK).offs
                end = tl.where(number > 0, made[i], 0)  # zeros from there on
                summed = tl.zeros((BLOCK,), tl.float32)
                part_ptrs = ends[i][1] + tl.cast(group, tl.int64) * parts[i] * end + offs
                for _ in range(parts[i]):
                    summed += tl.load(part_ptrs, mask=offs < end, other=0.0)
                    part_ptrs += tl.cast(end, tl.int64)
                first = tl.where(parts[i] > 0, 0, end)  # before it, what is written already
                todo = (offs >= first) & (offs < sizes[i])
                ptrs = ends[i][0] + task.to(tl.int64) * sizes[i] + offs
                tl.store(ptrs, summed.to(ends[i][0].dtype.element_ty), mask=todo)
            block -= tl.cdiv(sizes[i], BLOCK)
