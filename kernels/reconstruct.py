"""Operation 1 in Triton: METHOD's factored algebra in three launches each way.

Forward, with C = [O | g_k·φ(H_k)]:
    reduce over d   Q = P·Bᵀ   R = P·[D | G]   S = B·[D | G]     partial sums over chunks of d
    core            W = softmax(Q·(c·A)ᵀ/√d)   O = W·(c·A)       partial sums over chunks of n
    expand over d   [Hin | zin] = R + O·S   g = softmax((zin + b)/τ)   P′ = P + C·[B ; U]
Backward, from Y = dL/dP′:
    reduce over d   dC = Y·[B ; U]ᵀ
    core            dX = [dHin | dz]   dO = dC[:, :r] + dX·Sᵀ   dA   dQ, partial sums over n
    expand over d   dF = Y + dX·[D | G]ᵀ   F = P + O·B   dP = dF + dQ·B   dB = Oᵀ·dF + dQᵀ·P
                    d[D | G] = Fᵀ·dX   dU = (g·Φ)ᵀ·Y   db = Σ dz

One grid covers all T tasks, the task outermost. Partial sums lie in float32 workspaces and are
added in order, so that results are bitwise the same on every run. Columns of D and U are numbered
c = k·h + j; W here stands for the width K·h + K of [D | G].

Scores may be large. So an exponential is taken of a difference of two products, which is 0 for the
largest score whatever its rounding, and A is scaled as it is read: if one position has all the
weight, O is then that row of c·A to the bit, and the softmax's gradient cancels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ept_fast.kernels.activations import activate, activation_derivative
from ept_fast.kernels.runtime import Add, Operand, Plan
from ept_fast.ops.types import Flags, Parameters, Saved

__all__ = ["backward", "forward", "saved"]


# Tiles


@triton.jit
def _tile(ptr, offs_i, stride_i, mask_i, offs_j, stride_j, mask_j):
    """A tile of a matrix in float32, zero outside."""
    offsets = offs_i[:, None] * stride_i + offs_j[None, :] * stride_j
    return tl.load(ptr + offsets, mask=mask_i[:, None] & mask_j[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store_tile(ptr, tile, offs_i, stride_i, mask_i, offs_j, stride_j, mask_j):
    offsets = offs_i[:, None] * stride_i + offs_j[None, :] * stride_j
    mask = mask_i[:, None] & mask_j[None, :]
    tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _space_offsets(offs_c, stride_k, stride_j, DIM: tl.constexpr):
    """Where column c = k·h + j of the spaces begins."""
    return (offs_c // DIM).to(tl.int64) * stride_k + (offs_c % DIM).to(tl.int64) * stride_j


@triton.jit
def _down_gate_tile(
    down_ptr,
    stride_down_k,
    stride_down_d,
    stride_down_j,
    gate_ptr,
    stride_gate_d,
    stride_gate_k,
    offs_d,
    mask_d,
    offs_c,
    dims,
    width,
    DIM: tl.constexpr,
):
    """[BLOCK_D, BLOCK_C] of [D | G]."""
    mask_down = (offs_c >= 0) & (offs_c < dims)
    mask_gate = (offs_c >= dims) & (offs_c < width)
    columns = _space_offsets(offs_c, stride_down_k, stride_down_j, DIM)
    tile = _tile(down_ptr, offs_d, stride_down_d, mask_d, columns, 1, mask_down)
    offs_k = (offs_c - dims).to(tl.int64)
    return tile + _tile(gate_ptr, offs_d, stride_gate_d, mask_d, offs_k, stride_gate_k, mask_gate)


@triton.jit
def _sum_parts(ptrs, mask, parts, stride_part, UNROLL: tl.constexpr):
    """The sum of ``parts`` tiles, in order; UNROLL loads are under way at a time."""
    total = tl.zeros(ptrs.shape, tl.float32)
    for first in range(0, parts, UNROLL):
        for i in tl.static_range(UNROLL):
            part = tl.cast(first + i, tl.int64)
            # Compared as a tile: Triton 3.9's interpreter makes no mask of a scalar comparison.
            mask_part = mask & (tl.full(mask.shape, part, tl.int64) < parts)
            total += tl.load(ptrs + part * stride_part, mask=mask_part, other=0.0)
    return total


@triton.jit
def _add_product(
    acc,
    x,
    ptr,
    stride_r,
    offs_j,
    stride_j,
    mask_j,
    r,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    scale=1.0,
):
    """acc + x·(scale·M) for x [BLOCK_M, BLOCK_R] and M [r, BLOCK_J] in memory.

    A rank of more than 32 goes in steps: a product holds its operands in registers.
    """
    if BLOCK_R <= 32:
        offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
        matrix = _tile(ptr, offs_j, stride_j, mask_j, offs_r, stride_r, offs_r < r) * scale
        acc = tl.dot(x, tl.trans(matrix), acc, input_precision="ieee")
    else:
        for start in range(0, r, 32):
            step = start + tl.arange(0, 32)
            part = tl.gather(x, tl.broadcast_to(step[None, :], (BLOCK_M, 32)), 1)
            offs_r = step.to(tl.int64)
            matrix = _tile(ptr, offs_j, stride_j, mask_j, offs_r, stride_r, offs_r < r) * scale
            acc = tl.dot(part, tl.trans(matrix), acc, input_precision="ieee")
    return acc


# Reduce over d, both ways


@triton.jit(do_not_specialize=["splits", "chunk"])
def _reduce_kernel(
    partial_ptr,  # [T, splits, rows, columns]
    x_ptr,  # P or Y
    stride_xt,
    stride_xm,
    stride_xd,
    b_ptr,
    stride_bt,
    stride_br,
    stride_bd,
    space_ptr,  # D or U
    stride_st,
    stride_sk,
    stride_sj,
    stride_sd,
    gate_ptr,
    stride_gt,
    stride_gd,
    stride_gk,
    m,
    r,
    dims,  # K·h
    d,
    rows,
    columns,
    splits,
    chunk,
    DIM: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_SPACES: tl.constexpr,
    FORWARD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows [P ; B] times columns [Bᵀ | D | G], or rows Y times columns [B ; U]ᵀ.

    The sum over one chunk of d for one tile. B·Bᵀ is left out.
    """
    row_blocks = tl.cdiv(rows, BLOCK_M)
    column_blocks = tl.cdiv(columns, BLOCK_N)
    pid = tl.program_id(0)
    split = pid % splits
    column_block = pid // splits % column_blocks
    row_block = pid // (splits * column_blocks) % row_blocks
    task = (pid // (splits * column_blocks * row_blocks)).to(tl.int64)
    if (row_block * BLOCK_M >= m) & ((column_block + 1) * BLOCK_N <= r):
        return

    offs_m = (row_block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptr += task * stride_xt
    b_ptr += task * stride_bt
    space_ptr += task * stride_st
    gate_ptr += task * stride_gt
    mask_x = offs_m < m
    mask_b = (offs_m >= m) & (offs_m < rows)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(split * chunk, tl.minimum((split + 1) * chunk, d), BLOCK_D):
        offs_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask_d = offs_d < d
        left = _tile(x_ptr, offs_m, stride_xm, mask_x, offs_d, stride_xd, mask_d)
        right = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        if HAS_OFFSET:
            if FORWARD and HAS_SPACES:
                left += _tile(b_ptr, offs_m - m, stride_br, mask_b, offs_d, stride_bd, mask_d)
            offs_b = offs_n.to(tl.int64)
            right += _tile(b_ptr, offs_b, stride_br, offs_n < r, offs_d, stride_bd, mask_d)
        if HAS_SPACES:
            if FORWARD:
                down = _down_gate_tile(
                    space_ptr,
                    stride_sk,
                    stride_sd,
                    stride_sj,
                    gate_ptr,
                    stride_gd,
                    stride_gk,
                    offs_d,
                    mask_d,
                    offs_n - r,
                    dims,
                    columns - r,
                    DIM,
                )
                right += tl.trans(down)
            else:
                mask_c = (offs_n >= r) & (offs_n < columns)
                offs_u = _space_offsets(offs_n - r, stride_sk, stride_sj, DIM)
                right += _tile(space_ptr, offs_u, 1, mask_c, offs_d, stride_sd, mask_d)
        acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee")
    partial_ptr += (task * splits + split) * rows * columns
    _store_tile(
        partial_ptr,
        acc,
        offs_m,
        columns,
        offs_m < rows,
        offs_n.to(tl.int64),
        1,
        offs_n < columns,
    )


# Forward


@triton.jit
def _attend(
    partial_ptr,  # [splits, rows, columns], at the task; so are the others
    query_ptr,  # [m, r]
    max_ptr,  # [n_splits, m]
    sum_ptr,  # [n_splits, m]
    attended_ptr,  # [n_splits, m, r]
    a_ptr,
    stride_an,
    stride_ar,
    row_block,
    n_split,
    scaling,
    score_scale,
    m,
    n,
    r,
    rows,
    columns,
    splits,
    n_chunk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One chunk of n: row maxima of Q·(c·A)ᵀ, row sums of the exponentials, these times c·A."""
    offs_m = (row_block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_m = offs_m < m
    mask_r = offs_r < r
    mask = mask_m[:, None] & mask_r[None, :]
    part = tl.cast(rows, tl.int64) * columns
    query = _sum_parts(
        partial_ptr + (offs_m[:, None] * columns + offs_r[None, :]), mask, splits, part, UNROLL
    )
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    attended = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(n_split * n_chunk, tl.minimum((n_split + 1) * n_chunk, n), BLOCK_N):
        offs_n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask_n = offs_n < n
        a = _tile(a_ptr, offs_n, stride_an, mask_n, offs_r, stride_ar, mask_r) * scaling
        scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        scores = _add_product(
            scores, query, a_ptr, stride_ar, offs_n, stride_an, mask_n, r, BLOCK_M, BLOCK_R, scaling
        )
        scores = tl.where(mask_n[None, :], scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, 1))
        scale = tl.exp((top - highest) * score_scale)
        weights = tl.exp((scores - highest[:, None]) * score_scale)
        total = total * scale + tl.sum(weights, 1)
        attended = tl.dot(weights, a, attended * scale[:, None], input_precision="ieee")
        top = highest
    if n_split == 0:
        _store_tile(query_ptr, query, offs_m, r, mask_m, offs_r, 1, mask_r)
    split = tl.cast(n_split, tl.int64)
    tl.store(max_ptr + (split * m + offs_m), top, mask=mask_m)
    tl.store(sum_ptr + (split * m + offs_m), total, mask=mask_m)
    _store_tile(attended_ptr + split * m * r, attended, offs_m, r, mask_m, offs_r, 1, mask_r)


@triton.jit(do_not_specialize=["splits", "n_splits", "n_chunk"])
def _core_forward_kernel(
    partial_ptr,  # [T, splits, rows, columns]
    query_ptr,  # [T, m, r]
    max_ptr,  # [T, n_splits, m]
    sum_ptr,  # [T, n_splits, m]
    attended_ptr,  # [T, n_splits, m, r]
    x_ptr,  # R [T, m, W]
    cross_ptr,  # S [T, r, W]
    a_ptr,
    stride_at,
    stride_an,
    stride_ar,
    scaling,
    score_scale,
    m,
    n,
    r,
    rows,
    columns,
    splits,
    n_splits,
    n_chunk,
    HAS_OFFSET: tl.constexpr,
    HAS_SPACES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Attention over the chunks of n; beside it, the sums R and S over the chunks of d."""
    attend = 0
    if HAS_OFFSET:
        attend = tl.cdiv(m, BLOCK_M) * n_splits
    width = columns - r
    sums = 0
    if HAS_SPACES:
        sums = tl.cdiv(rows * width, BLOCK)
    task = (tl.program_id(0) // (attend + sums)).to(tl.int64)
    pid = tl.program_id(0) % (attend + sums)
    partial_ptr += task * splits * rows * columns
    if HAS_OFFSET:
        if pid < attend:
            _attend(
                partial_ptr,
                query_ptr + task * m * r,
                max_ptr + task * n_splits * m,
                sum_ptr + task * n_splits * m,
                attended_ptr + task * n_splits * m * r,
                a_ptr + task * stride_at,
                stride_an,
                stride_ar,
                pid // n_splits,
                pid % n_splits,
                scaling,
                score_scale,
                m,
                n,
                r,
                rows,
                columns,
                splits,
                n_chunk,
                BLOCK_M,
                BLOCK_N,
                BLOCK_R,
                UNROLL,
            )
    if HAS_SPACES:
        if pid >= attend:
            offs = (pid - attend) * BLOCK + tl.arange(0, BLOCK)
            row = (offs // width).to(tl.int64)
            column = (offs % width).to(tl.int64)
            part = tl.cast(rows, tl.int64) * columns
            total = _sum_parts(
                partial_ptr + (row * columns + r + column), row < rows, splits, part, 8
            )
            tl.store(x_ptr + (task * m * width + row * width + column), total, mask=row < m)
            if HAS_OFFSET:
                offsets = task * r * width + (row - m) * width + column
                tl.store(cross_ptr + offsets, total, mask=(row >= m) & (row < rows))


@triton.jit
def _combine(
    max_ptr,  # [n_splits, m], at the task; so are the others
    sum_ptr,  # [n_splits, m]
    attended_ptr,  # [n_splits, m, r]
    offs_m,
    offs_r,
    score_scale,
    m,
    r,
    n_splits,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """O [BLOCK_M, BLOCK_R], row maxima and row sums [BLOCK_M], from the chunks of n."""
    mask_m = offs_m < m
    mask_r = offs_r < r
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for i in range(n_splits):
        split = tl.cast(i, tl.int64)
        top = tl.maximum(top, tl.load(max_ptr + (split * m + offs_m), mask=mask_m, other=0.0))
    total = tl.zeros((BLOCK_M,), tl.float32)
    attended = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for i in range(n_splits):
        split = tl.cast(i, tl.int64)
        part_top = tl.load(max_ptr + (split * m + offs_m), mask=mask_m, other=0.0)
        scale = tl.exp((part_top - top) * score_scale)
        total += scale * tl.load(sum_ptr + (split * m + offs_m), mask=mask_m, other=1.0)
        part = _tile(attended_ptr + split * m * r, offs_m, r, mask_m, offs_r, 1, mask_r)
        attended += scale[:, None] * part
    return attended * (1.0 / total)[:, None], top, total


@triton.jit
def _logits(
    attended,
    x_ptr,  # [m, W], at the task; so are the others
    cross_ptr,  # [r, W]
    bias_ptr,
    stride_bias,
    offs_m,
    offs_k,
    mask_k,
    temperature,
    m,
    r,
    dims,
    width,
    HAS_OFFSET: tl.constexpr,
    PROMPT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """z of the spaces ``offs_k`` [BLOCK_M, BLOCK_K]; in prompt mode ``attended`` is a mean."""
    if PROMPT:
        total = tl.zeros((BLOCK_K,), tl.float32)
        for start in range(0, m, BLOCK_M):
            rows = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
            total += tl.sum(
                _tile(x_ptr + tl.cast(dims, tl.int64), rows, width, rows < m, offs_k, 1, mask_k), 0
            )
        z = tl.broadcast_to((total / m)[None, :], (BLOCK_M, BLOCK_K))
    else:
        z = _tile(x_ptr + tl.cast(dims, tl.int64), offs_m, width, offs_m < m, offs_k, 1, mask_k)
    if HAS_OFFSET:
        gate_ptr = cross_ptr + tl.cast(dims, tl.int64)
        z = _add_product(z, attended, gate_ptr, width, offs_k, 1, mask_k, r, BLOCK_M, BLOCK_R)
    bias = tl.load(bias_ptr + offs_k * stride_bias, mask=mask_k, other=0.0).to(tl.float32)
    return (z + bias[None, :]) / temperature


@triton.jit(do_not_specialize=["n_splits"])
def _expand_forward_kernel(
    out_ptr,  # P′ [T, m, d]
    stats_ptr,  # [T, 2, m]
    saved_attended_ptr,  # O [T, m, r]
    hidden_ptr,  # Hin [T, m, K·h]
    gates_ptr,  # g [T, m, K]
    max_ptr,  # [T, n_splits, m]
    sum_ptr,  # [T, n_splits, m]
    attended_ptr,  # [T, n_splits, m, r]
    x_ptr,  # R [T, m, W]
    cross_ptr,  # S [T, r, W]
    p_ptr,
    stride_pt,
    stride_pm,
    stride_pd,
    b_ptr,
    stride_bt,
    stride_br,
    stride_bd,
    up_ptr,
    stride_ut,
    stride_uk,
    stride_uj,
    stride_ud,
    bias_ptr,
    stride_biast,
    stride_biask,
    score_scale,
    temperature,
    m,
    r,
    spaces,
    d,
    n_splits,
    DIM: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_SPACES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PROMPT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of P′; the programs of the first d block also store what the backward needs."""
    d_blocks = tl.cdiv(d, BLOCK_D)
    row_blocks = tl.cdiv(m, BLOCK_M)
    pid = tl.program_id(0)
    d_block = pid % d_blocks
    row_block = pid // d_blocks % row_blocks
    task = (pid // (d_blocks * row_blocks)).to(tl.int64)
    offs_m = (row_block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_d = (d_block * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_m = offs_m < m
    mask_d = offs_d < d
    mask_r = offs_r < r

    acc = _tile(p_ptr + task * stride_pt, offs_m, stride_pm, mask_m, offs_d, stride_pd, mask_d)
    attended = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    gate_attended = attended
    if HAS_OFFSET:
        max_ptr += task * n_splits * m
        sum_ptr += task * n_splits * m
        attended_ptr += task * n_splits * m * r
        attended, top, total = _combine(
            max_ptr,
            sum_ptr,
            attended_ptr,
            offs_m,
            offs_r,
            score_scale,
            m,
            r,
            n_splits,
            BLOCK_M,
            BLOCK_R,
        )
        if d_block == 0:
            stats_ptr += task * 2 * m
            tl.store(stats_ptr + offs_m, top, mask=mask_m)
            tl.store(stats_ptr + (m + offs_m), total, mask=mask_m)
            _store_tile(
                saved_attended_ptr + task * m * r, attended, offs_m, r, mask_m, offs_r, 1, mask_r
            )
        gate_attended = attended
        if HAS_SPACES and PROMPT:
            attended_parts = tl.zeros((BLOCK_R,), tl.float32)
            for start in range(0, m, BLOCK_M):
                offs = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
                part, _, _ = _combine(
                    max_ptr,
                    sum_ptr,
                    attended_ptr,
                    offs,
                    offs_r,
                    score_scale,
                    m,
                    r,
                    n_splits,
                    BLOCK_M,
                    BLOCK_R,
                )
                attended_parts += tl.sum(part, 0)
            gate_attended = tl.broadcast_to((attended_parts / m)[None, :], (BLOCK_M, BLOCK_R))
        b_ptr += task * stride_bt
        acc = _add_product(
            acc, attended, b_ptr, stride_br, offs_d, stride_bd, mask_d, r, BLOCK_M, BLOCK_R
        )
    if HAS_SPACES:
        dims = spaces * DIM
        width = dims + spaces
        x_ptr += task * m * width
        cross_ptr += task * r * width
        bias_ptr += task * stride_biast
        up_ptr += task * stride_ut
        # The softmax over the spaces, in blocks of them: its maximum and sum first.
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, spaces, BLOCK_K):
            offs_k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
            mask_k = offs_k < spaces
            z = _logits(
                gate_attended,
                x_ptr,
                cross_ptr,
                bias_ptr,
                stride_biask,
                offs_m,
                offs_k,
                mask_k,
                temperature,
                m,
                r,
                dims,
                width,
                HAS_OFFSET,
                PROMPT,
                BLOCK_M,
                BLOCK_R,
                BLOCK_K,
            )
            z = tl.where(mask_k[None, :], z, float("-inf"))
            highest = tl.maximum(top, tl.max(z, 1))
            total = total * tl.exp(top - highest) + tl.sum(tl.exp(z - highest[:, None]), 1)
            top = highest
        for start in range(0, dims, BLOCK_C):
            columns = start + tl.arange(0, BLOCK_C)
            offs_c = columns.to(tl.int64)
            mask_c = columns < dims
            hidden = _tile(x_ptr, offs_m, width, mask_m, offs_c, 1, mask_c)
            if HAS_OFFSET:
                hidden = _add_product(
                    hidden, attended, cross_ptr, width, offs_c, 1, mask_c, r, BLOCK_M, BLOCK_R
                )
            space = columns // DIM
            z = _logits(
                gate_attended,
                x_ptr,
                cross_ptr,
                bias_ptr,
                stride_biask,
                offs_m,
                space.to(tl.int64),
                mask_c,
                temperature,
                m,
                r,
                dims,
                width,
                HAS_OFFSET,
                PROMPT,
                BLOCK_M,
                BLOCK_R,
                BLOCK_C,
            )
            z = tl.where(mask_c[None, :], z, float("-inf"))
            gates = tl.exp(z - top[:, None]) / total[:, None]
            if d_block == 0:
                _store_tile(
                    hidden_ptr + task * m * dims, hidden, offs_m, dims, mask_m, offs_c, 1, mask_c
                )
                _store_tile(
                    gates_ptr + task * m * spaces,
                    gates,
                    offs_m,
                    spaces,
                    mask_m,
                    space.to(tl.int64),
                    1,
                    mask_c & (columns % DIM == 0),
                )
            gated = gates * activate(hidden, ACTIVATION)
            offs_u = _space_offsets(columns, stride_uk, stride_uj, DIM)
            up = _tile(up_ptr, offs_u, 1, mask_c, offs_d, stride_ud, mask_d)
            acc = tl.dot(gated, up, acc, input_precision="ieee")
    _store_tile(out_ptr + task * m * d, acc, offs_m, d, mask_m, offs_d, 1, mask_d)


# Backward


@triton.jit
def _gate_products(
    partial_ptr,  # [splits, m, r + K·h], at the task and the first column of the spaces
    hidden_ptr,  # [m, K·h], at the task
    rows,
    columns,
    mask_c,
    m,
    dims,
    stride_row,
    splits,
    ACTIVATION: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """dC·φ(Hin) [BLOCK_M, BLOCK_C], whose sum over a space's columns is dg; and dC and Hin."""
    mask = (rows < m)[:, None] & mask_c[None, :]
    offs_c = columns.to(tl.int64)
    part = tl.cast(m, tl.int64) * stride_row
    grad = _sum_parts(
        partial_ptr + (rows[:, None] * stride_row + offs_c[None, :]), mask, splits, part, UNROLL
    )
    hidden = tl.load(hidden_ptr + (rows[:, None] * dims + offs_c[None, :]), mask=mask, other=0.0)
    return grad * activate(hidden, ACTIVATION), grad, hidden


@triton.jit
def _gate_means(
    partial_ptr,
    hidden_ptr,
    offs_m,
    columns,
    mask_c,
    m,
    dims,
    stride_row,
    splits,
    ACTIVATION: tl.constexpr,
    PROMPT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The products of rows ``offs_m``; in prompt mode their mean over all tokens in every row."""
    if PROMPT:
        total = tl.zeros((BLOCK_C,), tl.float32)
        for start in range(0, m, BLOCK_M):
            rows = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
            products, _, _ = _gate_products(
                partial_ptr,
                hidden_ptr,
                rows,
                columns,
                mask_c,
                m,
                dims,
                stride_row,
                splits,
                ACTIVATION,
                UNROLL,
            )
            total += tl.sum(products, 0)
        products = tl.broadcast_to((total / m)[None, :], (BLOCK_M, BLOCK_C))
    else:
        products, _, _ = _gate_products(
            partial_ptr,
            hidden_ptr,
            offs_m,
            columns,
            mask_c,
            m,
            dims,
            stride_row,
            splits,
            ACTIVATION,
            UNROLL,
        )
    return products


@triton.jit
def _gate_grads(
    partial_ptr,
    hidden_ptr,
    offs_m,
    start_k,
    m,
    spaces,
    stride_row,
    splits,
    DIM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PROMPT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """dg of the spaces from ``start_k`` on [BLOCK_M, BLOCK_K], zero beyond the last."""
    dims = spaces * DIM
    offs_k = start_k + tl.arange(0, BLOCK_K)
    grads = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(start_k * DIM, tl.minimum((start_k + BLOCK_K) * DIM, dims), BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        products = _gate_means(
            partial_ptr,
            hidden_ptr,
            offs_m,
            columns,
            columns < dims,
            m,
            dims,
            stride_row,
            splits,
            ACTIVATION,
            PROMPT,
            BLOCK_M,
            BLOCK_C,
            UNROLL,
        )
        # A product with zeros and ones adds up the columns of each space.
        member = (columns[:, None] // DIM == offs_k[None, :]).to(tl.float32)
        grads = tl.dot(products, member, grads, input_precision="ieee")
    return grads


@triton.jit
def _gate_backward(
    acc,
    partial_ptr,  # at the task, as the others
    hidden_ptr,
    gates_ptr,  # [m, K]
    cross_ptr,  # [r, W]
    dx_ptr,  # [m, W]
    first,
    last,
    store,
    offs_r,
    temperature,
    m,
    r,
    spaces,
    stride_row,
    splits,
    DIM: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PROMPT: tl.constexpr,
    SEVERAL: tl.constexpr,  # blocks of spaces
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Adds dz·S_gateᵀ of the row block at ``first`` to ``acc``, and stores dz.

    In prompt mode dz is the same for all tokens, and goes to the rows [first, last).
    """
    dims = spaces * DIM
    width = dims + spaces
    offs_m = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    mask_m = offs_m < m
    inner = tl.zeros((BLOCK_M,), tl.float32)  # Σ_k g_k·dg_k
    if SEVERAL:
        for start_k in range(0, spaces, BLOCK_K):
            offs_k = (start_k + tl.arange(0, BLOCK_K)).to(tl.int64)
            gates = _tile(gates_ptr, offs_m, spaces, mask_m, offs_k, 1, offs_k < spaces)
            d_gates = _gate_grads(
                partial_ptr,
                hidden_ptr,
                offs_m,
                start_k,
                m,
                spaces,
                stride_row,
                splits,
                DIM,
                ACTIVATION,
                PROMPT,
                BLOCK_M,
                BLOCK_C,
                BLOCK_K,
                UNROLL,
            )
            inner += tl.sum(gates * d_gates, 1)
    for start_k in range(0, spaces, BLOCK_K):
        offs_k = (start_k + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask_k = offs_k < spaces
        gates = _tile(gates_ptr, offs_m, spaces, mask_m, offs_k, 1, mask_k)
        d_gates = _gate_grads(
            partial_ptr,
            hidden_ptr,
            offs_m,
            start_k,
            m,
            spaces,
            stride_row,
            splits,
            DIM,
            ACTIVATION,
            PROMPT,
            BLOCK_M,
            BLOCK_C,
            BLOCK_K,
            UNROLL,
        )
        if not SEVERAL:
            inner = tl.sum(gates * d_gates, 1)
        d_z = gates * (d_gates - inner[:, None]) / temperature
        if store:
            if PROMPT:
                for row in range(first, last, BLOCK_M):
                    rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
                    _store_tile(
                        dx_ptr + tl.cast(dims, tl.int64),
                        d_z,
                        rows,
                        width,
                        rows < m,
                        offs_k,
                        1,
                        mask_k,
                    )
            else:
                _store_tile(
                    dx_ptr + tl.cast(dims, tl.int64), d_z, offs_m, width, mask_m, offs_k, 1, mask_k
                )
        if HAS_OFFSET:
            cross = _tile(
                cross_ptr + tl.cast(dims, tl.int64), offs_r, width, offs_r < r, offs_k, 1, mask_k
            )
            if offs_r.shape[0] > 128:
                # Holds back the loads of later operands, for which there are no registers yet.
                tl.debug_barrier()
            acc = tl.dot(d_z, tl.trans(cross), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["splits", "groups", "group_rows", "n_chunk"])
def _core_backward_kernel(
    dx_ptr,  # dX [T, m, W]
    dq_ptr,  # [T, n_chunks, m, r]
    da_ptr,  # [T, groups, n, r]
    partial_ptr,  # dC [T, splits, m, r + K·h]
    query_ptr,  # [T, m, r]
    stats_ptr,  # [T, 2, m]
    attended_ptr,  # [T, m, r]
    hidden_ptr,  # [T, m, K·h]
    gates_ptr,  # [T, m, K]
    cross_ptr,  # [T, r, W]
    a_ptr,
    stride_at,
    stride_an,
    stride_ar,
    scaling,
    score_scale,
    temperature,
    m,
    n,
    r,
    spaces,
    splits,
    groups,
    group_rows,
    n_chunk,
    DIM: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_SPACES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PROMPT: tl.constexpr,
    SEVERAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """A group of prompt rows against a chunk of n, block by block: its part of dQ and of dA.

    Each program finds dO of its rows anew, since dO needs the whole sum over d; those of the first
    chunk of n store dX.
    """
    positions = 1
    if HAS_OFFSET:
        positions = n
    n_chunks = tl.cdiv(positions, n_chunk)
    pid = tl.program_id(0)
    first_n = pid % n_chunks * n_chunk
    last_n = tl.minimum(first_n + n_chunk, positions)
    group = pid // n_chunks % groups
    task = (pid // (n_chunks * groups)).to(tl.int64)
    dq_ptr += (task * n_chunks + pid % n_chunks) * m * r
    dims = spaces * DIM
    width = dims + spaces
    columns_c = r + dims
    part = tl.cast(m, tl.int64) * columns_c
    partial_ptr += task * splits * part
    query_ptr += task * m * r
    stats_ptr += task * 2 * m
    attended_ptr += task * m * r
    hidden_ptr += task * m * dims
    gates_ptr += task * m * spaces
    cross_ptr += task * r * width
    dx_ptr += task * m * width
    a_ptr += task * stride_at
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_r = offs_r < r
    first = group * group_rows
    last = tl.minimum(first + group_rows, m)

    gate_part = tl.zeros((BLOCK_R,), tl.float32)  # of dO, the same for all tokens
    if HAS_SPACES and PROMPT:
        first_rows = _gate_backward(
            tl.zeros((BLOCK_M, BLOCK_R), tl.float32),
            partial_ptr + tl.cast(r, tl.int64),
            hidden_ptr,
            gates_ptr,
            cross_ptr,
            dx_ptr,
            first,
            last,
            first_n == 0,
            offs_r,
            temperature,
            m,
            r,
            spaces,
            columns_c,
            splits,
            DIM,
            HAS_OFFSET,
            ACTIVATION,
            PROMPT,
            SEVERAL,
            BLOCK_M,
            BLOCK_C,
            BLOCK_K,
            UNROLL,
        )
        top_row = (tl.arange(0, BLOCK_M) == 0)[:, None]
        gate_part = tl.sum(tl.where(top_row, first_rows, 0.0), 0)
    for start_n in range(first_n, last_n, BLOCK_N):
        tl.debug_barrier()  # the program's threads may read what others of them have written
        offs_n = (start_n + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask_n = offs_n < n
        d_a = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        for row in range(first, last, BLOCK_M):
            offs_m = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
            mask_m = offs_m < m
            d_attended = tl.broadcast_to(gate_part[None, :], (BLOCK_M, BLOCK_R))
            if HAS_OFFSET:
                d_attended += _sum_parts(
                    partial_ptr + (offs_m[:, None] * columns_c + offs_r[None, :]),
                    mask_m[:, None] & mask_r[None, :],
                    splits,
                    part,
                    UNROLL,
                )
            if HAS_SPACES:
                for start in range(0, dims, BLOCK_C):
                    columns = start + tl.arange(0, BLOCK_C)
                    offs_c = columns.to(tl.int64)
                    mask_c = columns < dims
                    _, grad, hidden = _gate_products(
                        partial_ptr + tl.cast(r, tl.int64),
                        hidden_ptr,
                        offs_m,
                        columns,
                        mask_c,
                        m,
                        dims,
                        columns_c,
                        splits,
                        ACTIVATION,
                        UNROLL,
                    )
                    offs_k = (columns // DIM).to(tl.int64)
                    gates = _tile(gates_ptr, offs_m, spaces, mask_m, offs_k, 1, mask_c)
                    d_hidden = grad * gates * activation_derivative(hidden, ACTIVATION)
                    if start_n == 0:
                        _store_tile(dx_ptr, d_hidden, offs_m, width, mask_m, offs_c, 1, mask_c)
                    if HAS_OFFSET:
                        cross = _tile(cross_ptr, offs_r, width, mask_r, offs_c, 1, mask_c)
                        if BLOCK_R > 128:
                            tl.debug_barrier()  # as in _gate_backward
                        d_attended = tl.dot(
                            d_hidden, tl.trans(cross), d_attended, input_precision="ieee"
                        )
                if not PROMPT:
                    d_attended = _gate_backward(
                        d_attended,
                        partial_ptr + tl.cast(r, tl.int64),
                        hidden_ptr,
                        gates_ptr,
                        cross_ptr,
                        dx_ptr,
                        row,
                        last,
                        start_n == 0,
                        offs_r,
                        temperature,
                        m,
                        r,
                        spaces,
                        columns_c,
                        splits,
                        DIM,
                        HAS_OFFSET,
                        ACTIVATION,
                        PROMPT,
                        SEVERAL,
                        BLOCK_M,
                        BLOCK_C,
                        BLOCK_K,
                        UNROLL,
                    )
            if HAS_OFFSET:
                d_attended = tl.where(mask_m[:, None], d_attended, 0.0)
                query = _tile(query_ptr, offs_m, r, mask_m, offs_r, 1, mask_r)
                top = tl.load(stats_ptr + offs_m, mask=mask_m, other=0.0)
                total = tl.load(stats_ptr + (m + offs_m), mask=mask_m, other=1.0)
                weights = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                weights = _add_product(
                    weights,
                    query,
                    a_ptr,
                    stride_ar,
                    offs_n,
                    stride_an,
                    mask_n,
                    r,
                    BLOCK_M,
                    BLOCK_R,
                    scaling,
                )
                weights = tl.where(mask_n[None, :], weights, float("-inf"))
                weights = tl.exp((weights - top[:, None]) * score_scale) * (1.0 / total)[:, None]
                d_a = tl.dot(tl.trans(weights), d_attended, d_a, input_precision="ieee")
                d_weights = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                d_weights = _add_product(
                    d_weights,
                    d_attended,
                    a_ptr,
                    stride_ar,
                    offs_n,
                    stride_an,
                    mask_n,
                    r,
                    BLOCK_M,
                    BLOCK_R,
                    scaling,
                )
                # Σ_j W·dW of each row is dO·O, summed in the order of dW = dO·(c·A)ᵀ.
                inner = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
                inner = _add_product(
                    inner, d_attended, attended_ptr, 1, offs_m, r, mask_m, r, BLOCK_M, BLOCK_R
                )
                diagonal = tl.arange(0, BLOCK_M)[:, None] == tl.arange(0, BLOCK_M)[None, :]
                delta = tl.sum(tl.where(diagonal, inner, 0.0), 1)
                d_scores = weights * (d_weights - delta[:, None]) * score_scale
                a = _tile(a_ptr, offs_n, stride_an, mask_n, offs_r, stride_ar, mask_r)
                d_query = tl.dot(d_scores * scaling, a, input_precision="ieee")
                if start_n > first_n:  # what this very program has written for the blocks before
                    d_query += _tile(dq_ptr, offs_m, r, mask_m, offs_r, 1, mask_r)
                _store_tile(dq_ptr, d_query, offs_m, r, mask_m, offs_r, 1, mask_r)
                d_a = tl.dot(tl.trans(d_scores), query, d_a, input_precision="ieee")
        if HAS_OFFSET:
            offset = (task * groups + group) * n * r
            _store_tile(da_ptr + offset, d_a * scaling, offs_n, r, mask_n, offs_r, 1, mask_r)


@triton.jit
def _grad_fused(
    y_ptr,  # at the task, as the others
    stride_ym,
    stride_yd,
    dx_ptr,  # [m, W]
    down_ptr,
    stride_down_k,
    stride_down_d,
    stride_down_j,
    gate_ptr,
    stride_gate_d,
    stride_gate_k,
    offs_m,
    mask_m,
    offs_d,
    mask_d,
    dims,
    width,
    DIM: tl.constexpr,
    HAS_SPACES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dF = Y + dX·[D | G]ᵀ [BLOCK_M, BLOCK_D]."""
    acc = _tile(y_ptr, offs_m, stride_ym, mask_m, offs_d, stride_yd, mask_d)
    if HAS_SPACES:
        for start in range(0, width, BLOCK_C):
            columns = start + tl.arange(0, BLOCK_C)
            mask_c = columns < width
            dx = _tile(dx_ptr, offs_m, width, mask_m, columns.to(tl.int64), 1, mask_c)
            down = _down_gate_tile(
                down_ptr,
                stride_down_k,
                stride_down_d,
                stride_down_j,
                gate_ptr,
                stride_gate_d,
                stride_gate_k,
                offs_d,
                mask_d,
                columns,
                dims,
                width,
                DIM,
            )
            acc = tl.dot(dx, tl.trans(down), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["groups"])
def _expand_backward_kernel(
    dp_ptr,  # [T, m, d]
    da_ptr,  # [T, n, r]
    db_ptr,  # [T, r, d]
    ddown_ptr,  # [T, K, d, h]
    dup_ptr,  # [T, K·h, d]
    dgate_ptr,  # [T, d, K]
    dbias_ptr,  # [T, K]
    dx_ptr,  # dX [T, m, W]
    dq_ptr,  # [T, n_chunks, m, r]
    da_parts_ptr,  # [T, groups, n, r]
    half_a_ptr,  # [T, n, r], what is added to dA; None if nothing is
    half_b_ptr,  # [T, r, d]
    attended_ptr,  # [T, m, r]
    hidden_ptr,  # [T, m, K·h]
    gates_ptr,  # [T, m, K]
    y_ptr,
    stride_yt,
    stride_ym,
    stride_yd,
    p_ptr,
    stride_pt,
    stride_pm,
    stride_pd,
    b_ptr,
    stride_bt,
    stride_br,
    stride_bd,
    down_ptr,
    stride_down_t,
    stride_down_k,
    stride_down_d,
    stride_down_j,
    gate_ptr,
    stride_gate_t,
    stride_gate_d,
    stride_gate_k,
    m,
    n,
    r,
    spaces,
    d,
    n_chunks,
    groups,
    DIM: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_SPACES: tl.constexpr,
    SUM_DA: tl.constexpr,
    HAS_HALVES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,  # rows of a tile of dB
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Tiles of the gradients, in this order: dB, d[D | G], dU, dP, dA, db."""
    dims = spaces * DIM
    width = dims + spaces
    d_blocks = tl.cdiv(d, BLOCK_D)
    b_tiles = 0
    if HAS_OFFSET:
        b_tiles = tl.cdiv(r, BLOCK_B)
    down_tiles = 0
    up_tiles = 0
    bias_tiles = 0
    if HAS_SPACES:
        down_tiles = tl.cdiv(width, BLOCK_C)
        up_tiles = tl.cdiv(dims, BLOCK_C)
        bias_tiles = tl.cdiv(spaces, BLOCK_K)
    a_tiles = 0
    if SUM_DA:
        a_tiles = tl.cdiv(n * r, BLOCK)
    p_tiles = tl.cdiv(m, BLOCK_M)
    tiled = (b_tiles + down_tiles + up_tiles + p_tiles) * d_blocks
    programs = tiled + a_tiles + bias_tiles
    task = (tl.program_id(0) // programs).to(tl.int64)
    pid = tl.program_id(0) % programs
    tile = pid // d_blocks
    offs_d = (pid % d_blocks * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_d = offs_d < d
    mask_r = offs_r < r
    dx_ptr += task * m * width
    dq_ptr += task * n_chunks * m * r
    attended_ptr += task * m * r
    y_ptr += task * stride_yt
    p_ptr += task * stride_pt
    b_ptr += task * stride_bt
    down_ptr += task * stride_down_t
    gate_ptr += task * stride_gate_t
    part = tl.cast(m, tl.int64) * r

    if HAS_OFFSET:
        if tile < b_tiles:
            offs_b = (tile * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
            mask_b = offs_b < r
            d_b = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
            if HAS_HALVES:
                half_b_ptr += task * r * d
                d_b = _tile(half_b_ptr, offs_b, d, mask_b, offs_d, 1, mask_d)
            for start in range(0, m, BLOCK_M):
                offs_m = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
                mask_m = offs_m < m
                grad = _grad_fused(
                    y_ptr,
                    stride_ym,
                    stride_yd,
                    dx_ptr,
                    down_ptr,
                    stride_down_k,
                    stride_down_d,
                    stride_down_j,
                    gate_ptr,
                    stride_gate_d,
                    stride_gate_k,
                    offs_m,
                    mask_m,
                    offs_d,
                    mask_d,
                    dims,
                    width,
                    DIM,
                    HAS_SPACES,
                    BLOCK_C,
                )
                attended = _tile(attended_ptr, offs_m, r, mask_m, offs_b, 1, mask_b)
                d_b = tl.dot(tl.trans(attended), grad, d_b, input_precision="ieee")
                d_query = _sum_parts(
                    dq_ptr + (offs_m[:, None] * r + offs_b[None, :]),
                    mask_m[:, None] & mask_b[None, :],
                    n_chunks,
                    part,
                    UNROLL,
                )
                p = _tile(p_ptr, offs_m, stride_pm, mask_m, offs_d, stride_pd, mask_d)
                d_b = tl.dot(tl.trans(d_query), p, d_b, input_precision="ieee")
            _store_tile(db_ptr + task * r * d, d_b, offs_b, d, mask_b, offs_d, 1, mask_d)

    if HAS_SPACES:
        if (tile >= b_tiles) & (tile < b_tiles + down_tiles):
            columns = (tile - b_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
            offs_c = columns.to(tl.int64)
            d_down = tl.zeros((BLOCK_D, BLOCK_C), tl.float32)
            for start in range(0, m, BLOCK_M):
                offs_m = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
                mask_m = offs_m < m
                fused = _tile(p_ptr, offs_m, stride_pm, mask_m, offs_d, stride_pd, mask_d)
                if HAS_OFFSET:
                    attended = _tile(attended_ptr, offs_m, r, mask_m, offs_r, 1, mask_r)
                    fused = _add_product(
                        fused,
                        attended,
                        b_ptr,
                        stride_br,
                        offs_d,
                        stride_bd,
                        mask_d,
                        r,
                        BLOCK_M,
                        BLOCK_R,
                    )
                dx = _tile(dx_ptr, offs_m, width, mask_m, offs_c, 1, columns < width)
                d_down = tl.dot(tl.trans(fused), dx, d_down, input_precision="ieee")
            offs_s = _space_offsets(columns, tl.cast(d, tl.int64) * DIM, 1, DIM)
            ddown_ptr += task * dims * d
            _store_tile(ddown_ptr, d_down, offs_d, DIM, mask_d, offs_s, 1, columns < dims)
            mask_gate = (columns >= dims) & (columns < width)
            dgate_ptr += task * d * spaces
            _store_tile(dgate_ptr, d_down, offs_d, spaces, mask_d, offs_c - dims, 1, mask_gate)

        first_up = b_tiles + down_tiles
        if (tile >= first_up) & (tile < first_up + up_tiles):
            columns = (tile - first_up) * BLOCK_C + tl.arange(0, BLOCK_C)
            offs_c = columns.to(tl.int64)
            offs_k = (columns // DIM).to(tl.int64)
            mask_c = columns < dims
            hidden_ptr += task * m * dims
            gates_ptr += task * m * spaces
            d_up = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
            for start in range(0, m, BLOCK_M):
                offs_m = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
                mask_m = offs_m < m
                hidden = _tile(hidden_ptr, offs_m, dims, mask_m, offs_c, 1, mask_c)
                gates = _tile(gates_ptr, offs_m, spaces, mask_m, offs_k, 1, mask_c)
                gated = gates * activate(hidden, ACTIVATION)
                y = _tile(y_ptr, offs_m, stride_ym, mask_m, offs_d, stride_yd, mask_d)
                d_up = tl.dot(tl.trans(gated), y, d_up, input_precision="ieee")
            _store_tile(dup_ptr + task * dims * d, d_up, offs_c, d, mask_c, offs_d, 1, mask_d)

    first_p = b_tiles + down_tiles + up_tiles
    if (tile >= first_p) & (pid < tiled):
        offs_m = ((tile - first_p) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = offs_m < m
        d_p = _grad_fused(
            y_ptr,
            stride_ym,
            stride_yd,
            dx_ptr,
            down_ptr,
            stride_down_k,
            stride_down_d,
            stride_down_j,
            gate_ptr,
            stride_gate_d,
            stride_gate_k,
            offs_m,
            mask_m,
            offs_d,
            mask_d,
            dims,
            width,
            DIM,
            HAS_SPACES,
            BLOCK_C,
        )
        if HAS_OFFSET:
            d_query = _sum_parts(
                dq_ptr + (offs_m[:, None] * r + offs_r[None, :]),
                mask_m[:, None] & mask_r[None, :],
                n_chunks,
                part,
                UNROLL,
            )
            d_p = _add_product(
                d_p, d_query, b_ptr, stride_br, offs_d, stride_bd, mask_d, r, BLOCK_M, BLOCK_R
            )
        _store_tile(dp_ptr + task * m * d, d_p, offs_m, d, mask_m, offs_d, 1, mask_d)

    if SUM_DA:
        if (pid >= tiled) & (pid < tiled + a_tiles):
            offs = ((pid - tiled) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
            size = tl.cast(n, tl.int64) * r
            d_a = _sum_parts(
                da_parts_ptr + task * groups * size + offs, offs < size, groups, size, 4
            )
            if HAS_HALVES:
                d_a += tl.load(half_a_ptr + task * size + offs, mask=offs < size, other=0.0)
            d_a = d_a.to(da_ptr.dtype.element_ty)
            tl.store(da_ptr + (task * size + offs), d_a, mask=offs < size)

    if HAS_SPACES:
        if pid >= tiled + a_tiles:
            offs_k = ((pid - tiled - a_tiles) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
            mask_k = offs_k < spaces
            d_bias = tl.zeros((BLOCK_K,), tl.float32)
            for start in range(0, m, BLOCK_M):
                offs_m = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
                d_bias += tl.sum(
                    _tile(
                        dx_ptr + tl.cast(dims, tl.int64),
                        offs_m,
                        width,
                        offs_m < m,
                        offs_k,
                        1,
                        mask_k,
                    ),
                    0,
                )
            d_bias = d_bias.to(dbias_ptr.dtype.element_ty)
            tl.store(dbias_ptr + (task * spaces + offs_k), d_bias, mask=mask_k)


# Host


def _or_stand_in(tensor: Any, stand_in: Any, number: int) -> tuple[Any, tuple[int, ...]]:
    """A tensor and its strides; if it is absent another, which no kernel reads."""
    return (stand_in, (1,) * number) if tensor is None else (tensor, tensor.stride())


def saved(add: Add, parameters: Parameters) -> Saved:
    """What the backward needs, made by ``add(shape, dtype)``."""
    tasks, m, _, r, spaces, dim, _ = parameters.sizes()
    dims = spaces * dim
    fused, gated = parameters.has_offset, parameters.has_spaces

    def make(wanted: bool, *shape: int) -> Any:
        return add(shape if wanted else (0,), torch.float32)

    return Saved(
        query=make(fused, tasks, m, r),
        stats=make(fused, tasks, 2, m),
        attended=make(fused, tasks, m, r),
        hidden=make(gated, tasks, m, dims),
        gates=make(gated, tasks, m, spaces),
        cross=make(fused and gated, tasks, r, dims + spaces),
    )


def forward(plan: Plan, parameters: Any, flags: Flags, out: Operand, add: Add, sizes: Any) -> None:
    """Describe the forward, with an offset or subspaces.

    Args:
        plan: to be filled.
        parameters: :class:`Parameters` of operands.
        flags: the operation's choices.
        out: where P′ ``[T, m, d]`` goes.
        add: makes what the backward needs, as :func:`saved` lists it.
        sizes: chooses the launch sizes.
    """
    tasks, m, n, r, spaces, dim, d = measures = parameters.sizes()
    has_offset, has_spaces = parameters.has_offset, parameters.has_spaces
    p = parameters.short_prompt
    query, stats, attended, hidden, gates, cross = saved(add, parameters)
    a, a_strides = _or_stand_in(parameters.offset_a, p, 3)
    b, b_strides = _or_stand_in(parameters.offset_b, p, 3)
    down, down_strides = _or_stand_in(parameters.space_down, p, 4)
    up, up_strides = _or_stand_in(parameters.space_up, p, 4)
    weight, weight_strides = _or_stand_in(parameters.gate_weight, p, 3)
    bias, bias_strides = _or_stand_in(parameters.gate_bias, p, 2)
    dims = spaces * dim
    width = dims + spaces
    config = sizes(*measures)

    rows = m + r if has_offset and has_spaces else m
    columns = r + width
    partial = plan.scratch((tasks, config.d_splits, rows, columns))
    tiles = triton.cdiv(rows, config.reduce_rows) * triton.cdiv(columns, config.reduce_columns)
    plan.launch(
        _reduce_kernel,
        tasks * tiles * config.d_splits,
        partial,
        p,
        *p.stride(),
        b,
        *b_strides,
        down,
        *(down_strides[i] for i in (0, 1, 3, 2)),
        weight,
        *weight_strides,
        m,
        r,
        dims,
        d,
        rows,
        columns,
        config.d_splits,
        config.d_chunk,
        DIM=dim,
        HAS_OFFSET=has_offset,
        HAS_SPACES=has_spaces,
        FORWARD=True,
        BLOCK_M=config.reduce_rows,
        BLOCK_N=config.reduce_columns,
        BLOCK_D=config.reduce_depth,
        num_warps=config.warps,
        num_stages=1,
    )

    splits = config.n_splits
    maxima = sums = attended_parts = x = partial
    programs = 0
    if has_offset:
        maxima, sums = plan.scratch((tasks, splits, m)), plan.scratch((tasks, splits, m))
        attended_parts = plan.scratch((tasks, splits, m, r))
        programs += triton.cdiv(m, config.rows) * splits
    if has_spaces:
        x = plan.scratch((tasks, m, width))
        programs += triton.cdiv(rows * width, config.elements)
    plan.launch(
        _core_forward_kernel,
        tasks * programs,
        partial,
        query,
        maxima,
        sums,
        attended_parts,
        x,
        cross,
        a,
        *a_strides,
        flags.scaling,
        d**-0.5,
        m,
        n,
        r,
        rows,
        columns,
        config.d_splits,
        splits,
        config.n_chunk,
        HAS_OFFSET=has_offset,
        HAS_SPACES=has_spaces,
        BLOCK_M=config.rows,
        BLOCK_N=config.positions,
        BLOCK_R=config.rank,
        BLOCK=config.elements,
        UNROLL=config.unroll,
        num_warps=config.warps,
        num_stages=1,
    )
    plan.launch(
        _expand_forward_kernel,
        tasks * triton.cdiv(m, config.rows) * triton.cdiv(d, config.expand_depth),
        out,
        stats,
        attended,
        hidden,
        gates,
        maxima,
        sums,
        attended_parts,
        x,
        cross,
        p,
        *p.stride(),
        b,
        *b_strides,
        up,
        *up_strides,
        bias,
        *bias_strides,
        d**-0.5,
        flags.temperature,
        m,
        r,
        spaces,
        d,
        splits,
        DIM=dim,
        HAS_OFFSET=has_offset,
        HAS_SPACES=has_spaces,
        ACTIVATION=flags.activation,
        PROMPT=flags.gate == "prompt",
        BLOCK_M=config.rows,
        BLOCK_R=config.rank,
        BLOCK_C=config.columns,
        BLOCK_K=config.spaces,
        BLOCK_D=config.expand_depth,
        num_warps=config.warps,
        num_stages=1,
    )


def backward(
    plan: Plan,
    grad: Operand,
    parameters: Any,
    flags: Flags,
    kept: Any,
    into: Any,
    halves: tuple[Operand, Operand] | None,
    sizes: Any,
) -> None:
    """Describe the backward, with an offset or subspaces.

    Args:
        plan: to be filled.
        grad: Y = dL/dP′ ``[T, m, d]``.
        parameters: :class:`Parameters` of operands.
        flags: the operation's choices.
        kept: :class:`Saved` of operands, contiguous.
        into: :class:`Parameters` of operands, where the gradients go.
        halves: float32, what is added to the gradients of A and B before they are rounded.
        sizes: chooses the launch sizes.
    """
    tasks, m, n, r, spaces, dim, d = measures = parameters.sizes()
    has_offset, has_spaces = parameters.has_offset, parameters.has_spaces
    p = parameters.short_prompt
    a, a_strides = _or_stand_in(parameters.offset_a, p, 3)
    b, b_strides = _or_stand_in(parameters.offset_b, p, 3)
    down, down_strides = _or_stand_in(parameters.space_down, p, 4)
    up, up_strides = _or_stand_in(parameters.space_up, p, 4)
    weight, weight_strides = _or_stand_in(parameters.gate_weight, p, 3)
    query, stats, attended, hidden, gates, cross = kept
    d_p, d_a, d_b, d_down, d_up, d_gate_weight, d_gate_bias = (
        into.short_prompt if each is None else each for each in into
    )
    half_a, half_b = halves or (None, None)
    dims = spaces * dim
    width = dims + spaces
    config = sizes(*measures)

    columns = r + dims
    splits = config.backward_d_splits
    partial = plan.scratch((tasks, splits, m, columns))
    tiles = triton.cdiv(m, config.reduce_rows) * triton.cdiv(columns, config.reduce_columns)
    plan.launch(
        _reduce_kernel,
        tasks * tiles * splits,
        partial,
        grad,
        *grad.stride(),
        b,
        *b_strides,
        up,
        *up_strides,
        weight,
        *weight_strides,
        m,
        r,
        dims,
        d,
        m,
        columns,
        splits,
        config.backward_d_chunk,
        DIM=dim,
        HAS_OFFSET=has_offset,
        HAS_SPACES=has_spaces,
        FORWARD=False,
        BLOCK_M=config.reduce_rows,
        BLOCK_N=config.reduce_columns,
        BLOCK_D=config.reduce_depth,
        num_warps=config.warps,
        num_stages=1,
    )

    n_chunks = triton.cdiv(n, config.backward_n_chunk) if has_offset else 1
    groups = config.groups
    dx = dq = da_parts = partial
    sum_da = has_offset and (groups > 1 or halves is not None)
    if has_offset:
        dq = plan.scratch((tasks, n_chunks, m, r))
        da_parts = plan.scratch((tasks, groups, n, r)) if sum_da else d_a
    if has_spaces:
        dx = plan.scratch((tasks, m, width))
    plan.launch(
        _core_backward_kernel,
        tasks * groups * n_chunks,
        dx,
        dq,
        da_parts,
        partial,
        query,
        stats,
        attended,
        hidden,
        gates,
        cross,
        a,
        *a_strides,
        flags.scaling,
        d**-0.5,
        flags.temperature,
        m,
        n,
        r,
        spaces,
        splits,
        groups,
        config.group_rows,
        config.backward_n_chunk,
        DIM=dim,
        HAS_OFFSET=has_offset,
        HAS_SPACES=has_spaces,
        ACTIVATION=flags.activation,
        PROMPT=flags.gate == "prompt",
        SEVERAL=spaces > config.spaces,
        BLOCK_M=config.rows,
        BLOCK_N=config.backward_positions,
        BLOCK_R=config.rank,
        BLOCK_C=config.columns,
        BLOCK_K=config.spaces,
        UNROLL=config.unroll,
        num_warps=config.warps,
        num_stages=1,
    )

    block_b = min(config.rank, 32)
    tiles = triton.cdiv(m, config.rows)
    programs = 0
    if has_offset:
        tiles += triton.cdiv(r, block_b)
    if has_spaces:
        tiles += triton.cdiv(width, config.columns) + triton.cdiv(dims, config.columns)
        programs += triton.cdiv(spaces, config.spaces)
    if sum_da:
        programs += triton.cdiv(n * r, config.elements)
    programs += tiles * triton.cdiv(d, config.expand_depth)
    plan.launch(
        _expand_backward_kernel,
        tasks * programs,
        d_p,
        d_a,
        d_b,
        d_down,
        d_up,
        d_gate_weight,
        d_gate_bias,
        dx,
        dq,
        da_parts,
        half_a,
        half_b,
        attended,
        hidden,
        gates,
        grad,
        *grad.stride(),
        p,
        *p.stride(),
        b,
        *b_strides,
        down,
        *down_strides,
        weight,
        *weight_strides,
        m,
        n,
        r,
        spaces,
        d,
        n_chunks,
        groups,
        DIM=dim,
        HAS_OFFSET=has_offset,
        HAS_SPACES=has_spaces,
        SUM_DA=sum_da,
        HAS_HALVES=halves is not None,
        ACTIVATION=flags.activation,
        BLOCK_M=config.rows,
        BLOCK_R=config.rank,
        BLOCK_B=block_b,
        BLOCK_C=config.columns,
        BLOCK_K=config.spaces,
        BLOCK_D=config.expand_depth,
        BLOCK=config.elements,
        UNROLL=config.unroll,
        num_warps=config.warps,
        num_stages=1,
    )
