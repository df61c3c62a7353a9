"""Operation 1, forward, as METHOD's algebra has it:

    products over d   Q = P·Bᵀ   R = P·[D | G]   S = B·[D | G]
    core              W = softmax(Q·(c·A)ᵀ/√d)   O = W·(c·A)   [Hin | zin] = R + O·S
    expansion         g = softmax((zin + b)/τ)   P′ = P + [O | g_k·φ(H_k)]·[B ; U]

Biases of D and U are added to Hin before it is kept and, times g, to P′. A single subspace may
have no gate, neither G nor b: g is 1.

A program owns a block of prompt tokens and a chunk of d. What it needs of the rest it computes
itself. Programs that share tokens store the same bits in the same places, and each of them reads
there only what it has stored itself. Where that repeats too much, the products over d are made by
a launch of their own, and the attention by another, cut into chunks of n.

Scores may be large. So an exponential is taken of a difference of two products, which is 0 for the
largest score whatever its rounding, and A is scaled as it is read: if one position has all the
weight, O is then that row of c·A to the bit. No product's transpose is a factor of another.
"""

import triton
import triton.language as tl

from ept_fast.kernels.reconstruct import core
from ept_fast.kernels.reconstruct.core import BLOCK, BLOCK_M, NONE, add_product, load_sum
from ept_fast.kernels.tiles import Axis, axis, dense, load, matrix, product, store, transposed


@triton.jit
def _store_query(t, query, sums, i):
    """Q of a block of tokens, from the parts of the products over d."""
    for start in tl.range(0, t.r, BLOCK, num_stages=1, disable_licm=True):
        j = axis(start, t.r, BLOCK)
        store(query, load_sum(sums, i, j), i, j)


@triton.jit
def _attend(t, query, i, j, begin, end):
    """Attention of a block of tokens to the positions from ``begin`` to ``end``.

    Maxima of the scores and sums of the exponentials [BLOCK_M]; these times c·A [BLOCK, BLOCK_M].
    """
    a = matrix(t.a, t.task)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    attended = tl.zeros((BLOCK, BLOCK_M), tl.float32)
    for start in tl.range(begin, end, BLOCK, num_stages=1, disable_licm=True):
        n = axis(start, t.n, BLOCK)
        scores = tl.zeros((BLOCK, BLOCK_M), tl.float32)
        scores = add_product(scores, a, n, transposed(query), i, t.r, t.scaling)
        scores = tl.where(n.mask[:, None], scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, 0))
        scale = tl.exp((top - highest) * t.score_scale)
        weights = tl.exp((scores - highest[None, :]) * t.score_scale)
        total = total * scale + tl.sum(weights, 0)
        values = load(transposed(a), j, n) * t.scaling
        attended = attended * scale[None, :] + product(values, weights)
        top = highest
    return top, total, attended


@triton.jit(do_not_specialize=["splits", "n_splits", "n_tiles"])
def reconstruct_attend_kernel(
    sums,  # address of [T, splits, rows, columns], rows, columns
    query_ptr,  # [T, m, r]
    parts,  # maxima and sums [T, n_splits, m], attended [T, n_splits, m, r]
    of,
    splits,
    n_splits,
    n_tiles,
):
    """Attention of a block of tokens to a chunk of n."""
    split, block, task = core.program(n_splits, tl.cdiv(of[0], BLOCK_M))
    t = core.Task(task, *of)
    i = axis(block * BLOCK_M, t.m, BLOCK_M)
    query = dense(query_ptr, task, t.m, t.r)
    _store_query(t, query, core.parts_of(sums[0], task, splits, sums[1], sums[2]), i)
    tl.debug_barrier()  # the program's threads may read what others of them have written
    begin = split * n_tiles * BLOCK
    end = tl.minimum(begin + n_tiles * BLOCK, t.n)
    place = task * n_splits + split
    for start in tl.range(0, t.r, BLOCK, num_stages=1, disable_licm=True):
        j = axis(start, t.r, BLOCK)
        top, total, attended = _attend(t, query, i, j, begin, end)
        tl.store(parts[0] + place * t.m + i.offs, top, mask=i.mask)
        tl.store(parts[1] + place * t.m + i.offs, total, mask=i.mask)
        store(transposed(dense(parts[2], place, t.m, t.r)), attended, j, i)


