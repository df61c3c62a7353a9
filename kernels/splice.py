"""Operation 2 in Triton: the prompt before the text, the low-rank offset onto its real tokens.

    out[b, j]     = P'[t, j]                            j < m, t the task of row b
    out[b, m + s] = e[b, s] + c·A[t, pos(b, s)]·B[t]    where the token is real, else e[b, s]

pos(b, s) is the number of real tokens before column s of row b, counted here from the mask.

Forward, one launch: a program owns a block of positions and some blocks of channels, for some rows
of one task. It computes the offset of a tile once and adds it to that tile of all its rows,
wherever their padding puts it; the positions that a row has no tokens for take its padding.
Other programs of the launch write P'.

Backward, two launches: a program owns a block of channels and some blocks of positions. It sums the
gradient of a tile over the rows of its task, each element read once from the column its position
lies in, and multiplies the sum into partial dA and dB. The second launch adds the parts in order.

Rows whose real tokens are one stretch go together, ``BLOCK_B`` at a time. A row with holes between
its tokens goes alone: forward by columns, each with its own row of A; backward by looking for the
columns of its positions.

Rows are grouped by task on the device: group g is task g if there are at most as many tasks as
rows; else it is the task of row g, if no earlier row has the same one. A row whose task id is not
in the bank is NaN, as is a token whose id is not in the table: neither is read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ept_fast.kernels.launch import run, splice_backward_config, splice_forward_config
from ept_fast.ops.types import SpliceGrads, SpliceInputs

__all__ = ["splice_backward", "splice_forward"]

_FINISH_BLOCK = 512


@triton.jit
def _effective_tasks(task_ids_ptr, stride_task_ids, offs_b, mask_b, num_tasks):
    """The task of each row and whether the bank has it; rows of no task go with task 0."""
    tasks = tl.load(task_ids_ptr + offs_b * stride_task_ids, mask=mask_b, other=0)
    valid = (tasks >= 0) & (tasks < num_tasks)
    return tl.where(valid, tasks, 0).to(tl.int32), valid & mask_b


@triton.jit
def _first_row_of(task, task_ids_ptr, stride_task_ids, batch, num_tasks, BLOCK: tl.constexpr):
    """The first row of a task; ``batch`` if there is none."""
    first = batch
    for start in range(0, batch, BLOCK):
        offs_b = (start + tl.arange(0, BLOCK)).to(tl.int64)
        mask_b = offs_b < batch
        tasks, _ = _effective_tasks(task_ids_ptr, stride_task_ids, offs_b, mask_b, num_tasks)
        found = tl.where(mask_b & (tasks == task), offs_b, batch)
        first = tl.minimum(first, tl.min(found).to(tl.int32))
    return first


@triton.jit
def _real_tokens(
    mask_ptr,
    stride_mask_b,
    stride_mask_s,
    offs_b,
    mine,
    length,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Of each row: its first real column, how many real tokens, whether they are one stretch."""
    first = tl.full((BLOCK_B,), length, tl.int32)
    last = tl.zeros((BLOCK_B,), tl.int32)
    total = tl.zeros((BLOCK_B,), tl.int32)
    rows = mask_ptr + offs_b[:, None] * stride_mask_b
    for start in range(0, length, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        real = (
            tl.load(
                rows + columns.to(tl.int64)[None, :] * stride_mask_s,
                mask=mine[:, None] & (columns < length)[None, :],
                other=0,
            )
            != 0
        )
        total += tl.sum(real.to(tl.int32), axis=1)
        first = tl.minimum(first, tl.min(tl.where(real, columns[None, :], length), axis=1))
        last = tl.maximum(last, tl.max(tl.where(real, columns[None, :] + 1, 0), axis=1))
    first = tl.minimum(first, last)
    return first, total, last - first == total


@triton.jit
def _real_before(mask_ptr, stride_mask_s, column, BLOCK_C: tl.constexpr):
    """Real tokens of one row before a column."""
    count = 0
    for start in range(0, column, BLOCK_C):
        offs_c = (start + tl.arange(0, BLOCK_C)).to(tl.int64)
        ones = tl.load(mask_ptr + offs_c * stride_mask_s, mask=offs_c < column, other=0) != 0
        count += tl.sum(ones.to(tl.int32))
    return count


@triton.jit
def _offset_tile(
    a_ptrs,
    stride_a_r,
    mask_a,
    b_ptrs,
    stride_b_r,
    mask_d,
    rank,
    scaling,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """c·A·B for the rows of A that ``a_ptrs`` point to, [BLOCK_S, BLOCK_D]."""
    tile = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for start in range(0, rank, BLOCK_R):
        offs_r = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        mask_r = offs_r < rank
        a = tl.load(
            a_ptrs[:, None] + offs_r[None, :] * stride_a_r,
            mask=mask_a[:, None] & mask_r[None, :],
            other=0.0,
        ).to(tl.float32)
        b = tl.load(
            b_ptrs[None, :] + offs_r[:, None] * stride_b_r,
            mask=mask_r[:, None] & mask_d[None, :],
            other=0.0,
        ).to(tl.float32)
        tile = tl.dot(a, b, tile, input_precision=INPUT_PRECISION)
    return tile * scaling


@triton.jit(do_not_specialize=["batch", "length", "num_tasks"])
def _splice_forward_kernel(
    out_ptr,
    prompt_ptr,
    input_ids_ptr,
    source_ptr,
    offset_a_ptr,
    offset_b_ptr,
    mask_ptr,
    task_ids_ptr,
    scaling,
    batch,
    length,
    num_tasks,
    num_virtual_tokens,
    hidden_size,
    vocabulary,
    rank,
    stride_out_b,
    stride_out_s,
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
    stride_mask_b,
    stride_mask_s,
    stride_task_ids,
    HAS_IDS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_TASKS: tl.constexpr,
    BY_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    prompt_blocks = tl.cdiv(num_virtual_tokens, BLOCK_S)
    blocks = prompt_blocks + tl.cdiv(length, BLOCK_S)
    chunks_d = tl.cdiv(hidden_size, BLOCK_D * TILES)
    chunks_b = tl.cdiv(batch, ROWS)
    pid = tl.program_id(0)
    chunk_d = pid % chunks_d
    pid = pid // chunks_d
    block = pid % blocks
    pid = pid // blocks
    chunk_b = pid % chunks_b
    group = pid // chunks_b

    first_b = chunk_b * ROWS
    last_b = tl.minimum(first_b + ROWS, batch)
    task = group
    if BY_ROW:
        task, _known = _effective_tasks(
            task_ids_ptr, stride_task_ids, group.to(tl.int64), group < batch, num_tasks
        )
        if _first_row_of(task, task_ids_ptr, stride_task_ids, group, num_tasks, 128) < group:
            return
    own_task = task.to(tl.int64)
    is_prompt = block < prompt_blocks
    offs_s = tl.where(is_prompt, block, block - prompt_blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_s = offs_s < tl.where(is_prompt, num_virtual_tokens, length)

    for start_b in range(first_b, last_b, BLOCK_B):
        offs_b = (start_b + tl.arange(0, BLOCK_B)).to(tl.int64)
        mine = offs_b < last_b
        known_task = mine
        if HAS_TASKS:
            tasks, known_task = _effective_tasks(
                task_ids_ptr, stride_task_ids, offs_b, mine, num_tasks
            )
            mine = mine & (tasks == task)
        number = tl.sum(mine.to(tl.int32))
        out_rows = out_ptr + offs_b[:, None] * stride_out_b
        if (number > 0) & is_prompt:
            for tile_d in range(TILES):
                offs_d = ((chunk_d * TILES + tile_d) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
                mask_d = offs_d < hidden_size
                tile = tl.load(
                    prompt_ptr
                    + own_task * stride_prompt_t
                    + offs_s.to(tl.int64)[:, None] * stride_prompt_m
                    + offs_d[None, :] * stride_prompt_d,
                    mask=mask_s[:, None] & mask_d[None, :],
                    other=0.0,
                ).to(tl.float32)
                if HAS_TASKS:
                    result = tl.where(known_task[:, None, None], tile[None, :, :], float("nan"))
                else:
                    result = tl.broadcast_to(tile[None, :, :], (BLOCK_B, BLOCK_S, BLOCK_D))
                out_ptrs = out_rows + offs_s.to(tl.int64)[None, :] * stride_out_s
                tl.store(
                    out_ptrs[:, :, None] + offs_d[None, None, :],
                    result.to(out_ptr.dtype.element_ty),
                    mask=(mine[:, None] & mask_s[None, :])[:, :, None] & mask_d[None, None, :],
                )
        if (number > 0) & (block >= prompt_blocks):
            columns = tl.broadcast_to(offs_s[None, :], (BLOCK_B, BLOCK_S))
            real = columns < length
            together = mine
            if HAS_MASK:
                first, total, stretch = _real_tokens(
                    mask_ptr,
                    stride_mask_b,
                    stride_mask_s,
                    offs_b,
                    mine,
                    length,
                    BLOCK_B,
                    BLOCK_C,
                )
                together = mine & stretch
                # Positions past a row's tokens stand for its padding: first that before its
                # tokens, then that behind them, which lies where it lies.
                padding = offs_s[None, :] - total[:, None]
                real = padding < 0
                columns = tl.where(real, offs_s[None, :] + first[:, None], columns)
                columns = tl.where((padding >= 0) & (padding < first[:, None]), padding, columns)
            columns = columns.to(tl.int64)
            mask_bs = together[:, None] & mask_s[None, :]
            known = mask_bs
            if HAS_IDS:
                ids = tl.load(
                    input_ids_ptr + offs_b[:, None] * stride_ids_b + columns * stride_ids_s,
                    mask=mask_bs,
                    other=0,
                ).to(tl.int64)
                known = mask_bs & (ids >= 0) & (ids < vocabulary)
                text_ptrs = source_ptr + ids * stride_source_s
            else:
                text_ptrs = (
                    source_ptr + offs_b[:, None] * stride_source_b + columns * stride_source_s
                )
            out_ptrs = out_rows + (num_virtual_tokens + columns) * stride_out_s
            for tile_d in range(TILES):
                offs_d = ((chunk_d * TILES + tile_d) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
                mask_d = offs_d < hidden_size
                result = tl.load(
                    text_ptrs[:, :, None] + offs_d[None, None, :] * stride_source_d,
                    mask=known[:, :, None] & mask_d[None, None, :],
                    other=0.0,
                ).to(tl.float32)
                if HAS_OFFSET:
                    tile = _offset_tile(
                        offset_a_ptr + own_task * stride_a_t + offs_s.to(tl.int64) * stride_a_n,
                        stride_a_r,
                        mask_s,
                        offset_b_ptr + own_task * stride_b_t + offs_d * stride_b_d,
                        stride_b_r,
                        mask_d,
                        rank,
                        scaling,
                        BLOCK_S,
                        BLOCK_D,
                        BLOCK_R,
                        INPUT_PRECISION,
                    )
                    if HAS_MASK:
                        result = tl.where(real[:, :, None], result + tile[None, :, :], result)
                    else:
                        result += tile[None, :, :]
                if HAS_IDS:
                    result = tl.where(known[:, :, None], result, float("nan"))
                if HAS_TASKS:
                    result = tl.where(known_task[:, None, None], result, float("nan"))
                tl.store(
                    out_ptrs[:, :, None] + offs_d[None, None, :],
                    result.to(out_ptr.dtype.element_ty),
                    mask=mask_bs[:, :, None] & mask_d[None, None, :],
                )
            if HAS_MASK:
                alone = mine & (stretch == 0)
                row = tl.min(offs_b) - 1
                for _ in range(tl.sum(alone.to(tl.int32))):
                    row = tl.min(tl.where(alone & (offs_b > row), offs_b, batch))
                    column = (block - prompt_blocks) * BLOCK_S
                    offs_c = offs_s.to(tl.int64)
                    row_mask = mask_ptr + row * stride_mask_b
                    real_c = tl.load(row_mask + offs_c * stride_mask_s, mask=mask_s, other=0) != 0
                    position = _real_before(row_mask, stride_mask_s, column, BLOCK_C)
                    position += tl.cumsum(real_c.to(tl.int32), 0) - 1
                    known_c = mask_s
                    if HAS_IDS:
                        ids_c = tl.load(
                            input_ids_ptr + row * stride_ids_b + offs_c * stride_ids_s,
                            mask=mask_s,
                            other=0,
                        ).to(tl.int64)
                        known_c = mask_s & (ids_c >= 0) & (ids_c < vocabulary)
                        ptrs_c = source_ptr + ids_c * stride_source_s
                    else:
                        ptrs_c = source_ptr + row * stride_source_b + offs_c * stride_source_s
                    if HAS_TASKS:
                        knows = tl.sum((known_task & (offs_b == row)).to(tl.int32))
                        # As a tile: Triton 3.9's interpreter makes no mask of a scalar comparison.
                        known_c = known_c & (tl.full(known_c.shape, knows, tl.int32) > 0)
                    for tile_d in range(TILES):
                        offs_d = ((chunk_d * TILES + tile_d) * BLOCK_D + tl.arange(0, BLOCK_D)).to(
                            tl.int64
                        )
                        mask_d = offs_d < hidden_size
                        text = tl.load(
                            ptrs_c[:, None] + offs_d[None, :] * stride_source_d,
                            mask=known_c[:, None] & mask_d[None, :],
                            other=0.0,
                        ).to(tl.float32)
                        tile = _offset_tile(
                            offset_a_ptr
                            + own_task * stride_a_t
                            + position.to(tl.int64) * stride_a_n,
                            stride_a_r,
                            real_c,
                            offset_b_ptr + own_task * stride_b_t + offs_d * stride_b_d,
                            stride_b_r,
                            mask_d,
                            rank,
                            scaling,
                            BLOCK_S,
                            BLOCK_D,
                            BLOCK_R,
                            INPUT_PRECISION,
                        )
                        text = tl.where(real_c[:, None], text + tile, text)
                        text = tl.where(known_c[:, None], text, float("nan"))
                        tl.store(
                            out_ptr
                            + row * stride_out_b
                            + (num_virtual_tokens + offs_c)[:, None] * stride_out_s
                            + offs_d[None, :],
                            text.to(out_ptr.dtype.element_ty),
                            mask=mask_s[:, None] & mask_d[None, :],
                        )


@triton.jit
def _columns_of(mask_ptr, stride_mask_s, position, length, BLOCK_S: tl.constexpr):
    """The columns of one row's real tokens from number ``position`` on; -1 if it has none."""
    offs_p = position + tl.arange(0, BLOCK_S)
    columns = tl.full((BLOCK_S,), -1, tl.int32)
    seen = 0
    start = 0
    while (seen < position + BLOCK_S) & (start < length):
        offs_c = start + tl.arange(0, BLOCK_S)
        real = (
            tl.load(mask_ptr + offs_c.to(tl.int64) * stride_mask_s, mask=offs_c < length, other=0)
            != 0
        )
        number = tl.where(real, seen + tl.cumsum(real.to(tl.int32), 0) - 1, -1)
        hit = number[None, :] == offs_p[:, None]  # [positions, columns]
        columns = tl.maximum(columns, tl.max(tl.where(hit, offs_c[None, :], -1), axis=1))
        seen += tl.sum(real.to(tl.int32))
        start += BLOCK_S
    return columns


@triton.jit(do_not_specialize=["batch", "length", "num_tasks"])
def _splice_backward_kernel(
    grad_ptr,
    part_p_ptr,
    part_a_ptr,
    part_b_ptr,
    offset_a_ptr,
    offset_b_ptr,
    mask_ptr,
    task_ids_ptr,
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
    stride_mask_b,
    stride_mask_s,
    stride_task_ids,
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
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
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

    first_b = chunk_b * ROWS
    last_b = tl.minimum(first_b + ROWS, batch)
    task = group
    if BY_ROW:
        task, _known = _effective_tasks(
            task_ids_ptr, stride_task_ids, group.to(tl.int64), group < batch, num_tasks
        )
        if _first_row_of(task, task_ids_ptr, stride_task_ids, group, num_tasks, 128) < group:
            return
    own_task = task.to(tl.int64)
    part = group.to(tl.int64) * chunks_b + chunk_b

    is_prompt = block < prompt_blocks
    chunk_s = tl.where(is_prompt, block, block - prompt_blocks)
    first_s = chunk_s * BLOCK_S * tl.where(is_prompt, 1, TILES)
    last_s = tl.where(is_prompt, num_virtual_tokens, length)
    end_s = tl.minimum(first_s + BLOCK_S * tl.where(is_prompt, 1, TILES), last_s)

    # What the rows have in common with all tiles, if all of them go together.
    offs_b = (first_b + tl.arange(0, BLOCK_B)).to(tl.int64)
    mine = offs_b < last_b
    first = tl.zeros((BLOCK_B,), tl.int32)
    total = tl.full((BLOCK_B,), last_s, tl.int32)
    alone = mine & (total < 0)
    if HAS_MASK and ROWS <= BLOCK_B:
        if block >= prompt_blocks:
            first, total, stretch = _real_tokens(
                mask_ptr, stride_mask_b, stride_mask_s, offs_b, mine, length, BLOCK_B, BLOCK_C
            )
            alone = mine & (stretch == 0)

    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_r = offs_r < rank
    for tile_d in range(TILES_D):
        if TILES_D > 1:
            tl.debug_barrier()  # its threads may read what others of them have written
        offs_d = ((chunk_d * TILES_D + tile_d) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask_d = offs_d < hidden_size
        d_b = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        for start_s in range(first_s, end_s, BLOCK_S):
            offs_s = start_s + tl.arange(0, BLOCK_S)
            mask_s = offs_s < last_s
            summed = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
            for start_b in range(first_b, last_b, BLOCK_B):
                number = 1
                if HAS_TASKS or ROWS > BLOCK_B:
                    offs_b = (start_b + tl.arange(0, BLOCK_B)).to(tl.int64)
                    mine = offs_b < last_b
                    if HAS_TASKS:
                        tasks, valid = _effective_tasks(
                            task_ids_ptr, stride_task_ids, offs_b, mine, num_tasks
                        )
                        mine = valid & (tasks == task)
                        number = tl.sum(mine.to(tl.int32))
                if number > 0:
                    if HAS_MASK and ROWS > BLOCK_B:
                        if block >= prompt_blocks:
                            first, total, stretch = _real_tokens(
                                mask_ptr,
                                stride_mask_b,
                                stride_mask_s,
                                offs_b,
                                mine,
                                length,
                                BLOCK_B,
                                BLOCK_C,
                            )
                            alone = mine & (stretch == 0)
                    columns = (offs_s[None, :] + first[:, None]).to(tl.int64)
                    there = (mine & (alone == 0))[:, None] & (offs_s[None, :] < total[:, None])
                    columns += tl.where(is_prompt, 0, num_virtual_tokens)
                    grad_ptrs = grad_ptr + offs_b[:, None] * stride_grad_b + columns * stride_grad_s
                    grads = tl.load(
                        grad_ptrs[:, :, None] + offs_d[None, None, :] * stride_grad_d,
                        mask=there[:, :, None] & mask_d[None, None, :],
                        other=0.0,
                    ).to(tl.float32)
                    summed += tl.sum(grads, axis=0)
                    if HAS_MASK:
                        row = tl.min(offs_b) - 1
                        for _ in range(tl.sum((alone & mine).to(tl.int32))):
                            row = tl.min(tl.where(alone & mine & (offs_b > row), offs_b, batch))
                            found = _columns_of(
                                mask_ptr + row * stride_mask_b,
                                stride_mask_s,
                                start_s,
                                length,
                                BLOCK_S,
                            )
                            summed += tl.load(
                                grad_ptr
                                + row * stride_grad_b
                                + (num_virtual_tokens + found.to(tl.int64))[:, None] * stride_grad_s
                                + offs_d[None, :] * stride_grad_d,
                                mask=(found >= 0)[:, None] & mask_d[None, :],
                                other=0.0,
                            ).to(tl.float32)
            offs_p = offs_s.to(tl.int64)
            if HAS_PROMPT:
                if is_prompt:
                    slot_p = part
                    if WHOLE_P:
                        slot_p = own_task
                    tl.store(
                        part_p_ptr
                        + slot_p * stride_part_p
                        + offs_p[:, None] * hidden_size
                        + offs_d[None, :],
                        summed.to(part_p_ptr.dtype.element_ty),
                        mask=mask_s[:, None] & mask_d[None, :],
                    )
            if HAS_OFFSET:
                if block >= prompt_blocks:
                    b = tl.load(
                        offset_b_ptr
                        + own_task * stride_b_t
                        + offs_d[:, None] * stride_b_d
                        + offs_r[None, :] * stride_b_r,
                        mask=mask_d[:, None] & mask_r[None, :],
                        other=0.0,
                    ).to(tl.float32)
                    d_a = tl.dot(summed, b, input_precision=INPUT_PRECISION) * scaling
                    slot_a = part * chunks_d + chunk_d
                    if WHOLE_A:
                        slot_a = own_task
                    a_ptrs = (
                        part_a_ptr
                        + slot_a * stride_part_a
                        + offs_p[:, None] * rank
                        + offs_r[None, :]
                    )
                    mask_a = mask_s[:, None] & mask_r[None, :]
                    if TILES_D > 1:
                        # What this very program has written for the blocks of channels before.
                        d_a += tl.load(a_ptrs, mask=mask_a & (tile_d > 0), other=0.0).to(tl.float32)
                    tl.store(a_ptrs, d_a.to(part_a_ptr.dtype.element_ty), mask=mask_a)
                    a = tl.load(
                        offset_a_ptr
                        + own_task * stride_a_t
                        + offs_r[:, None] * stride_a_r
                        + offs_p[None, :] * stride_a_n,
                        mask=mask_r[:, None] & mask_s[None, :],
                        other=0.0,
                    ).to(tl.float32)
                    d_b = tl.dot(a, summed, d_b, input_precision=INPUT_PRECISION)
        if HAS_OFFSET:
            if block >= prompt_blocks:
                slot_b = part * chunks_s + chunk_s
                if WHOLE_B:
                    slot_b = own_task
                tl.store(
                    part_b_ptr
                    + slot_b * stride_part_b
                    + offs_r[:, None] * hidden_size
                    + offs_d[None, :],
                    (d_b * scaling).to(part_b_ptr.dtype.element_ty),
                    mask=mask_r[:, None] & mask_d[None, :],
                )


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


@triton.jit(
    do_not_specialize=[
        "batch",
        "length",
        "num_tasks",
        "size_p",
        "size_a",
        "covered_a",
        "size_b",
        "parts_p",
        "parts_a",
        "parts_b",
    ]
)
def _splice_finish_kernel(
    d_prompt_ptr,
    d_a_ptr,
    d_b_ptr,
    part_p_ptr,
    part_a_ptr,
    part_b_ptr,
    task_ids_ptr,
    batch,
    length,
    num_tasks,
    size_p,
    size_a,
    covered_a,
    size_b,
    parts_p,
    parts_a,
    parts_b,
    stride_task_ids,
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
        group = _first_row_of(task, task_ids_ptr, stride_task_ids, batch, num_tasks, BLOCK_B)
        there = group < batch
    if HAS_PROMPT:
        if block < blocks_p:
            _add_parts(
                d_prompt_ptr, part_p_ptr, task, group, there, size_p, size_p, parts_p, block, BLOCK
            )
    if HAS_OFFSET:
        if (block >= blocks_p) & (block < blocks_p + blocks_a):
            _add_parts(
                d_a_ptr,
                part_a_ptr,
                task,
                group,
                there,
                size_a,
                covered_a,
                parts_a,
                block - blocks_p,
                BLOCK,
            )
        if block >= blocks_p + blocks_a:
            _add_parts(
                d_b_ptr,
                part_b_ptr,
                task,
                group,
                there,
                size_b,
                size_b,
                parts_b,
                block - blocks_p - blocks_a,
                BLOCK,
            )


def _strides(tensor: Tensor | None, number: int) -> tuple[int, ...]:
    return (0,) * number if tensor is None else tensor.stride()


def _as_bytes(mask: Tensor | None) -> Tensor | None:
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask


def _groups(batch: int, tasks: int, task_ids: Tensor | None) -> tuple[int, bool]:
    """How many groups of rows there are at most, and whether they go by row rather than task."""
    if task_ids is None:
        return 1, False
    return (batch, True) if tasks > batch else (tasks, False)


def splice_forward(inputs: SpliceInputs, scaling: float) -> Tensor:
    """The prompt before the text and the offset onto its real tokens, [B, m + S, d]."""
    prompt, input_ids, _, inputs_embeds, offset_a, offset_b, attention_mask, task_ids = inputs
    source = inputs.source
    batch, length = inputs.text.shape[:2]
    tasks, m, width = prompt.shape
    out = source.new_empty(batch, m + length, width)
    if out.numel() == 0:
        return out
    rank = 0 if offset_a is None else offset_a.shape[2]
    has_offset = rank > 0 and length > 0
    mask = _as_bytes(attention_mask) if has_offset else None
    groups, by_row = _groups(batch, tasks, task_ids)
    config = splice_forward_config(
        batch, length, m, width, rank, tasks, source.dtype, prompt.device, mask is not None
    )
    blocks = triton.cdiv(m, config.block_s) + triton.cdiv(length, config.block_s)
    programs = (
        groups
        * triton.cdiv(batch, config.rows)
        * blocks
        * triton.cdiv(width, config.block_d * config.tiles)
    )
    strides_source = source.stride() if inputs_embeds is not None else (0, *source.stride())
    run(
        _splice_forward_kernel,
        programs,
        prompt.device,
        out,
        prompt,
        input_ids,
        source,
        offset_a if has_offset else None,
        offset_b if has_offset else None,
        mask,
        task_ids,
        scaling,
        batch,
        length,
        tasks,
        m,
        width,
        source.shape[0],
        rank,
        *out.stride()[:2],
        *prompt.stride(),
        *_strides(input_ids, 2),
        *strides_source,
        *_strides(offset_a, 3),
        *_strides(offset_b, 3),
        *_strides(mask, 2),
        *_strides(task_ids, 1),
        HAS_IDS=input_ids is not None,
        HAS_OFFSET=has_offset,
        HAS_MASK=mask is not None,
        HAS_TASKS=task_ids is not None,
        BY_ROW=by_row,
        **config.options(),
    )
    return out


def splice_backward(
    grad: Tensor, inputs: SpliceInputs, scaling: float, need_prompt: bool, need_offset: bool
) -> SpliceGrads:
    """Gradients of prompt, offset_a and offset_b in their types from that of the output.

    Each gradient element is read once.
    """
    prompt, _, _, _, offset_a, offset_b, attention_mask, task_ids = inputs
    batch, total, width = grad.shape
    tasks, m, _ = prompt.shape
    length = total - m
    d_prompt, d_a, d_b = (grad.new_empty(0) for _ in range(3))
    if need_prompt:
        d_prompt = torch.empty_like(prompt, memory_format=torch.contiguous_format)
    if need_offset and offset_a is not None and offset_b is not None:
        d_a = torch.empty_like(offset_a, memory_format=torch.contiguous_format)
        d_b = torch.empty_like(offset_b, memory_format=torch.contiguous_format)
    if batch == 0:
        return SpliceGrads(d_prompt.zero_(), d_a.zero_(), d_b.zero_())
    rank = 0 if offset_a is None else offset_a.shape[2]
    has_prompt = d_prompt.numel() > 0
    has_offset = d_a.numel() > 0 and d_b.numel() > 0 and length > 0
    if not has_offset:
        d_a.zero_()
        d_b.zero_()
    if not has_prompt and not has_offset:
        return SpliceGrads(d_prompt, d_a, d_b)
    mask = _as_bytes(attention_mask) if has_offset else None
    groups, by_row = _groups(batch, tasks, task_ids)
    config = splice_backward_config(batch, length, m, width, rank, tasks, has_prompt, has_offset)
    chunks_b = triton.cdiv(batch, config.rows)
    chunks_s = triton.cdiv(length, config.block_s * config.tiles)
    chunks_d = triton.cdiv(width, config.block_d * config.tiles_d)
    parts_p, parts_a, parts_b = chunks_b, chunks_b * chunks_d, chunks_b * chunks_s
    whole_a = parts_a == 1 and config.tiles_d == 1
    part_p, part_a, part_b = d_prompt, d_a, d_b
    sizes = (m * width, length * rank, rank * width)
    if has_prompt and parts_p > 1:
        part_p = grad.new_empty(groups * parts_p, sizes[0], dtype=torch.float32)
    if has_offset and not whole_a:
        part_a = grad.new_empty(groups * parts_a, sizes[1], dtype=torch.float32)
    if has_offset and parts_b > 1:
        part_b = grad.new_empty(groups * parts_b, sizes[2], dtype=torch.float32)
    size_a = 0 if offset_a is None else offset_a.shape[1] * rank
    blocks = (triton.cdiv(m, config.block_s) if has_prompt else 0) + (chunks_s if has_offset else 0)
    run(
        _splice_backward_kernel,
        groups * chunks_b * blocks * chunks_d,
        grad.device,
        grad,
        part_p,
        part_a,
        part_b,
        offset_a if has_offset else None,
        offset_b if has_offset else None,
        mask,
        task_ids,
        scaling,
        batch,
        length,
        tasks,
        m,
        width,
        rank,
        *grad.stride(),
        sizes[0],
        size_a if whole_a else sizes[1],
        sizes[2],
        *_strides(offset_a, 3),
        *_strides(offset_b, 3),
        *_strides(mask, 2),
        *_strides(task_ids, 1),
        HAS_PROMPT=has_prompt,
        HAS_OFFSET=has_offset,
        HAS_MASK=mask is not None,
        HAS_TASKS=task_ids is not None,
        BY_ROW=by_row,
        WHOLE_P=parts_p == 1,
        WHOLE_A=whole_a,
        WHOLE_B=parts_b == 1,
        TILES_D=config.tiles_d,
        **config.options(),
    )
    # What the first launch has written whole needs the second one only for its zeros.
    finish_p = has_prompt and (parts_p > 1 or by_row)
    finish_a = not whole_a or by_row or length * rank < size_a
    finish_b = parts_b > 1 or by_row
    finish_offset = has_offset and (finish_a or finish_b)
    blocks = triton.cdiv(sizes[0], _FINISH_BLOCK) if finish_p else 0
    if finish_offset:
        blocks += triton.cdiv(size_a, _FINISH_BLOCK) + triton.cdiv(sizes[2], _FINISH_BLOCK)
    run(
        _splice_finish_kernel,
        tasks * blocks,
        grad.device,
        d_prompt,
        d_a,
        d_b,
        part_p,
        part_a,
        part_b,
        task_ids,
        batch,
        length,
        tasks,
        sizes[0],
        size_a,
        sizes[1],
        sizes[2],
        parts_p if parts_p > 1 else 0,
        0 if whole_a else parts_a,
        parts_b if parts_b > 1 else 0,
        *_strides(task_ids, 1),
        HAS_PROMPT=finish_p,
        HAS_OFFSET=finish_offset,
        BY_ROW=by_row,
        BLOCK=_FINISH_BLOCK,
        BLOCK_B=128,
        num_warps=4,
    )
    return SpliceGrads(d_prompt, d_a, d_b)
