"""The splice's forward: a program owns a block of positions and of channels, for some slots.

Prompt blocks write P' before the text of their rows. Text blocks compute the offset of their tile
once for each run of rows with one task and add it to that tile of every row in it, wherever the
row's padding puts it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ept_fast.kernels.splice.plan import row_of_slot, run_of_slot, text_columns
from ept_fast.kernels.tiles import dot_split

__all__ = ["splice_forward_kernel"]


@triton.jit
def _offset_tile(
    a_ptrs,
    stride_a_r,
    mask_a,
    b_ptrs,
    stride_b_r,
    mask_b,
    rank,
    TILES_R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TERMS: tl.constexpr,
    ORDER: tl.constexpr,
):
    """A·B for rows of A [BLOCK_S] and columns of B [BLOCK_D]."""
    tile = tl.zeros((a_ptrs.shape[0], b_ptrs.shape[0]), tl.float32)
    for tile_r in range(TILES_R):
        offs_r = (tile_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
        mask_r = offs_r < rank
        a = tl.load(
            a_ptrs[:, None] + offs_r[None, :] * stride_a_r,
            mask=mask_a[:, None] & mask_r[None, :],
            other=0.0,
        ).to(tl.float32)
        b = tl.load(
            b_ptrs[None, :] + offs_r[:, None] * stride_b_r,
            mask=mask_r[:, None] & mask_b[None, :],
            other=0.0,
        ).to(tl.float32)
        tile += dot_split(a, b, TERMS, TERMS, ORDER)
    return tile


@triton.jit
def _write_prompt(
    out_ptr,
    prompt_ptr,
    plan_ptr,
    slot,
    last,
    offs_m,
    offs_d,
    batch,
    num_tasks,
    num_virtual_tokens,
    hidden_size,
    stride_out_b,
    stride_t,
    stride_m,
    stride_d,
    HAS_TASKS: tl.constexpr,
    BY_ROW: tl.constexpr,
):
    """P' before the text of the rows of slots [slot, last)."""
    mask = (offs_m < num_virtual_tokens)[:, None] & (offs_d < hidden_size)[None, :]
    prompt_ptrs = prompt_ptr + offs_m[:, None] * stride_m + offs_d[None, :] * stride_d
    out_ptrs = out_ptr + offs_m[:, None] * hidden_size + offs_d[None, :]
    while slot < last:
        task, end = run_of_slot(plan_ptr, slot, last, batch, num_tasks, HAS_TASKS, BY_ROW)
        known = mask
        if HAS_TASKS:
            known = mask & (tl.full(mask.shape, task, tl.int32) < num_tasks)
        own = tl.cast(task, tl.int64)
        prompt = tl.load(prompt_ptrs + own * stride_t, mask=known, other=float("nan"))
        prompt = prompt.to(tl.float32).to(out_ptr.dtype.element_ty)
        for each in range(slot, end):
            row = row_of_slot(plan_ptr, each, HAS_TASKS)
            tl.store(out_ptrs + row * stride_out_b, prompt, mask=mask)
        slot = end


@triton.jit
def _write_text(
    out_ptr,
    input_ids_ptr,
    source_ptr,
    plan_ptr,
    columns_ptr,
    tile,
    slot,
    last,
    offs_s,
    offs_d,
    known_s,
    mask_s,
    mask_d,
    batch,
    length,
    num_tasks,
    hidden_size,
    vocabulary,
    stride_out_b,
    stride_ids_b,
    stride_ids_s,
    stride_source_b,
    stride_source_s,
    stride_source_d,
    HAS_IDS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_TASKS: tl.constexpr,
    BY_ROW: tl.constexpr,
):
    """The text of the rows of slots [slot, last), with the tile added to real tokens."""
    source_ptrs = source_ptr + offs_d[None, :] * stride_source_d
    out_ptrs = out_ptr + offs_d[None, :]
    for each in range(slot, last):
        row = row_of_slot(plan_ptr, each, HAS_TASKS)
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
        known = known_s
        if HAS_IDS:
            ids_ptrs = input_ids_ptr + row * stride_ids_b + columns * stride_ids_s
            tokens = tl.load(ids_ptrs, mask=mask_s, other=0).to(tl.int64)
            known = known_s & (tokens >= 0) & (tokens < vocabulary)
            offs_text = tokens * stride_source_s
        else:
            offs_text = row * stride_source_b + columns * stride_source_s
        text = tl.load(
            source_ptrs + offs_text[:, None],
            mask=known[:, None] & mask_d[None, :],
            other=float("nan"),
        ).to(tl.float32)
        if HAS_OFFSET:
            if HAS_MASK:
                text = tl.where(real[:, None], text + tile, text)
            else:
                text += tile
        tl.store(
            out_ptrs + row * stride_out_b + (columns * hidden_size)[:, None],
            text.to(out_ptr.dtype.element_ty),
            mask=mask_s[:, None] & mask_d[None, :],
        )