@triton.jit
def _combine(t, parts, i, j, n_splits):
    """What :func:`_attend` gives for all positions, from the chunks of n."""
    first = t.task * n_splits
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for split in range(n_splits):
        place = (first + split) * t.m + i.offs
        top = tl.maximum(top, tl.load(parts[0] + place, mask=i.mask, other=0.0))
    total = tl.zeros((BLOCK_M,), tl.float32)
    attended = tl.zeros((BLOCK, BLOCK_M), tl.float32)
    for split in range(n_splits):
        place = (first + split) * t.m + i.offs
        scale = tl.exp((tl.load(parts[0] + place, mask=i.mask, other=0.0) - top) * t.score_scale)
        total += scale * tl.load(parts[1] + place, mask=i.mask, other=1.0)
        part = transposed(dense(parts[2], first + split, t.m, t.r))
        attended += scale[None, :] * load(part, j, i)
    return top, total, attended


@triton.jit
def _project(t, kept, logits, sums, i):
    """[Hin | zin] = R + O·S of a block of tokens, to memory; so is S."""
    for start in tl.range(0, t.width, BLOCK, num_stages=1, disable_licm=True):
        c, column = axis(start, t.width, BLOCK), axis(t.r + start, t.r + t.width, BLOCK)
        x = load_sum(sums, i, column)
        if t.b is not None:
            for begin in tl.range(0, t.r, BLOCK, num_stages=1, disable_licm=True):
                j = axis(begin, t.r, BLOCK)
                cross = load_sum(sums, axis(t.m + begin, t.m + t.r, BLOCK), column)
                store(kept.cross, cross, j, c)
                x += product(load(kept.attended, i, j), cross)
        if t.down_bias is not None:
            space = c.offs // t.dim
            ptrs = t.down_bias[0] + (t.task * t.down_bias[1] + space * t.down_bias[2])
            ptrs += (c.offs - space * t.dim) * t.down_bias[3]
            bias = tl.load(ptrs, mask=c.offs < t.dims, other=0.0).to(tl.float32)
            x += bias[None, :]
        store(kept.hidden, x, i, Axis(c.offs, c.offs < t.dims))
        if t.gate is not None:
            store(logits, x, i, Axis(c.offs - t.dims, c.mask & (c.offs >= t.dims)))


@triton.jit
def _logits(t, logits, i, k, PROMPT: tl.constexpr):
    """z [BLOCK_M, BLOCK]; in prompt mode the mean over all tokens in every row."""
    z = core.load_or_mean(t, logits, i, k, PROMPT)
    ptrs = t.bias[0] + t.task * t.bias[1] + k.offs * t.bias[2]
    bias = tl.load(ptrs, mask=k.mask, other=0.0).to(tl.float32)
    return tl.where(k.mask[None, :], (z + bias[None, :]) / t.temperature, float("-inf"))


@triton.jit
def _gates(t, gates, logits, i, PROMPT: tl.constexpr):
    """g of a block of tokens, to memory: the softmax's maximum and sum first."""
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in tl.range(0, t.spaces, BLOCK, num_stages=1, disable_licm=True):
        z = _logits(t, logits, i, axis(start, t.spaces, BLOCK), PROMPT)
        highest = tl.maximum(top, tl.max(z, 1))
        total = total * tl.exp(top - highest) + tl.sum(tl.exp(z - highest[:, None]), 1)
        top = highest
    for start in tl.range(0, t.spaces, BLOCK, num_stages=1, disable_licm=True):
        k = axis(start, t.spaces, BLOCK)
        z = _logits(t, logits, i, k, PROMPT)
        store(gates, tl.exp(z - top[:, None]) / total[:, None], i, k)


