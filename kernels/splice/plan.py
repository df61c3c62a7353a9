"""Where the rows' real tokens lie and which rows have which task: one launch, before the others.

It writes tables of int32, and if asked, from a mask, that of prompt and text and their positions:

    slots [B, 3]     the rows in the order of their tasks; of each place in it, a slot: the row, its
                     task (T if the bank does not have it), and the end of the task's slots
    groups [G, 3]    of each group of rows with one task: the task, its first slot, and their end
    spans [B, 3]     of each row: the column of its first real token, how many it has, and whether
                     padding stands between them
    columns [B, S]   of a row with such padding: the column of each position, real tokens first

Groups go by task (G = T), or in a bank with more tasks than the batch has rows by slot (G = B):
there the group of a slot that is not its task's first is of task T, as is that of a row without a
task. Without task ids the first two are absent, without a mask the others.

A program owns a row, its threads share the columns. It reads the row's mask once, and once more if
there are holes.
"""

import triton
import triton.language as tl

from ept_fast.kernels.tiles import Axis, axis


@triton.jit
def _write(table_ptr, place, x, y, z):
    """A row of a table."""
    place = tl.cast(place, tl.int64) * 3
    tl.store(table_ptr + place, x)
    tl.store(table_ptr + (place + 1), y)
    tl.store(table_ptr + (place + 2), z)


@triton.jit
def read(table_ptr, place):
    """A row of a table."""
    place = tl.cast(place, tl.int64) * 3
    y = tl.load(table_ptr + (place + 1))
    return tl.load(table_ptr + place), y, tl.load(table_ptr + (place + 2))


@triton.jit
def _tasks_at(task_ids, b, num_tasks):
    """The task of each row: T if the bank does not have it, T + 1 past the last row."""
    tasks = tl.load(task_ids[0] + b.offs * task_ids[1], mask=b.mask, other=0)
    known = (tasks >= 0) & (tasks < num_tasks)
    return tl.where(b.mask, tl.where(known, tasks, num_tasks), num_tasks + 1).to(tl.int32)


@triton.jit
def _mask_at(mask, row, start, length, BLOCK_S: tl.constexpr):
    """Columns of a row and its mask there: 1 before the text."""
    offs_s = start + tl.arange(0, BLOCK_S)
    ptrs = mask[0] + row * mask[1] + offs_s.to(tl.int64) * mask[2]
    value = tl.load(ptrs, mask=(offs_s >= 0) & (offs_s < length), other=0)
    return offs_s, tl.where(offs_s < 0, 1, value)


@triton.jit(do_not_specialize=["batch", "m", "length", "num_tasks"])
def splice_plan_kernel(
    tables,
    places,  # mask and positions of prompt and text [B, m + S], or None
    mask,  # [B, S]
    task_ids,  # [B]
    batch,
    m,
    length,
    num_tasks,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """A row's slot, span and places, and a group."""
    program = tl.program_id(0)
    if tables[0] is not None:  # the slot of one row and the slots of one group, by counting
        by_slot = num_tasks > batch
        own = tl.max(_tasks_at(task_ids, axis(program, batch, 1), num_tasks))
        wanted = tl.where(by_slot, own, program)
        less, same, before, group_less, group_same = 0, 0, 0, 0, 0
        for start in range(0, batch, BLOCK_B):
            b = axis(start, batch, BLOCK_B)
            tasks = _tasks_at(task_ids, b, num_tasks)
            less += tl.sum((tasks < own).to(tl.int32))
            same += tl.sum((tasks == own).to(tl.int32))
            before += tl.sum(((tasks == own) & (b.offs < program)).to(tl.int32))
            group_less += tl.sum((tasks < wanted).to(tl.int32))
            group_same += tl.sum((tasks == wanted).to(tl.int32))
        slot = less + before
        _write(tables[0], slot, program, own, less + same)
        if program < num_tasks:
            group = tl.where(by_slot, slot, program)
            task = tl.where(by_slot & (before > 0), num_tasks, wanted)
            _write(tables[1], group, task, group_less, group_less + group_same)
    if mask is not None:
        row = program.to(tl.int64)
        begin = 0 if places is None else -m
        first, last, seen = length, 0, 0
        for start in range(begin, length, BLOCK_S):
            offs_s, value = _mask_at(mask, row, start, length, BLOCK_S)
            real = value != 0
            if places is not None:
                at = row * (m + length) + (m + offs_s)
                tl.store(places[0] + at, value, mask=offs_s < length)
                number = seen + tl.cumsum(real.to(tl.int32), 0)
                tl.store(places[1] + at, number - 1, mask=offs_s < length)
            seen += tl.sum(real.to(tl.int32))
            first = tl.minimum(first, tl.min(tl.where(real & (offs_s >= 0), offs_s, length)))
            last = tl.maximum(last, tl.max(tl.where(real, offs_s + 1, 0)))
        if tables[2] is not None:
            first, total = tl.minimum(first, last), seen + begin
            holes = last - first != total
            _write(tables[2], row, first, total, holes.to(tl.int32))
            if holes:
                seen = 0
                for start in range(0, length, BLOCK_S):
                    offs_s, value = _mask_at(mask, row, start, length, BLOCK_S)
                    real = value != 0
                    number = seen + tl.cumsum(real.to(tl.int32), 0)
                    position = tl.where(real, number - 1, total + offs_s - number)
                    ptrs = tables[3] + row * length + position.to(tl.int64)
                    tl.store(ptrs, offs_s, mask=offs_s < length)
                    seen += tl.sum(real.to(tl.int32))


@triton.jit
def row_at(tables, slot):
    """The row of the batch at a slot."""
    row = tl.cast(slot, tl.int64)
    if tables[0] is not None:
        row = tl.load(tables[0] + row * 3).to(tl.int64)
    return row


@triton.jit
def columns_of(tables, length, row, s):
    """The columns of positions of one row; the mask says which are real tokens.

    Positions past a row's tokens stand for its padding: first that before its tokens, then that
    behind them, which lies where it lies.
    """
    columns = s.offs
    real = s.mask
    if tables[2] is not None:
        first, total, holes = read(tables[2], row)
        offs = s.offs.to(tl.int32)
        padding = offs - total
        real = s.mask & (padding < 0)
        columns = tl.where(padding < first, padding, offs)
        columns = tl.where(padding < 0, offs + first, columns)
        # Nothing is read for a row without holes. The mask is made of a tile, since the
        # interpreter of Triton 3.9 takes no scalar comparison.
        has_holes = tl.full(s.mask.shape, holes, tl.int32) != 0
        ptrs = tables[3] + (row * length + s.offs)
        columns = tl.load(ptrs, mask=s.mask & has_holes, other=columns).to(tl.int64)
    return Axis(columns, real)
