"""The splice's backward, second launch: the parts of each gradient, added in order.

What the first launch has written whole needs it only for zeros: of tasks without rows, and of the
offset's positions past the text.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["splice_finish_kernel"]


@triton.jit
def _add_parts(
    out_ptr, part_ptr, task, group, there, size, covered, parts, block, BLOCK: tl.constexpr
):
    """One block of a task's gradient: its parts in order, and zero if none were made.

    ``parts`` is 0 if the gradient itself has been written already, for ``covered`` elements.
    """
    offs = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    summed = tl.zeros((BLOCK,), tl.float32)
    made = tl.where(there, covered, 0)  # elements that have parts, or are written
    part_ptrs = part_ptr + group.to(tl.int64) * parts * covered + offs
    for _ in range(parts):
        summed += tl.load(part_ptrs, mask=offs < made, other=0.0)
        part_ptrs += tl.cast(covered, tl.int64)
    first = tl.where(parts > 0, 0, made)
    tl.store(
        out_ptr + task.to(tl.int64) * size + offs,
        summed.to(out_ptr.dtype.element_ty),
        mask=(offs >= first) & (offs < size),
    )


@triton.jit
def _group_of_task(plan_ptr, task, batch, BLOCK_B: tl.constexpr):
    """In groups by row: the group of a task, and whether it has rows."""
    group = 0
    number = 0
    for start in range(0, batch, BLOCK_B):
        offs_b = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        there = offs_b < batch
        tasks = tl.load(plan_ptr + (tl.cast(batch, tl.int64) + offs_b), mask=there, other=0)
        group += tl.sum((there & (tasks < task)).to(tl.int32))
        number += tl.sum((there & (tasks == task)).to(tl.int32))
    return group, number > 0


@triton.jit(
    do_not_specialize=[
        "batch",
        "size_p",
        "size_a",
        "covered_a",
        "size_b",
        "covered_b",
        "parts_p",
        "parts_a",
        "parts_b",
    ]
)
def splice_finish_kernel(
    d_prompt_ptr,
    d_a_ptr,
    d_b_ptr,
    part_p_ptr,
    part_a_ptr,
    part_b_ptr,
    plan_ptr,
    batch,
    size_p,
    size_a,
    covered_a,
    size_b,
    covered_b,
    parts_p,
    parts_a,
    parts_b,
    HAS_PROMPT: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BY_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    blocks_p = 0
    if HAS_PROMPT:
        blocks_p = tl.cdiv(size_p, BLOCK)
    blocks_a = 0
    blocks_b = 0
    if HAS_OFFSET:
        blocks_a = tl.cdiv(size_a, BLOCK)
        blocks_b = tl.cdiv(size_b, BLOCK)
    blocks = blocks_p + blocks_a + blocks_b
    pid = tl.program_id(0)
    block = pid % blocks
    task = pid // blocks
    group = task
    there = batch > 0
    if BY_ROW:
        group, there = _group_of_task(plan_ptr, task, batch, BLOCK_B)
    if HAS_PROMPT:
        if block < blocks_p:
            _add_parts(
                d_prompt_ptr, part_p_ptr, task, group, there, size_p, size_p, parts_p, block, BLOCK
            )
    if HAS_OFFSET:
        block -= blocks_p
        if (block >= 0) & (block < blocks_a):
            _add_parts(
                d_a_ptr, part_a_ptr, task, group, there, size_a, covered_a, parts_a, block, BLOCK
            )
        block -= blocks_a
        if block >= 0:
            _add_parts(
                d_b_ptr, part_b_ptr, task, group, there, size_b, covered_b, parts_b, block, BLOCK
            )