@triton.jit
def _expand(t, kept, i, j, ACTIVATION: tl.constexpr):
    """A tile of P′ = P + [O | g_k·φ(H_k)]·[B ; U]."""
    out = load(matrix(t.p, t.task), i, j)
    if t.b is not None:
        out = add_product(out, kept.attended, i, matrix(t.b, t.task), j, t.r)
    if t.up is not None:
        for start in tl.range(0, t.dims, BLOCK, num_stages=1, disable_licm=True):
            c = axis(start, t.dims, BLOCK)
            gated = core.load_gated(t, kept, i, c, ACTIVATION)
            up, at = core.spaces(t, t.up, c, t.dim)
            out += product(gated, load(transposed(up), at, j))
    if t.up_bias is not None:
        bias = matrix(t.up_bias, t.task)
        if t.gate is None:
            values = tl.load(bias.ptr + j.offs * bias.stride_j, mask=j.mask, other=0.0)
            out += values.to(tl.float32)[None, :]
        else:
            out = add_product(out, kept.gates, i, bias, j, t.spaces)
    return out


@triton.jit(do_not_specialize=["splits", "n_splits", "d_tiles"])
def reconstruct_forward_kernel(
    out_ptr,  # P′ [T, m, d]
    kept_ptrs,  # what `Kept` lists, of all tasks
    logits_ptr,  # zin [T, m, K]
    sums,  # address of [T, splits, rows, columns], rows, columns, blocks to be made if any
    parts,  # of the attention's own launch; None without one
    of,
    splits,
    n_splits,
    d_tiles,
    ACTIVATION: tl.constexpr,
    PROMPT: tl.constexpr,
):
    """P′ of a block of tokens and a chunk of d, and what the backward needs of these tokens."""
    blocks = tl.cdiv(of[0], BLOCK_M)
    chunk, block, task = core.program(tl.cdiv(of[7], d_tiles * BLOCK), blocks)
    t = core.Task(task, *of)
    kept = core.kept_of(t, kept_ptrs)
    products = core.parts_of(sums[0], task, splits, sums[1], sums[2])
    first = block * BLOCK_M
    last = first + BLOCK_M
    i = axis(first, t.m, BLOCK_M)
    if PROMPT:  # the gate depends on all tokens
        first = 0
        last = t.m
    if sums[3] is not None:
        # The blocks of these tokens, and those of B, which come after those of all tokens.
        number = tl.cdiv(last - first, BLOCK_M)
        skipped = blocks - number
        for each in tl.range(sums[3] - skipped, disable_licm=True):
            at = tl.where(each < number, first // BLOCK_M + each, skipped + each)
            core.reduce(t, products[0], at, t.p, t.down, t.gate, NONE, True)
        tl.debug_barrier()  # the program's threads may read what others of them have written
    if t.b is not None:
        for row in tl.range(first, last, BLOCK_M, num_stages=1, disable_licm=True):
            rows = axis(row, t.m, BLOCK_M)
            if parts is None:
                _store_query(t, kept.query, products, rows)
                tl.debug_barrier()
            for start in tl.range(0, t.r, BLOCK, num_stages=1, disable_licm=True):
                j = axis(start, t.r, BLOCK)
                if parts is None:
                    top, total, attended = _attend(t, kept.query, rows, j, 0, t.n)
                else:
                    top, total, attended = _combine(t, parts, rows, j, n_splits)
                tl.store(kept.stats_ptr + rows.offs, top, mask=rows.mask)
                tl.store(kept.stats_ptr + (t.m + rows.offs), total, mask=rows.mask)
                store(transposed(kept.attended), attended * (1.0 / total)[None, :], j, rows)
        tl.debug_barrier()
    if t.down is not None:
        logits = dense(logits_ptr, task, t.m, t.spaces)
        for row in tl.range(first, last, BLOCK_M, num_stages=1, disable_licm=True):
            _project(t, kept, logits, products, axis(row, t.m, BLOCK_M))
        tl.debug_barrier()
        if t.gate is not None:
            _gates(t, kept.gates, logits, i, PROMPT)
            tl.debug_barrier()
    begin = chunk * d_tiles * BLOCK
    end = tl.minimum(begin + d_tiles * BLOCK, t.d)
    for start in tl.range(begin, end, BLOCK, num_stages=1, disable_licm=True):
        j = axis(start, t.d, BLOCK)
        store(dense(out_ptr, task, t.m, t.d), _expand(t, kept, i, j, ACTIVATION), i, j)
