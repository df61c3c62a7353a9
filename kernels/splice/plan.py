"""Where the rows' real tokens lie and which rows have which task: one launch, before the others.

The plan is a table of int32, one array behind the other:

    row    [B]   the rows of the batch, sorted by task; ``slot`` is a place in this order
    task   [B]   of each slot; T for a row whose task id the bank does not have
    begin  [G]   first slot of each group of rows with one task
    end    [G]   slot behind its last
    first  [B]   of each row: the column of its first real token
    total  [B]   how many real tokens it has
    holes  [B]   whether padding stands between them

and, for rows with holes, ``columns [B, S]``: the column of each position, real tokens first.
Groups go by task (G = T + 1), or in a bank with more tasks than the batch has rows by slot (G = B).
Without task ids the first four are absent, without a mask the others.

A program owns a row, its threads share the columns. It reads the row's mask once, and once more if
there are holes.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["row_of_slot", "run_of_slot", "splice_plan_kernel", "text_columns"]


@triton.jit
def _tasks_at(task_ids_ptr, stride_task_ids, offs_b, batch, num_tasks):
    """The task of each row: T if the bank does not have it, T + 1 past the last row."""
    there = offs_b < batch
    tasks = tl.load(task_ids_ptr + offs_b * stride_task_ids, mask=there, other=0)
    known = (tasks >= 0) & (tasks < num_tasks)
    return tl.where(there, tl.where(known, tasks, num_tasks), num_tasks + 1).to(tl.int32)


@triton.jit
def _sort_by_task(
    plan_ptr,
    task_ids_ptr,
    stride_task_ids,
    program,
    batch,
    num_tasks,
    BY_ROW: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Find the slot of one row, and the range of one group, by counting."""
    row = program.to(tl.int64) + tl.arange(0, 1)
    own = tl.max(_tasks_at(task_ids_ptr, stride_task_ids, row, batch, num_tasks))
    less = 0
    same = 0
    before = 0
    group_less = 0
    group_same = 0
    for start in range(0, batch, BLOCK_B):
        offs_b = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        tasks = _tasks_at(task_ids_ptr, stride_task_ids, offs_b, batch, num_tasks)
        less += tl.sum((tasks < own).to(tl.int32))
        same += tl.sum((tasks == own).to(tl.int32))
        before += tl.sum(((tasks == own) & (offs_b < program)).to(tl.int32))
        if BY_ROW == 0:
            group_less += tl.sum((tasks < program).to(tl.int32))
            group_same += tl.sum((tasks == program).to(tl.int32))
    slot = tl.cast(less + before, tl.int64)
    rows = tl.cast(batch, tl.int64)
    if program < batch:
        tl.store(plan_ptr + slot, program)
        tl.store(plan_ptr + (rows + slot), own)
        if BY_ROW:
            tl.store(plan_ptr + (2 * rows + slot), less)
            tl.store(plan_ptr + (3 * rows + slot), less + same)
    if BY_ROW == 0:
        if program <= num_tasks:
            group = tl.cast(program, tl.int64)
            groups = tl.cast(num_tasks, tl.int64) + 1
            tl.store(plan_ptr + (2 * rows + group), group_less)
            tl.store(plan_ptr + (2 * rows + groups + group), group_less + group_same)


@triton.jit
def _past_tasks(batch, num_tasks, HAS_TASKS: tl.constexpr, BY_ROW: tl.constexpr):
    """Where the arrays of the mask begin: behind the four of the tasks, if these are there."""
    past = tl.cast(batch, tl.int64) * 0
    if HAS_TASKS:
        rows = tl.cast(batch, tl.int64)
        groups = rows if BY_ROW else tl.cast(num_tasks, tl.int64) + 1
        past = 2 * (rows + groups)
    return past