@triton.jit(do_not_specialize=["batch", "length", "num_tasks"])
def splice_forward_kernel(
    out_ptr,
    prompt_ptr,
    input_ids_ptr,
    source_ptr,
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
    vocabulary,
    rank,
    stride_prompt_t,
    stride_prompt_m,
    stride_prompt_d,
    stride_ids_b,
    stride_ids_s,
    stride_source_b,
    stride_source_s,
    stride_source_d,
    stride_a_t,
    stride_a_n,
    stride_a_r,
    stride_b_t,
    stride_b_r,
    stride_b_d,
    HAS_IDS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_TASKS: tl.constexpr,
    BY_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILES_R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TERMS: tl.constexpr,
    ORDER: tl.constexpr,
):
    chunks_d = tl.cdiv(hidden_size, BLOCK_D)
    prompt_blocks = tl.cdiv(num_virtual_tokens, BLOCK_S)
    blocks = prompt_blocks + tl.cdiv(length, BLOCK_S)
    pid = tl.program_id(0)
    offs_d = ((pid % chunks_d) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    mask_d = offs_d < hidden_size
    block = (pid // chunks_d) % blocks
    slot = pid // (chunks_d * blocks) * ROWS
    last = tl.minimum(slot + ROWS, batch)
    stride_out_b = (tl.cast(num_virtual_tokens, tl.int64) + length) * hidden_size

    if block < prompt_blocks:
        _write_prompt(
            out_ptr,
            prompt_ptr,
            plan_ptr,
            slot,
            last,
            (block * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64),
            offs_d,
            batch,
            num_tasks,
            num_virtual_tokens,
            hidden_size,
            stride_out_b,
            stride_prompt_t,
            stride_prompt_m,
            stride_prompt_d,
            HAS_TASKS,
            BY_ROW,
        )
    else:
        offs_s = (block - prompt_blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
        mask_s = offs_s < length
        while slot < last:
            task, end = run_of_slot(plan_ptr, slot, last, batch, num_tasks, HAS_TASKS, BY_ROW)
            known_s = mask_s
            if HAS_TASKS:
                known_s = mask_s & (tl.full(mask_s.shape, task, tl.int32) < num_tasks)
            tile = 0.0
            if HAS_OFFSET:
                own = tl.cast(task, tl.int64)
                tile = scaling * _offset_tile(
                    offset_a_ptr + own * stride_a_t + offs_s.to(tl.int64) * stride_a_n,
                    stride_a_r,
                    known_s,
                    offset_b_ptr + own * stride_b_t + offs_d * stride_b_d,
                    stride_b_r,
                    mask_d,
                    rank,
                    TILES_R,
                    BLOCK_R,
                    TERMS,
                    ORDER,
                )
            _write_text(
                out_ptr + tl.cast(num_virtual_tokens, tl.int64) * hidden_size,
                input_ids_ptr,
                source_ptr,
                plan_ptr,
                columns_ptr,
                tile,
                slot,
                end,
                offs_s,
                offs_d,
                known_s,
                mask_s,
                mask_d,
                batch,
                length,
                num_tasks,
                hidden_size,
                vocabulary,
                stride_out_b,
                stride_ids_b,
                stride_ids_s,
                stride_source_b,
                stride_source_s,
                stride_source_d,
                HAS_IDS,
                HAS_OFFSET,
                HAS_MASK,
                HAS_TASKS,
                BY_ROW,
            )
            slot = end
