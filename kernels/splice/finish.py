"""The splice's backward, second launch: the parts of each gradient, added in order.

What the first launch has written whole needs it only for zeros: of tasks without rows, and of the
offset's positions past the text.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ept_fast.kernels.tiles import axis

__all__ = ["splice_finish_kernel"]


@triton.jit
def _add_parts(of, task, group, made, parts, block, BLOCK: tl.constexpr):
    """One block of a task's gradient: its parts in order, and zero past the ``made`` elements.

    ``parts`` is 0 if those have been written in their place already.
    """
    offs = axis(block * BLOCK, of[2], BLOCK).offs
    summed = tl.zeros((BLOCK,), tl.float32)
    part_ptrs = of[1] + group.to(tl.int64) * parts * made + offs
    for _ in range(parts):
        summed += tl.load(part_ptrs, mask=offs < made, other=0.0)
        part_ptrs += tl.cast(made, tl.int64)
    first = tl.where(parts > 0, 0, made)
    tl.store(
        of[0] + task.to(tl.int64) * of[2] + offs,
        summed.to(of[0].dtype.element_ty),
        mask=(offs >= first) & (offs < of[2]),
    )


@triton.jit
def _group_of_task(slots_ptr, task, batch, BLOCK_B: tl.constexpr):
    """In groups by slot: the group of a task, and whether it has rows."""
    group, number = 0, 0
    for start in range(0, batch, BLOCK_B):
        b = axis(start, batch, BLOCK_B)
        tasks = tl.load(slots_ptr + b.offs * 3 + 1, mask=b.mask, other=0)
        group += tl.sum((b.mask & (tasks < task)).to(tl.int32))
        number += tl.sum((b.mask & (tasks == task)).to(tl.int32))
    return group, number > 0


_NUMBERS = ["batch", "made_p", "made_a", "made_b", "parts_p", "parts_a", "parts_b"]


@triton.jit(do_not_specialize=_NUMBERS)
def splice_finish_kernel(
    d_p,  # the gradient, its parts, and elements of a task; None if there is nothing to do
    d_a,
    d_b,
    slots_ptr,  # of the plan, if groups go by slot
    batch,
    made_p,
    made_a,
    made_b,
    parts_p,
    parts_a,
    parts_b,
    BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    blocks_p, blocks_a, blocks_b = 0, 0, 0
    if d_p is not None:
        blocks_p = tl.cdiv(d_p[2], BLOCK)
    if d_a is not None:
        blocks_a = tl.cdiv(d_a[2], BLOCK)
        blocks_b = tl.cdiv(d_b[2], BLOCK)
    blocks = blocks_p + blocks_a + blocks_b
    pid = tl.program_id(0)
    block = pid % blocks
    task = pid // blocks
    group = task
    there = batch > 0
    if slots_ptr is not None:
        group, there = _group_of_task(slots_ptr, task, batch, BLOCK_B)
    if d_p is not None:
        if block < blocks_p:
            _add_parts(d_p, task, group, tl.where(there, made_p, 0), parts_p, block, BLOCK)
    if d_a is not None:
        block -= blocks_p
        if (block >= 0) & (block < blocks_a):
            _add_parts(d_a, task, group, tl.where(there, made_a, 0), parts_a, block, BLOCK)
        block -= blocks_a
        if block >= 0:
            _add_parts(d_b, task, group, tl.where(there, made_b, 0), parts_b, block, BLOCK)
