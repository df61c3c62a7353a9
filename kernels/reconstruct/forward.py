"""Operation 1, forward, as METHOD's algebra has it:

    products over d   Q = P·Bᵀ   R = P·[D | G]   S = B·[D | G]
    core              W = softmax(Q·(c·A)ᵀ/√d)   O = W·(c·A)   [Hin | zin] = R + O·S
    expansion         g = softmax((zin + b)/τ)   P′ = P + [O | g_k·φ(H_k)]·[B ; U]

A program owns a block of prompt tokens and a chunk of d. What it needs of the rest it computes
itself. Programs that share tokens store the same bits in the same places, and each of them reads
there only what it has stored itself. Where that repeats too much, the products over d are made by
a launch of their own, and the attention by another, cut into chunks of n.

Scores may be large. So an exponential is taken of a difference of two products, which is 0 for the
largest score whatever its rounding, and A is scaled as it is read: if one position has all the
weight, O is then that row of c·A to the bit. No product's transpose is a factor of another.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ept_fast.kernels.reconstruct.core import (
    BLOCK,
    BLOCK_M,
    NONE,
    Task,
    add_product,
    blocks_of,
    load_gated,
    load_or_mean,
    load_up,
    reduce,
)
from ept_fast.kernels.tiles import (
    Matrix,
    dense,
    load,
    load_parts,
    matrix,
    product,
    store,
    transposed,
)

__all__ = ["reconstruct_attend_kernel", "reconstruct_forward_kernel"]


@triton.jit
def _store_query(t, query, sums, offs_m, splits, part):
    """Q of a block of tokens, from the parts of the products over d."""
    mask_m = offs_m < t.m
    for start in tl.range(0, t.r, BLOCK, num_stages=1, disable_licm=True):
        offs_r = (start + tl.arange(0, BLOCK)).to(tl.int64)
        mask_r = offs_r < t.r
        total = load_parts(sums, offs_m, mask_m, offs_r, mask_r, splits, part)
        store(query, total, offs_m, mask_m, offs_r, mask_r)


@triton.jit
def _attend(t, query, offs_m, offs_r, first, last, scaling, score_scale):
    """Attention of a block of tokens to the tiles [first, last) of positions.

    Maxima of the scores and sums of the exponentials [BLOCK_M]; these times c·A [BLOCK, BLOCK_M].
    """
    mask_m = offs_m < t.m
    of_a = matrix(t.a, t.task)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    attended = tl.zeros((BLOCK, BLOCK_M), tl.float32)
    for tile in tl.range(first, last, num_stages=1, disable_licm=True):
        offs_n = (tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        mask_n = offs_n < t.n
        scores = tl.zeros((BLOCK, BLOCK_M), tl.float32)
        scores = add_product(
            scores, of_a, offs_n, mask_n, transposed(query), offs_m, mask_m, t.r, scaling
        )
        scores = tl.where(mask_n[:, None], scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, 0))
        scale = tl.exp((top - highest) * score_scale)
        weights = tl.exp((scores - highest[None, :]) * score_scale)
        total = total * scale + tl.sum(weights, 0)
        a = load(transposed(of_a), offs_r, offs_r < t.r, offs_n, mask_n) * scaling
        attended = attended * scale[None, :] + product(a, weights)
        top = highest
    return top, total, attended


@triton.jit(do_not_specialize=["splits", "n_splits", "n_tiles"])
def reconstruct_attend_kernel(
    sums_ptr,  # [T, splits, rows, columns]
    query_ptr,  # [T, m, r]
    parts,  # maxima and sums [T, n_splits, m], attended [T, n_splits, m, r]
    p,
    a,
    sizes,
    numbers,  # c, 1/√d, τ
    rows,
    columns,
    splits,
    n_splits,
    n_tiles,
):
    """Attention of a block of tokens to a chunk of n."""
    split = tl.program_id(0) % n_splits
    blocks = tl.cdiv(sizes[0], BLOCK_M)
    block = tl.program_id(0) // n_splits % blocks
    task = (tl.program_id(0) // (n_splits * blocks)).to(tl.int64)
    m, n, r, spaces, dim, dims, width, d = sizes
    t = Task(task, m, n, r, spaces, dim, dims, width, d, p, a, NONE, NONE, NONE, NONE)
    offs_m = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    mask_m = offs_m < t.m
    query = dense(query_ptr, task, t.m, t.r)
    sums = dense(sums_ptr, task * splits, rows, columns)
    _store_query(t, query, sums, offs_m, splits, tl.cast(rows, tl.int64) * columns)
    tl.debug_barrier()  # the program's threads may read what others of them have written
    first = split * n_tiles
    last = tl.minimum(first + n_tiles, tl.cdiv(t.n, BLOCK))
    place = task * n_splits + split
    of_attended = transposed(dense(parts[2], place, t.m, t.r))
    for start in tl.range(0, t.r, BLOCK, num_stages=1, disable_licm=True):
        offs_r = (start + tl.arange(0, BLOCK)).to(tl.int64)
        top, total, attended = _attend(
            t, query, offs_m, offs_r, first, last, numbers[0], numbers[1]
        )
        tl.store(parts[0] + place * t.m + offs_m, top, mask=mask_m)
        tl.store(parts[1] + place * t.m + offs_m, total, mask=mask_m)
        store(of_attended, attended, offs_r, offs_r < t.r, offs_m, mask_m)


@triton.jit
def _combine(t, parts, offs_m, offs_r, score_scale, n_splits):
    """What :func:`_attend` gives for all positions, from the chunks of n."""
    first = t.task * n_splits
    mask_m = offs_m < t.m
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for i in range(n_splits):
        place = (first + i) * t.m + offs_m
        top = tl.maximum(top, tl.load(parts[0] + place, mask=mask_m, other=0.0))
    total = tl.zeros((BLOCK_M,), tl.float32)
    attended = tl.zeros((BLOCK, BLOCK_M), tl.float32)
    for i in range(n_splits):
        place = (first + i) * t.m + offs_m
        scale = tl.exp((tl.load(parts[0] + place, mask=mask_m, other=0.0) - top) * score_scale)
        total += scale * tl.load(parts[1] + place, mask=mask_m, other=1.0)
        part = transposed(dense(parts[2], first + i, t.m, t.r))
        attended += scale[None, :] * load(part, offs_r, offs_r < t.r, offs_m, mask_m)
    return top, total, attended


@triton.jit
def _project(t, sums, saved, logits, offs_m, splits, part):
    """[Hin | zin] = R + O·S of a block of tokens, to memory; so is S."""
    mask_m = offs_m < t.m
    for start in tl.range(0, t.width, BLOCK, num_stages=1, disable_licm=True):
        offs_c = (start + tl.arange(0, BLOCK)).to(tl.int64)
        mask_c = offs_c < t.width
        x = load_parts(sums, offs_m, mask_m, t.r + offs_c, mask_c, splits, part)
        if t.b is not None:
            for begin in tl.range(0, t.r, BLOCK, num_stages=1, disable_licm=True):
                offs_r = (begin + tl.arange(0, BLOCK)).to(tl.int64)
                mask_r = offs_r < t.r
                cross = load_parts(sums, t.m + offs_r, mask_r, t.r + offs_c, mask_c, splits, part)
                of_cross = dense(saved[5], t.task, t.r, t.width)
                store(of_cross, cross, offs_r, mask_r, offs_c, mask_c)
                of_attended = dense(saved[2], t.task, t.m, t.r)
                x += product(load(of_attended, offs_m, mask_m, offs_r, mask_r), cross)
        store(dense(saved[3], t.task, t.m, t.dims), x, offs_m, mask_m, offs_c, offs_c < t.dims)
        store(logits, x, offs_m, mask_m, offs_c - t.dims, (offs_c >= t.dims) & mask_c)


@triton.jit
def _logits(t, logits, bias, offs_m, offs_k, temperature, PROMPT: tl.constexpr):
    """z [BLOCK_M, BLOCK]; in prompt mode the mean over all tokens in every row."""
    mask_k = offs_k < t.spaces
    z = load_or_mean(t, logits, offs_m, offs_k, PROMPT)
    added = tl.load(bias.ptr + offs_k * bias.stride_j, mask=mask_k, other=0.0).to(tl.float32)
    return tl.where(mask_k[None, :], (z + added[None, :]) / temperature, float("-inf"))


@triton.jit
def _gates(t, gates, logits, bias, offs_m, temperature, PROMPT: tl.constexpr):
    """g of a block of tokens, to memory: the softmax's maximum and sum first."""
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in tl.range(0, t.spaces, BLOCK, num_stages=1, disable_licm=True):
        offs_k = (start + tl.arange(0, BLOCK)).to(tl.int64)
        z = _logits(t, logits, bias, offs_m, offs_k, temperature, PROMPT)
        highest = tl.maximum(top, tl.max(z, 1))
        total = total * tl.exp(top - highest) + tl.sum(tl.exp(z - highest[:, None]), 1)
        top = highest
    for start in tl.range(0, t.spaces, BLOCK, num_stages=1, disable_licm=True):
        offs_k = (start + tl.arange(0, BLOCK)).to(tl.int64)
        z = _logits(t, logits, bias, offs_m, offs_k, temperature, PROMPT)
        values = tl.exp(z - top[:, None]) / total[:, None]
        store(gates, values, offs_m, offs_m < t.m, offs_k, offs_k < t.spaces)


