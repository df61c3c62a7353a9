"""Operation 1, backward, as METHOD's algebra has it; here the core, in :mod:`.expand` the rest.

    products over d   dC = Y·[B ; U]ᵀ                                     Y = dL/dP′
    core              dX = [dHin | dz]   dO = dC[:, :r] + dX·Sᵀ   dQ   dA
    expansion         dF = Y + dX·[D | G]ᵀ   F = P + O·B   dP = dF + dQ·B   dB = Oᵀ·dF + dQᵀ·P
                      d[D | G] = Fᵀ·dX   dU = (g·Φ)ᵀ·Y   db = Σ dz

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

from ept_fast.kernels.activations import activate, activation_derivative
from ept_fast.kernels.reconstruct.core import (
    BLOCK,
    BLOCK_M,
    Task,
    add_product,
    load_or_mean,
    reduce,
)
from ept_fast.kernels.reconstruct.expand import KINDS, expand, grad_bias
from ept_fast.kernels.tiles import dense, load, load_parts, matrix, product, store, transposed

__all__ = ["reconstruct_backward_kernel"]


@triton.jit
def _space_grads(t, d_x, d_gates, sums, saved, offs_m, splits, ACTIVATION: tl.constexpr):
    """dHin and dg of a block of tokens, to memory."""
    mask_m = offs_m < t.m
    part = tl.cast(t.m, tl.int64) * sums.stride_i
    of_hidden = dense(saved[3], t.task, t.m, t.dims)
    of_gates = dense(saved[4], t.task, t.m, t.spaces)
    for start in tl.range(0, t.spaces, BLOCK, num_stages=1, disable_licm=True):
        offs_k = (start + tl.arange(0, BLOCK)).to(tl.int64)
        d_gate = tl.zeros((BLOCK_M, BLOCK), tl.float32)
        last = tl.minimum(start + BLOCK, t.spaces) * t.dim
        for column in tl.range(start * t.dim, last, BLOCK, num_stages=1, disable_licm=True):
            offs_c = (column + tl.arange(0, BLOCK)).to(tl.int64)
            mask_c = offs_c < last
            grad = load_parts(sums, offs_m, mask_m, t.r + offs_c, mask_c, splits, part)
            hidden = load(of_hidden, offs_m, mask_m, offs_c, mask_c)
            # A product with zeros and ones adds up the columns of each space.
            member = (offs_c[:, None] // t.dim == offs_k[None, :]).to(tl.float32)
            d_gate += product(grad * activate(hidden, ACTIVATION), member)
            gates = load(of_gates, offs_m, mask_m, offs_c // t.dim, mask_c)
            grad *= gates * activation_derivative(hidden, ACTIVATION)
            store(d_x, grad, offs_m, mask_m, offs_c, mask_c)
        store(d_gates, d_gate, offs_m, mask_m, offs_k, offs_k < t.spaces)


@triton.jit
def _logit_grads(t, d_x, d_gates, gates, offs_m, temperature, PROMPT: tl.constexpr):
    """dz of a block of tokens, to memory."""
    mask_m = offs_m < t.m
    inner = tl.zeros((BLOCK_M,), tl.float32)  # Σ_k g_k·dg_k
    for start in tl.range(0, t.spaces, BLOCK, num_stages=1, disable_licm=True):
        offs_k = (start + tl.arange(0, BLOCK)).to(tl.int64)
        g = load(gates, offs_m, mask_m, offs_k, offs_k < t.spaces)
        inner += tl.sum(g * load_or_mean(t, d_gates, offs_m, offs_k, PROMPT), 1)
    for start in tl.range(0, t.spaces, BLOCK, num_stages=1, disable_licm=True):
        offs_k = (start + tl.arange(0, BLOCK)).to(tl.int64)
        mask_k = offs_k < t.spaces
        g = load(gates, offs_m, mask_m, offs_k, mask_k)
        grads = load_or_mean(t, d_gates, offs_m, offs_k, PROMPT)
        d_z = g * (grads - inner[:, None]) / temperature
        store(d_x, d_z, offs_m, mask_m, t.dims + offs_k, mask_k)


@triton.jit
def _attended_grads(t, d_attended, d_x, sums, saved, offs_m, splits):
    """dO = dC[:, :r] + dX·Sᵀ of a block of tokens, to memory."""
    mask_m = offs_m < t.m
    part = tl.cast(t.m, tl.int64) * sums.stride_i
    for start in tl.range(0, t.r, BLOCK, num_stages=1, disable_licm=True):
        offs_r = (start + tl.arange(0, BLOCK)).to(tl.int64)
        mask_r = offs_r < t.r
        grad = load_parts(sums, offs_m, mask_m, offs_r, mask_r, splits, part)
        if t.down is not None:
            cross = transposed(dense(saved[5], t.task, t.r, t.width))
            grad = add_product(grad, d_x, offs_m, mask_m, cross, offs_r, mask_r, t.width, 1.0)
        store(d_attended, grad, offs_m, mask_m, offs_r, mask_r)


class _Attention(NamedTuple):
    """What the gradients of the attention are made of, at a task."""

    query: Any
    attended: Any
    d_attended: Any
    stats_ptr: Any  # row maxima and row sums
    inner_ptr: Any  # Σ_j W·dW
    scaling: Any
    score_scale: Any


@triton.jit
def _store_inner(t, of, offs_m):
    """Σ_j W·dW = dO·O of a block of tokens, to memory."""
    mask_m = offs_m < t.m
    inner = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    inner = add_product(
        inner, of.attended, offs_m, mask_m, transposed(of.d_attended), offs_m, mask_m, t.r, 1.0
    )
    same = offs_m[:, None] == offs_m[None, :]
    tl.store(of.inner_ptr + offs_m, tl.sum(tl.where(same, inner, 0.0), 0), mask=mask_m)


@triton.jit
def _score_grads(t, of, offs_n, offs_m):
    """W and the gradient of the scores, both [BLOCK, BLOCK_M]."""
    mask_n, mask_m = offs_n < t.n, offs_m < t.m
    a = matrix(t.a, t.task)
    zeros = tl.zeros((BLOCK, BLOCK_M), tl.float32)
    scores = add_product(
        zeros, a, offs_n, mask_n, transposed(of.query), offs_m, mask_m, t.r, of.scaling
    )
    top = tl.load(of.stats_ptr + offs_m, mask=mask_m, other=0.0)
    total = tl.load(of.stats_ptr + (t.m + offs_m), mask=mask_m, other=1.0)
    scores = tl.where(mask_n[:, None], scores, float("-inf"))
    weights = tl.exp((scores - top[None, :]) * of.score_scale) * (1.0 / total)[None, :]
    grads = add_product(
        zeros, a, offs_n, mask_n, transposed(of.d_attended), offs_m, mask_m, t.r, of.scaling
    )
    inner = tl.load(of.inner_ptr + offs_m, mask=mask_m, other=0.0)
    return weights, weights * (grads - inner[None, :]) * of.score_scale


@triton.jit
def _store_grad_a(t, d_a, half_a, of, first, last):
    """dA of the tiles [first, last) of positions."""
    for tile in tl.range(first, last, num_stages=1, disable_licm=True):
        offs_n = (tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        mask_n = offs_n < t.n
        for start in tl.range(0, t.r, BLOCK, num_stages=1, disable_licm=True):
            offs_r = (start + tl.arange(0, BLOCK)).to(tl.int64)
            mask_r = offs_r < t.r
            grad = tl.zeros((BLOCK, BLOCK), tl.float32)
            for row in tl.range(0, t.m, BLOCK_M, num_stages=1, disable_licm=True):
                offs_m = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
                mask_m = offs_m < t.m
                weights, d_scores = _score_grads(t, of, offs_n, offs_m)
                grad += product(weights, load(of.d_attended, offs_m, mask_m, offs_r, mask_r))
                grad += product(d_scores, load(of.query, offs_m, mask_m, offs_r, mask_r))
            grad *= of.scaling
            if half_a is not None:
                grad += load(half_a, offs_n, mask_n, offs_r, mask_r)
            store(d_a, grad, offs_n, mask_n, offs_r, mask_r)


@triton.jit
def _store_grad_query(t, d_query, of, first, last):
    """dQ, or the part of it that the tiles [first, last) of positions give."""
    for row in tl.range(0, t.m, BLOCK_M, num_stages=1, disable_licm=True):
        offs_m = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
        for start in tl.range(0, t.r, BLOCK, num_stages=1, disable_licm=True):
            offs_r = (start + tl.arange(0, BLOCK)).to(tl.int64)
            mask_r = offs_r < t.r
            grad = tl.zeros((BLOCK, BLOCK_M), tl.float32)
            for tile in tl.range(first, last, num_stages=1, disable_licm=True):
                offs_n = (tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
                _, d_scores = _score_grads(t, of, offs_n, offs_m)
                a = (
                    load(transposed(matrix(t.a, t.task)), offs_r, mask_r, offs_n, offs_n < t.n)
                    * of.scaling
                )
                grad += product(a, d_scores)
            store(transposed(d_query), grad, offs_r, mask_r, offs_m, offs_m < t.m)


@triton.jit
def _core_of_spaces(
    t,
    d_x,
    d_gates,
    sums,
    saved,
    splits,
    temperature,
    ACTIVATION: tl.constexpr,
    PROMPT: tl.constexpr,
):
    """dX = [dHin | dz] of all tokens, to memory."""
    for row in tl.range(0, t.m, BLOCK_M, num_stages=1, disable_licm=True):
        offs_m = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
        _space_grads(t, d_x, d_gates, sums, saved, offs_m, splits, ACTIVATION)
    tl.debug_barrier()
    gates = dense(saved[4], t.task, t.m, t.spaces)
    for row in tl.range(0, t.m, BLOCK_M, num_stages=1, disable_licm=True):
        offs_m = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
        _logit_grads(t, d_x, d_gates, gates, offs_m, temperature, PROMPT)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["splits", "n_parts", "pieces", "n_tiles", "d_tiles"])
def reconstruct_backward_kernel(
    grads,  # dP, dA, dB, dD [T, K, d, h], dU, dG, db, without gaps
    halves,  # what is added to dA and dB, float32; None: nothing
    work,  # dX [T, m, W], dg [T, m, K], dO [T, m, r], dO·O [T, m], dQ [T, n_parts, m, r]
    sums_ptr,  # dC [T, splits, m, columns]
    saved,  # as the forward gives it
    y,
    p,
    a,
    b,
    down,
    up,
    gate,
    sizes,
    numbers,  # c, 1/√d, τ
    columns,
    splits,
    n_parts,
    pieces,
    n_tiles,
    d_tiles,
    REDUCED: tl.constexpr,  # the products over d are made
    CORE: tl.constexpr,
    EXPAND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PROMPT: tl.constexpr,
):
    """A piece of a task's gradients: the core for a chunk of n, the expansion of a chunk of d."""
    piece = tl.program_id(0) % pieces
    task = (tl.program_id(0) // pieces).to(tl.int64)
    m, n, r, spaces, dim, dims, width, d = sizes
    t = Task(task, m, n, r, spaces, dim, dims, width, d, p, a, b, down, up, gate)
    of_y = matrix(y, task)
    d_x = dense(work[0], task, t.m, t.width)
    attended = dense(saved[2], task, t.m, t.r)
    if CORE:
        sums = dense(sums_ptr, task * splits, t.m, columns)
        if not REDUCED:
            for block in tl.range(tl.cdiv(t.m, BLOCK_M), disable_licm=True):
                reduce(t, sums, block, of_y, 0, tl.cdiv(t.d, BLOCK), False)
            tl.debug_barrier()  # the program's threads may read what others of them have written
        if down is not None:
            d_gates = dense(work[1], task, t.m, t.spaces)
            _core_of_spaces(t, d_x, d_gates, sums, saved, splits, numbers[2], ACTIVATION, PROMPT)
        if b is not None:
            d_attended = dense(work[2], task, t.m, t.r)
            query = dense(saved[0], task, t.m, t.r)
            stats_ptr, inner_ptr = saved[1] + task * 2 * t.m, work[3] + task * t.m
            of = _Attention(
                query, attended, d_attended, stats_ptr, inner_ptr, numbers[0], numbers[1]
            )
            for row in tl.range(0, t.m, BLOCK_M, num_stages=1, disable_licm=True):
                offs_m = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
                _attended_grads(t, d_attended, d_x, sums, saved, offs_m, splits)
            tl.debug_barrier()
            for row in tl.range(0, t.m, BLOCK_M, num_stages=1, disable_licm=True):
                _store_inner(t, of, (row + tl.arange(0, BLOCK_M)).to(tl.int64))
            tl.debug_barrier()
            first = piece * n_tiles
            last = tl.minimum(first + n_tiles, tl.cdiv(t.n, BLOCK))
            half_a = halves
            if halves is not None:
                half_a = dense(halves[0], task, t.n, t.r)
            _store_grad_a(t, dense(grads[1], task, t.n, t.r), half_a, of, first, last)
            if EXPAND:
                _store_grad_query(t, dense(work[4], task, t.m, t.r), of, 0, tl.cdiv(t.n, BLOCK))
            else:
                part = dense(work[4], task * n_parts + piece, t.m, t.r)
                _store_grad_query(t, part, of, first, last)
            tl.debug_barrier()
    if EXPAND:
        kind = -1  # all gradients
        chunk = piece
        if not CORE:
            kind = piece % KINDS
            chunk = piece // KINDS
        d_query = dense(work[4], task * n_parts, t.m, t.r)
        last_tile = tl.minimum((chunk + 1) * d_tiles, tl.cdiv(t.d, BLOCK))
        for tile in tl.range(chunk * d_tiles, last_tile, num_stages=1, disable_licm=True):
            offs_d = (tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
            expand(
                t,
                kind,
                grads,
                halves,
                saved,
                of_y,
                d_x,
                d_query,
                n_parts,
                attended,
                offs_d,
                ACTIVATION,
            )
        if down is not None:
            if piece == 0:
                grad_bias(t, grads[6] + task * t.spaces, d_x)
