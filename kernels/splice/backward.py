"""The splice's backward, first launch: sums of the gradient over rows, and their products.

A program owns a block of channels and some blocks of positions, for some rows of one task. It adds
up the gradient of a tile over the rows, each element read once from the column that its position
lies in, and multiplies the sum into its part of dA and dB; prompt blocks write theirs of dP'. The
second launch (:mod:`.finish`) adds the parts in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ept_fast.kernels.splice.plan import row_of_slot, text_columns
from ept_fast.kernels.tiles import dot_split

__all__ = ["splice_backward_kernel"]


@triton.jit
def _group(
    plan_ptr, group, first, last, batch, num_tasks, HAS_TASKS: tl.constexpr, BY_ROW: tl.constexpr
):
    """The task of a group of rows, and [first, last) of its slots; no slots if it is none.

    ``first`` and ``last`` count from the group's first slot.
    """
    task = 0
    begin = 0
    end = batch
    if HAS_TASKS:
        task = group
        rows = tl.cast(batch, tl.int64)
        groups = tl.cast(num_tasks, tl.int64) + 1
        if BY_ROW:
            task = tl.load(plan_ptr + (rows + group))
            groups = rows
        begin = tl.load(plan_ptr + (2 * rows + group))
        end = tl.load(plan_ptr + (2 * rows + groups + group))
        if BY_ROW:  # by the first of the task's slots
            end = tl.where((begin == group) & (task < num_tasks), end, begin)
    return task, begin + first, tl.minimum(begin + last, end)


@triton.jit(do_not_specialize=["batch", "length", "num_tasks"])
def splice_backward_kernel(
    grad_ptr,
    part_p_ptr,
    part_a_ptr,
    part_b_ptr,
    offset_a_ptr,
    offset_b_ptr,
    plan_ptr,
    columns_ptr,
    scaling,
    batch,
    length,
    num_tasks,
    num_virtual_tokens,
    hidden_size,
    rank,
    stride_grad_b,
    stride_grad_s,
    stride_grad_d,
    stride_part_p,
    stride_part_a,
    stride_part_b,
    stride_a_t,
    stride_a_n,
    stride_a_r,
    stride_b_t,
    stride_b_r,
    stride_b_d,
    HAS_PROMPT: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_TASKS: tl.constexpr,
    BY_ROW: tl.constexpr,
    WHOLE_P: tl.constexpr,
    WHOLE_A: tl.constexpr,
    WHOLE_B: tl.constexpr,
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
    prompt_blocks = 0
    if HAS_PROMPT:
        prompt_blocks = tl.cdiv(num_virtual_tokens, BLOCK_S)
    chunks_s = 0
    if HAS_OFFSET:
        chunks_s = tl.cdiv(length, BLOCK_S * TILES)
    chunks_d = tl.cdiv(hidden_size, BLOCK_D * TILES_D)
    chunks_b = tl.cdiv(batch, ROWS)
    pid = tl.program_id(0)
    chunk_d = pid % chunks_d
    pid = pid // chunks_d
    block = pid % (prompt_blocks + chunks_s)
    pid = pid // (prompt_blocks + chunks_s)
    chunk_b = pid % chunks_b
    group = pid // chunks_b
    part = group.to(tl.int64) * chunks_b + chunk_b
    task, first, last = _group(
        plan_ptr,
        group,
        chunk_b * ROWS,
        chunk_b * ROWS + ROWS,
        batch,
        num_tasks,
        HAS_TASKS,
        BY_ROW,
    )
    if BY_ROW:
        if first >= last:
            return
    own = tl.cast(task, tl.int64)

    if HAS_PROMPT:
        if block < prompt_blocks:
            offs_m = (block * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)
            slot_p = part
            if WHOLE_P:
                slot_p = own
            part_p_ptr += slot_p * stride_part_p
            for tile_d in range(TILES_D):
                offs_d = ((chunk_d * TILES_D + tile_d) * BLOCK_D + tl.arange(0, BLOCK_D)).to(
                    tl.int64
                )
                mask = (offs_m < num_virtual_tokens)[:, None] & (offs_d < hidden_size)[None, :]
                grad_ptrs = (
                    grad_ptr + offs_m[:, None] * stride_grad_s + offs_d[None, :] * stride_grad_d
                )
                summed = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
                for slot in tl.range(first, last, disable_licm=True):
                    row = row_of_slot(plan_ptr, slot, HAS_TASKS)
                    grad = tl.load(grad_ptrs + row * stride_grad_b, mask=mask, other=0.0)
                    summed += grad.to(tl.float32)
                tl.store(
                    part_p_ptr + offs_m[:, None] * hidden_size + offs_d[None, :],
                    summed.to(part_p_ptr.dtype.element_ty),
                    mask=mask,
                )
    if HAS_OFFSET:
        if block >= prompt_blocks:
            chunk_s = block - prompt_blocks
            slot_a = part * chunks_d + chunk_d
            if WHOLE_A:
                slot_a = own
            slot_b = part * chunks_s + chunk_s
            if WHOLE_B:
                slot_b = own
            _text_sums(
                grad_ptr + tl.cast(num_virtual_tokens, tl.int64) * stride_grad_s,
                part_a_ptr + slot_a * stride_part_a,
                part_b_ptr + slot_b * stride_part_b,
                offset_a_ptr + own * stride_a_t,
                offset_b_ptr + own * stride_b_t,
                plan_ptr,
                columns_ptr,
                scaling,
                first,
                last,
                chunk_s * TILES * BLOCK_S,
                chunk_d * TILES_D * BLOCK_D,
                batch,
                length,
                num_tasks,
                hidden_size,
                rank,
                stride_grad_b,
                stride_grad_s,
                stride_grad_d,
                stride_a_n,
                stride_a_r,
                stride_b_r,
                stride_b_d,
                HAS_MASK,
                HAS_TASKS,
                BY_ROW,
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
def _text_grad(
    grad_ptrs,
    plan_ptr,
    columns_ptr,
    slot,
    offs_s,
    mask_s,
    mask_d,
    batch,
    length,
    num_tasks,
    stride_grad_b,
    stride_grad_s,
    HAS_MASK: tl.constexpr,
    HAS_TASKS: tl.constexpr,
    BY_ROW: tl.constexpr,
):
    """The gradient of a tile of positions and channels of the row at a slot."""
    row = row_of_slot(plan_ptr, slot, HAS_TASKS)
    columns, real = text_columns(
        plan_ptr,
        columns_ptr,
        row,
        offs_s,
        mask_s,
        batch,
        length,
        num_tasks,
        HAS_MASK,
        HAS_TASKS,
        BY_ROW,
    )
    return tl.load(
        grad_ptrs + (row * stride_grad_b + columns * stride_grad_s)[:, None],
        mask=(mask_s & real)[:, None] & mask_d[None, :],
        other=0.0,
    ).to(tl.float32)


@triton.jit
def _text_sums(
    grad_ptr,
    part_a_ptr,
    part_b_ptr,
    offset_a_ptr,
    offset_b_ptr,
    plan_ptr,
    columns_ptr,
    scaling,
    first,
    last,
    first_s,
    first_d,
    batch,
    length,
    num_tasks,
    hidden_size,
    rank,
    stride_grad_b,
    stride_grad_s,
    stride_grad_d,
    stride_a_n,
    stride_a_r,
    stride_b_r,
    stride_b_d,
    HAS_MASK: tl.constexpr,
    HAS_TASKS: tl.constexpr,
    BY_ROW: tl.constexpr,
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
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_r = offs_r < rank
    end_s = tl.minimum(first_s + TILES * BLOCK_S, length)
    for tile_d in range(TILES_D):
        if TILES_D > 1:
            tl.debug_barrier()  # its threads may read what others of them have written
        offs_d = (first_d + tile_d * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask_d = offs_d < hidden_size
        d_b = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        for start_s in range(first_s, end_s, BLOCK_S):
            offs_s = start_s + tl.arange(0, BLOCK_S)
            mask_s = offs_s < length
            summed = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
            for slot in tl.range(first, last, disable_licm=True):
                summed += _text_grad(
                    grad_ptr + offs_d[None, :] * stride_grad_d,
                    plan_ptr,
                    columns_ptr,
                    slot,
                    offs_s,
                    mask_s,
                    mask_d,
                    batch,
                    length,
                    num_tasks,
                    stride_grad_b,
                    stride_grad_s,
                    HAS_MASK,
                    HAS_TASKS,
                    BY_ROW,
                )
            offs_p = offs_s.to(tl.int64)
            mask_a = mask_s[:, None] & mask_r[None, :]
            b = tl.load(
                offset_b_ptr + offs_d[:, None] * stride_b_d + offs_r[None, :] * stride_b_r,
                mask=mask_d[:, None] & mask_r[None, :],
                other=0.0,
            ).to(tl.float32)
            d_a = scaling * dot_split(summed, b, TERMS_G, TERMS, ORDER)
            a_ptrs = part_a_ptr + offs_p[:, None] * rank + offs_r[None, :]
            if TILES_D > 1:
                # What this very program has written for the blocks of channels before.
                d_a += tl.load(a_ptrs, mask=mask_a & (tile_d > 0), other=0.0).to(tl.float32)
            tl.store(a_ptrs, d_a.to(part_a_ptr.dtype.element_ty), mask=mask_a)
            a = tl.load(
                offset_a_ptr + offs_r[:, None] * stride_a_r + offs_p[None, :] * stride_a_n,
                mask=mask_r[:, None] & mask_s[None, :],
                other=0.0,
            ).to(tl.float32)
            d_b += dot_split(a, summed, TERMS, TERMS_G, ORDER)
        tl.store(
            part_b_ptr + offs_r[:, None] * hidden_size + offs_d[None, :],
            (d_b * scaling).to(part_b_ptr.dtype.element_ty),
            mask=mask_r[:, None] & mask_d[None, :],
        )