@triton.jit
def _columns_of_positions(
    columns_ptr, mask_ptr, stride_mask_s, length, total, BLOCK_S: tl.constexpr
):
    """Write the column of each position of one row: its real tokens in order, then its padding."""
    seen = 0
    for start in range(0, length, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        inside = offs_s < length
        real = tl.load(mask_ptr + offs_s.to(tl.int64) * stride_mask_s, mask=inside, other=0) != 0
        number = seen + tl.cumsum(real.to(tl.int32), 0)
        position = tl.where(real, number - 1, total + offs_s - number)
        tl.store(columns_ptr + position.to(tl.int64), offs_s, mask=inside)
        seen += tl.sum(real.to(tl.int32))


@triton.jit(do_not_specialize=["batch", "length", "num_tasks"])
def splice_plan_kernel(
    plan_ptr,
    columns_ptr,
    mask_ptr,
    task_ids_ptr,
    batch,
    length,
    num_tasks,
    stride_mask_b,
    stride_mask_s,
    stride_task_ids,
    HAS_MASK: tl.constexpr,
    HAS_TASKS: tl.constexpr,
    BY_ROW: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    program = tl.program_id(0)
    if HAS_TASKS:
        _sort_by_task(
            plan_ptr, task_ids_ptr, stride_task_ids, program, batch, num_tasks, BY_ROW, BLOCK_B
        )
    if HAS_MASK:
        if program < batch:
            row = program.to(tl.int64)
            rows = tl.cast(batch, tl.int64)
            plan_ptr += _past_tasks(batch, num_tasks, HAS_TASKS, BY_ROW) + row
            mask_ptr += row * stride_mask_b
            first = length
            last = 0
            total = 0
            for start in range(0, length, BLOCK_S):
                offs_s = start + tl.arange(0, BLOCK_S)
                ptrs = mask_ptr + offs_s.to(tl.int64) * stride_mask_s
                real = tl.load(ptrs, mask=offs_s < length, other=0) != 0
                total += tl.sum(real.to(tl.int32))
                first = tl.minimum(first, tl.min(tl.where(real, offs_s, length)))
                last = tl.maximum(last, tl.max(tl.where(real, offs_s + 1, 0)))
            first = tl.minimum(first, last)
            holes = last - first != total
            tl.store(plan_ptr, first)
            tl.store(plan_ptr + rows, total)
            tl.store(plan_ptr + 2 * rows, holes.to(tl.int32))
            if holes:
                _columns_of_positions(
                    columns_ptr + row * length, mask_ptr, stride_mask_s, length, total, BLOCK_S
                )


@triton.jit
def row_of_slot(plan_ptr, slot, HAS_TASKS: tl.constexpr):
    """The row of the batch at a place in the order by task."""
    row = tl.cast(slot, tl.int64)
    if HAS_TASKS:
        row = tl.load(plan_ptr + row).to(tl.int64)
    return row


@triton.jit
def run_of_slot(
    plan_ptr, slot, last, batch, num_tasks, HAS_TASKS: tl.constexpr, BY_ROW: tl.constexpr
):
    """The task of a slot (T: none of the bank's) and the end of its run, at most ``last``."""
    task = 0
    end = last
    if HAS_TASKS:
        rows = tl.cast(batch, tl.int64)
        task = tl.load(plan_ptr + (rows + slot))
        if BY_ROW:
            end = tl.load(plan_ptr + (3 * rows + slot))
        else:
            end = tl.load(plan_ptr + (2 * rows + num_tasks + 1 + task))
        end = tl.minimum(end, last)
    return task, end


@triton.jit
def text_columns(
    plan_ptr,
    columns_ptr,
    row,
    offs_s,
    mask_s,
    batch,
    length,
    num_tasks,
    HAS_MASK: tl.constexpr,
    HAS_TASKS: tl.constexpr,
    BY_ROW: tl.constexpr,
):
    """Of positions of one row: their columns, and whether they are real tokens.

    Positions past a row's tokens stand for its padding: first that before its tokens, then that
    behind them, which lies where it lies.
    """
    columns = offs_s
    real = mask_s
    if HAS_MASK:
        rows = tl.cast(batch, tl.int64)
        plan_ptr += _past_tasks(batch, num_tasks, HAS_TASKS, BY_ROW) + row
        first = tl.load(plan_ptr)
        total = tl.load(plan_ptr + rows)
        holes = tl.load(plan_ptr + 2 * rows)
        padding = offs_s - total
        real = padding < 0
        columns = tl.where(real, offs_s + first, offs_s)
        columns = tl.where((padding >= 0) & (padding < first), padding, columns)
        # Nothing is read for a row without holes. The mask is made of a tile, since the
        # interpreter of Triton 3.9 takes no scalar comparison.
        has_holes = tl.full(mask_s.shape, holes, tl.int32) != 0
        ptrs = columns_ptr + (row * length + offs_s.to(tl.int64))
        columns = tl.load(ptrs, mask=mask_s & has_holes, other=columns)
    return columns.to(tl.int64), real