@triton.jit
def _expand(t, saved, offs_m, offs_d, ACTIVATION: tl.constexpr):
    """A tile of P′ = P + [O | g_k·φ(H_k)]·[B ; U]."""
    mask_m, mask_d = offs_m < t.m, offs_d < t.d
    out = load(matrix(t.p, t.task), offs_m, mask_m, offs_d, mask_d)
    if t.b is not None:
        attended, of_b = dense(saved[2], t.task, t.m, t.r), matrix(t.b, t.task)
        out = add_product(out, attended, offs_m, mask_m, of_b, offs_d, mask_d, t.r, 1.0)
    if t.up is not None:
        for start in tl.range(0, t.dims, BLOCK, num_stages=1, disable_licm=True):
            columns = start + tl.arange(0, BLOCK)
            gated = load_gated(t, saved, offs_m, columns, ACTIVATION)
            out += product(gated, load_up(t, columns, offs_d))
    return out


@triton.jit(do_not_specialize=["splits", "n_splits", "d_tiles"])
def reconstruct_forward_kernel(
    out_ptr,  # P′ [T, m, d]
    saved,  # Q [T, m, r], maxima and sums [T, 2, m], O, Hin [T, m, K·h], g [T, m, K], S [T, r, W]
    logits_ptr,  # zin [T, m, K]
    sums_ptr,  # [T, splits, rows, columns]
    parts,  # of the attention's own launch; None without one
    p,
    a,
    b,
    down,
    up,
    gate,
    bias,
    sizes,
    numbers,  # c, 1/√d, τ
    rows,
    columns,
    splits,
    n_splits,
    d_tiles,
    REDUCED: tl.constexpr,  # the products over d are made
    ACTIVATION: tl.constexpr,
    PROMPT: tl.constexpr,
):
    """P′ of a block of tokens and a chunk of d, and what the backward needs of these tokens."""
    chunks = tl.cdiv(sizes[7], d_tiles * BLOCK)
    blocks = tl.cdiv(sizes[0], BLOCK_M)
    chunk = tl.program_id(0) % chunks
    block = tl.program_id(0) // chunks % blocks
    task = (tl.program_id(0) // (chunks * blocks)).to(tl.int64)
    m, n, r, spaces, dim, dims, width, d = sizes
    t = Task(task, m, n, r, spaces, dim, dims, width, d, p, a, b, down, up, gate)
    sums = dense(sums_ptr, task * splits, rows, columns)
    part = tl.cast(rows, tl.int64) * columns
    own = block * BLOCK_M
    first = own
    last = own + BLOCK_M
    if PROMPT:  # the gate depends on all tokens
        first = 0
        last = t.m
    if not REDUCED:
        # The blocks of these tokens, and those of B, which come after those of all tokens.
        number = tl.cdiv(last - first, BLOCK_M)
        skipped = blocks - number
        for i in tl.range(blocks_of(t, True) - skipped, disable_licm=True):
            at = tl.where(i < number, first // BLOCK_M + i, skipped + i)
            reduce(t, sums, at, matrix(p, task), 0, tl.cdiv(t.d, BLOCK), True)
        tl.debug_barrier()  # the program's threads may read what others of them have written
    if b is not None:
        query = dense(saved[0], task, t.m, t.r)
        of_attended = transposed(dense(saved[2], task, t.m, t.r))
        for row in tl.range(first, last, BLOCK_M, num_stages=1, disable_licm=True):
            offs_m = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
            mask_m = offs_m < t.m
            if parts is None:
                _store_query(t, query, sums, offs_m, splits, part)
                tl.debug_barrier()
            for start in tl.range(0, t.r, BLOCK, num_stages=1, disable_licm=True):
                offs_r = (start + tl.arange(0, BLOCK)).to(tl.int64)
                if parts is None:
                    n_all = tl.cdiv(t.n, BLOCK)
                    top, total, attended = _attend(
                        t, query, offs_m, offs_r, 0, n_all, numbers[0], numbers[1]
                    )
                else:
                    top, total, attended = _combine(t, parts, offs_m, offs_r, numbers[1], n_splits)
                stats_ptr = saved[1] + task * 2 * t.m
                tl.store(stats_ptr + offs_m, top, mask=mask_m)
                tl.store(stats_ptr + (t.m + offs_m), total, mask=mask_m)
                attended *= (1.0 / total)[None, :]
                store(of_attended, attended, offs_r, offs_r < t.r, offs_m, mask_m)
        tl.debug_barrier()
    offs_m = (own + tl.arange(0, BLOCK_M)).to(tl.int64)
    if down is not None:
        logits = dense(logits_ptr, task, t.m, t.spaces)
        for row in tl.range(first, last, BLOCK_M, num_stages=1, disable_licm=True):
            offs = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
            _project(t, sums, saved, logits, offs, splits, part)
        tl.debug_barrier()
        gates = dense(saved[4], task, t.m, t.spaces)
        of_bias = Matrix(bias[0] + task * bias[1], 0, bias[2])
        _gates(t, gates, logits, of_bias, offs_m, numbers[2], PROMPT)
        tl.debug_barrier()
    last_tile = tl.minimum((chunk + 1) * d_tiles, tl.cdiv(t.d, BLOCK))
    for tile in tl.range(chunk * d_tiles, last_tile, num_stages=1, disable_licm=True):
        offs_d = (tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        out = _expand(t, saved, offs_m, offs_d, ACTIVATION)
        store(dense(out_ptr, task, t.m, t.d), out, offs_m, offs_m < t.m, offs_d, offs_d < t.d)
