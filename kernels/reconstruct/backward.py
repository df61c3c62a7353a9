"""Operation 1, backward, as METHOD's algebra has it:

    products over d   dC = Y·[B ; U]ᵀ                                     Y = dL/dP′
    core              dX = [dHin | dz]   dO = dC[:, :r] + dX·Sᵀ   dQ   dA
    expansion         dF = Y + dX·[D | G]ᵀ   F = P + O·B   dP = dF + dQ·B   dB = Oᵀ·dF + dQᵀ·P
                      d[D | G] = Fᵀ·dX   dU = (g·Φ)ᵀ·Y   db = Σ dz

With biases, Σ dHin and gᵀ·Y are their gradients, and Y times the bias of U, a further column of dC
for each subspace, is part of dg. Without a gate g is 1, and dX is dHin.

One kernel does the core, the expansion or both. Where it does both, a program owns a chunk of d and
a chunk of n of its task, computes the rest itself, and stores it where all programs of the task
store the same bits; each reads there only what it has stored itself. Where that repeats too much,
the products over d are made by a launch of their own, and the core by another, in which a program
owns a chunk of n and leaves its part of dQ.

The softmax's gradient cancels if one position has all the weight: W is made of the products that
the forward made, and Σ_j W·dW = dO·O of products like those of dW, in the same order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ept_fast.kernels import tiles
from ept_fast.kernels.activations import activate, activation_derivative
from ept_fast.kernels.reconstruct import config, core
from ept_fast.kernels.reconstruct.core import BLOCK, BLOCK_M, NONE, add_product, load_sum
from ept_fast.kernels.tiles import Axis, axis, dense, load, matrix, product, transposed

_KINDS = tiles.constant(config.KINDS)


class _Work(NamedTuple):
    """What the programs of a task read, and leave for later ones, besides what was kept."""

    y: Any
    products: Any  # dC [m, r + K·h], in parts; with a gate and biases K further columns
    d_x: Any  # dX [m, W]
    d_gates: Any  # dg [m, K]
    d_attended: Any  # dO [m, r]
    inner_ptr: Any  # Σ_j W·dW [m]
    d_query: Any  # dQ [m, r], in parts


@triton.jit
def _space_grads(t, kept, work, i, ACTIVATION: tl.constexpr):
    """dHin and dg of a block of tokens, to memory."""
    for start in tl.range(0, t.spaces, BLOCK, num_stages=1, disable_licm=True):
        k = axis(start, t.spaces, BLOCK)
        d_gate = tl.zeros((BLOCK_M, BLOCK), tl.float32)
        if t.gate is not None and t.up_bias is not None:
            first = t.r + t.dims
            d_gate = load_sum(work.products, i, axis(first + start, first + t.spaces, BLOCK))
        last = tl.minimum(start + BLOCK, t.spaces) * t.dim
        for column in tl.range(start * t.dim, last, BLOCK, num_stages=1, disable_licm=True):
            c = axis(column, last, BLOCK)
            grad = load_sum(work.products, i, axis(t.r + column, t.r + last, BLOCK))
            hidden = load(kept.hidden, i, c)
            if t.gate is None:
                grad *= activation_derivative(hidden, ACTIVATION)
            else:
                # A product with zeros and ones adds up the columns of each space.
                space = Axis(c.offs // t.dim, c.mask)
                member = (space.offs[:, None] == k.offs[None, :]).to(tl.float32)
                d_gate += product(grad * activate(hidden, ACTIVATION), member)
                grad *= load(kept.gates, i, space) * activation_derivative(hidden, ACTIVATION)
            tiles.store(work.d_x, grad, i, c)
        if t.gate is not None:
            tiles.store(work.d_gates, d_gate, i, k)


@triton.jit
def _logit_grads(t, kept, work, i, PROMPT: tl.constexpr):
    """dz of a block of tokens, to memory."""
    inner = tl.zeros((BLOCK_M,), tl.float32)  # Σ_k g_k·dg_k
    for start in tl.range(0, t.spaces, BLOCK, num_stages=1, disable_licm=True):
        k = axis(start, t.spaces, BLOCK)
        gates, grads = load(kept.gates, i, k), core.load_or_mean(t, work.d_gates, i, k, PROMPT)
        inner += tl.sum(gates * grads, 1)
    for start in tl.range(0, t.spaces, BLOCK, num_stages=1, disable_licm=True):
        k = axis(start, t.spaces, BLOCK)
        gates, grads = load(kept.gates, i, k), core.load_or_mean(t, work.d_gates, i, k, PROMPT)
        d_z = gates * (grads - inner[:, None]) / t.temperature
        tiles.store(work.d_x, d_z, i, axis(t.dims + start, t.width, BLOCK))


@triton.jit
def _attended_grads(t, kept, work, i):
    """dO = dC[:, :r] + dX·Sᵀ of a block of tokens and Σ_j W·dW = dO·O, to memory."""
    for start in tl.range(0, t.r, BLOCK, num_stages=1, disable_licm=True):
        j = axis(start, t.r, BLOCK)
        grad = load_sum(work.products, i, j)
        if t.down is not None:
            grad = add_product(grad, work.d_x, i, transposed(kept.cross), j, t.width)
        tiles.store(work.d_attended, grad, i, j)
    tl.debug_barrier()
    inner = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    inner = add_product(inner, kept.attended, i, transposed(work.d_attended), i, t.r)
    same = i.offs[:, None] == i.offs[None, :]
    tl.store(work.inner_ptr + i.offs, tl.sum(tl.where(same, inner, 0.0), 0), mask=i.mask)


@triton.jit
def _score_grads(t, kept, work, n, i):
    """W and the gradient of the scores, both [BLOCK, BLOCK_M]."""
    a = matrix(t.a, t.task)
    zeros = tl.zeros((BLOCK, BLOCK_M), tl.float32)
    scores = add_product(zeros, a, n, transposed(kept.query), i, t.r, t.scaling)
    top = tl.load(kept.stats_ptr + i.offs, mask=i.mask, other=0.0)
    total = tl.load(kept.stats_ptr + (t.m + i.offs), mask=i.mask, other=1.0)
    scores = tl.where(n.mask[:, None], scores, float("-inf"))
    weights = tl.exp((scores - top[None, :]) * t.score_scale) * (1.0 / total)[None, :]
    grads = add_product(zeros, a, n, transposed(work.d_attended), i, t.r, t.scaling)
    inner = tl.load(work.inner_ptr + i.offs, mask=i.mask, other=0.0)
    return weights, weights * (grads - inner[None, :]) * t.score_scale


@triton.jit
def _store_grad_a(t, kept, work, d_a_ptr, halves, begin, end):
    """dA of the positions from ``begin`` to ``end``."""
    for start in tl.range(begin, end, BLOCK, num_stages=1, disable_licm=True):
        n = axis(start, t.n, BLOCK)
        for first in tl.range(0, t.r, BLOCK, num_stages=1, disable_licm=True):
            j = axis(first, t.r, BLOCK)
            grad = tl.zeros((BLOCK, BLOCK), tl.float32)
            for row in tl.range(0, t.m, BLOCK_M, num_stages=1, disable_licm=True):
                i = axis(row, t.m, BLOCK_M)
                weights, d_scores = _score_grads(t, kept, work, n, i)
                grad += product(weights, load(work.d_attended, i, j))
                grad += product(d_scores, load(kept.query, i, j))
            grad *= t.scaling
            if halves is not None:
                grad += load(dense(halves[0], t.task, t.n, t.r), n, j)
            tiles.store(dense(d_a_ptr, t.task, t.n, t.r), grad, n, j)


@triton.jit
def _store_grad_query(t, kept, work, d_query, begin, end):
    """The part of dQ that the positions from ``begin`` to ``end`` give."""
    for row in tl.range(0, t.m, BLOCK_M, num_stages=1, disable_licm=True):
        i = axis(row, t.m, BLOCK_M)
        for first in tl.range(0, t.r, BLOCK, num_stages=1, disable_licm=True):
            j = axis(first, t.r, BLOCK)
            grad = tl.zeros((BLOCK, BLOCK_M), tl.float32)
            for start in tl.range(begin, end, BLOCK, num_stages=1, disable_licm=True):
                n = axis(start, t.n, BLOCK)
                _, d_scores = _score_grads(t, kept, work, n, i)
                a = load(transposed(matrix(t.a, t.task)), j, n) * t.scaling
                grad += product(a, d_scores)
            tiles.store(transposed(d_query), grad, j, i)


@triton.jit
def _fused_grad(t, work, i, j):
    """dF = Y + dX·[D | G]ᵀ [BLOCK_M, BLOCK]."""
    grad = load(work.y, i, j)
    if t.down is not None:
        for start in tl.range(0, t.width, BLOCK, num_stages=1, disable_licm=True):
            c = axis(start, t.width, BLOCK)
            down, at = core.spaces(t, t.down, Axis(c.offs, c.offs < t.dims), t.dim)
            if t.gate is None:
                both = load(down, j, at)
            else:
                k = Axis(c.offs - t.dims, c.mask & (c.offs >= t.dims))
                both = load(down, j, at) + load(matrix(t.gate, t.task), j, k)
            grad += product(load(work.d_x, i, c), tl.trans(both))
    return grad


@triton.jit
def _grad_prompt(t, work, d_prompt, j):
    """dP = dF + dQ·B."""
    for row in tl.range(0, t.m, BLOCK_M, num_stages=1, disable_licm=True):
        i = axis(row, t.m, BLOCK_M)
        grad = _fused_grad(t, work, i, j)
        if t.b is not None:
            for start in tl.range(0, t.r, BLOCK, num_stages=1, disable_licm=True):
                at = axis(start, t.r, BLOCK)
                grad += product(load_sum(work.d_query, i, at), load(matrix(t.b, t.task), at, j))
        tiles.store(d_prompt, grad, i, j)


@triton.jit
def _grad_b(t, kept, work, d_b, halves, j):
    """dB = Oᵀ·dF + dQᵀ·P."""
    d_query = (transposed(work.d_query[0]), work.d_query[1], work.d_query[2])
    for start in tl.range(0, t.r, BLOCK, num_stages=1, disable_licm=True):
        at = axis(start, t.r, BLOCK)
        grad = tl.zeros((BLOCK, BLOCK), tl.float32)
        if halves is not None:
            grad = load(dense(halves[1], t.task, t.r, t.d), at, j)
        for row in tl.range(0, t.m, BLOCK_M, num_stages=1, disable_licm=True):
            i = axis(row, t.m, BLOCK_M)
            fused = _fused_grad(t, work, i, j)
            grad += product(load(transposed(kept.attended), at, i), fused)
            grad += product(load_sum(d_query, at, i), load(matrix(t.p, t.task), i, j))
        tiles.store(d_b, grad, at, j)


@triton.jit
def _grad_down(t, kept, work, d_down, d_gate, j):
    """d[D | G]ᵀ = dXᵀ·F."""
    for start in tl.range(0, t.width, BLOCK, num_stages=1, disable_licm=True):
        c = axis(start, t.width, BLOCK)
        grad = tl.zeros((BLOCK, BLOCK), tl.float32)
        for row in tl.range(0, t.m, BLOCK_M, num_stages=1, disable_licm=True):
            i = axis(row, t.m, BLOCK_M)
            fused = load(matrix(t.p, t.task), i, j)
            if t.b is not None:
                fused = add_product(fused, kept.attended, i, matrix(t.b, t.task), j, t.r)
            grad += product(load(transposed(work.d_x), c, i), fused)
        down, at = core.spaces(t, d_down, Axis(c.offs, c.offs < t.dims), t.dim)
        tiles.store(transposed(down), grad, at, j)
        if t.gate is not None:
            k = Axis(c.offs - t.dims, c.mask & (c.offs >= t.dims))
            tiles.store(transposed(d_gate), grad, k, j)


@triton.jit
def _grad_up(t, kept, work, d_up, j, ACTIVATION: tl.constexpr):
    """dU = (g·Φ)ᵀ·Y."""
    for start in tl.range(0, t.dims, BLOCK, num_stages=1, disable_licm=True):
        c = axis(start, t.dims, BLOCK)
        grad = tl.zeros((BLOCK, BLOCK), tl.float32)
        for row in tl.range(0, t.m, BLOCK_M, num_stages=1, disable_licm=True):
            i = axis(row, t.m, BLOCK_M)
            gated = core.load_gated(t, kept, i, c, ACTIVATION)
            grad += product(tl.trans(gated), load(work.y, i, j))
        tiles.store(d_up, grad, c, j)


@triton.jit
def _grad_up_bias(t, kept, work, d_bias, j):
    """gᵀ·Y, or without a gate the sum of Y over the tokens."""
    for start in tl.range(0, t.spaces, BLOCK, num_stages=1, disable_licm=True):
        k = axis(start, t.spaces, BLOCK)
        grad = tl.zeros((BLOCK, BLOCK), tl.float32)
        for row in tl.range(0, t.m, BLOCK_M, num_stages=1, disable_licm=True):
            i = axis(row, t.m, BLOCK_M)
            y = load(work.y, i, j)
            if t.gate is None:
                grad += tl.sum(y, 0)[None, :]
            else:
                grad += product(load(transposed(kept.gates), k, i), y)
        tiles.store(d_bias, grad, k, j)


@triton.jit
def _grad_bias(t, work, d_bias_ptr, number, first, last):
    """db = Σ dz, or Σ dHin: so many columns of dX, from the first to the last."""
    for start in tl.range(0, number, BLOCK, num_stages=1, disable_licm=True):
        k, column = axis(start, number, BLOCK), axis(first + start, last, BLOCK)
        grad = tl.zeros((BLOCK,), tl.float32)
        for row in tl.range(0, t.m, BLOCK_M, num_stages=1, disable_licm=True):
            grad += tl.sum(load(work.d_x, axis(row, t.m, BLOCK_M), column), 0)
        ptrs = d_bias_ptr + t.task * number + k.offs
        tl.store(ptrs, grad.to(d_bias_ptr.dtype.element_ty), mask=k.mask)


@triton.jit(do_not_specialize=["splits", "n_parts", "pieces", "n_tiles", "d_tiles"])
def reconstruct_backward_kernel(
    grads,  # dP, dA, dB, dD [T, K, d, h], dU, dG, db, and those of the biases, without gaps
    halves,  # what is added to dA and dB, float32; None: nothing
    work_ptrs,  # dX [T, m, W], dg [T, m, K], dO [T, m, r], dO·O [T, m], dQ [T, n_parts, m, r]
    sums,  # dC: address of [T, splits, rows, columns], rows, columns, blocks to be made if any
    kept_ptrs,  # what `Kept` lists, of all tasks
    y,
    of,
    splits,
    n_parts,
    pieces,
    n_tiles,
    d_tiles,
    CORE: tl.constexpr,
    EXPAND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PROMPT: tl.constexpr,
):
    """A piece of a task's gradients: the core for a chunk of n, the expansion of a chunk of d."""
    piece, _, task = core.program(pieces, 1)
    t = core.Task(task, *of)
    kept = core.kept_of(t, kept_ptrs)
    work = _Work(
        matrix(y, task),
        core.parts_of(sums[0], task, splits, sums[1], sums[2]),
        dense(work_ptrs[0], task, t.m, t.width),
        dense(work_ptrs[1], task, t.m, t.spaces),
        dense(work_ptrs[2], task, t.m, t.r),
        work_ptrs[3] + task * t.m,
        core.parts_of(work_ptrs[4], task, n_parts, t.m, t.r),
    )
    if CORE:
        if sums[3] is not None:
            for block in tl.range(sums[3], disable_licm=True):
                if t.gate is not None and t.up_bias is not None:
                    turned = (t.up_bias[0], t.up_bias[1], t.up_bias[3], t.up_bias[2])
                    core.reduce(t, work.products[0], block, y, t.up, turned, NONE, False)
                else:
                    core.reduce(t, work.products[0], block, y, t.up, NONE, NONE, False)
            tl.debug_barrier()  # the program's threads may read what others of them have written
        if t.down is not None:
            for row in tl.range(0, t.m, BLOCK_M, num_stages=1, disable_licm=True):
                _space_grads(t, kept, work, axis(row, t.m, BLOCK_M), ACTIVATION)
            tl.debug_barrier()
            if t.gate is not None:
                for row in tl.range(0, t.m, BLOCK_M, num_stages=1, disable_licm=True):
                    _logit_grads(t, kept, work, axis(row, t.m, BLOCK_M), PROMPT)
                tl.debug_barrier()
        if t.b is not None:
            for row in tl.range(0, t.m, BLOCK_M, num_stages=1, disable_licm=True):
                _attended_grads(t, kept, work, axis(row, t.m, BLOCK_M))
            tl.debug_barrier()
            begin = piece * n_tiles * BLOCK
            end = tl.minimum(begin + n_tiles * BLOCK, t.n)
            _store_grad_a(t, kept, work, grads[1], halves, begin, end)
            if EXPAND:  # which needs all of dQ
                _store_grad_query(t, kept, work, work.d_query[0], 0, t.n)
            else:
                part = dense(work_ptrs[4], task * n_parts + piece, t.m, t.r)
                _store_grad_query(t, kept, work, part, begin, end)
            tl.debug_barrier()
    if EXPAND:
        kind = -1  # all gradients
        chunk = piece
        if not CORE:
            kind = piece % _KINDS
            chunk = piece // _KINDS
        begin = chunk * d_tiles * BLOCK
        end = tl.minimum(begin + d_tiles * BLOCK, t.d)
        for start in tl.range(begin, end, BLOCK, num_stages=1, disable_licm=True):
            j = axis(start, t.d, BLOCK)
            if (kind < 0) | (kind == 0):
                _grad_prompt(t, work, dense(grads[0], task, t.m, t.d), j)
            if t.b is not None:
                if (kind < 0) | (kind == 1):
                    _grad_b(t, kept, work, dense(grads[2], task, t.r, t.d), halves, j)
            if t.down is not None:
                if (kind < 0) | (kind == 2):
                    d = tl.cast(t.d, tl.int64)
                    d_down = (grads[3], d * t.dims, d * t.dim, 1, t.dim)
                    d_gate = grads[5]
                    if t.gate is not None:
                        d_gate = dense(d_gate, task, t.d, t.spaces)
                    _grad_down(t, kept, work, d_down, d_gate, j)
                if (kind < 0) | (kind == 3):
                    _grad_up(t, kept, work, dense(grads[4], task, t.dims, t.d), j, ACTIVATION)
                    if t.up_bias is not None:
                        _grad_up_bias(t, kept, work, dense(grads[8], task, t.spaces, t.d), j)
        if t.gate is not None:
            if piece == 0:
                _grad_bias(t, work, grads[6], t.spaces, t.dims, t.width)
        if t.down_bias is not None:
            if piece == 0:
                _grad_bias(t, work, grads[7], t.dims, 0, t.dims)
