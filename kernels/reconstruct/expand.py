"""Operation 1, backward: the expansion over d (see :mod:`.backward`)."""

from __future__ import annotations

import triton
import triton.language as tl

from ept_fast.kernels.reconstruct.core import (
    BLOCK,
    BLOCK_M,
    add_product,
    load_down,
    load_gated,
    space_offsets,
)
from ept_fast.kernels.tiles import (
    Matrix,
    constant,
    dense,
    load,
    load_parts,
    matrix,
    product,
    store,
    transposed,
)

__all__ = ["KINDS", "NUMBER_OF_KINDS", "expand", "grad_bias"]

# Of programs that only expand: each makes one of dP, dB, d[D | G], dU of its channels.
NUMBER_OF_KINDS = 4
KINDS = constant(NUMBER_OF_KINDS)


@triton.jit
def _fused_grad(t, y, d_x, offs_m, offs_d):
    """dF = Y + dX·[D | G]ᵀ [BLOCK_M, BLOCK]."""
    mask_m = offs_m < t.m
    grad = load(y, offs_m, mask_m, offs_d, offs_d < t.d)
    if t.down is not None:
        for start in tl.range(0, t.width, BLOCK, num_stages=1, disable_licm=True):
            columns = start + tl.arange(0, BLOCK)
            of_space = load(d_x, offs_m, mask_m, columns.to(tl.int64), columns < t.width)
            grad += product(of_space, tl.trans(load_down(t, offs_d, columns)))
    return grad


@triton.jit
def _grad_prompt(t, d_prompt, y, d_x, d_query, n_parts, offs_d):
    """dP = dF + dQ·B."""
    mask_d = offs_d < t.d
    part = tl.cast(t.m, tl.int64) * t.r
    for row in tl.range(0, t.m, BLOCK_M, num_stages=1, disable_licm=True):
        offs_m = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = offs_m < t.m
        grad = _fused_grad(t, y, d_x, offs_m, offs_d)
        if t.b is not None:
            for start in tl.range(0, t.r, BLOCK, num_stages=1, disable_licm=True):
                offs_r = (start + tl.arange(0, BLOCK)).to(tl.int64)
                mask_r = offs_r < t.r
                query = load_parts(d_query, offs_m, mask_m, offs_r, mask_r, n_parts, part)
                grad += product(query, load(matrix(t.b, t.task), offs_r, mask_r, offs_d, mask_d))
        store(d_prompt, grad, offs_m, mask_m, offs_d, mask_d)


@triton.jit
def _grad_b(t, d_b, half_b, y, d_x, d_query, n_parts, attended, offs_d):
    """dB = Oᵀ·dF + dQᵀ·P."""
    mask_d = offs_d < t.d
    part = tl.cast(t.m, tl.int64) * t.r
    for start in tl.range(0, t.r, BLOCK, num_stages=1, disable_licm=True):
        offs_r = (start + tl.arange(0, BLOCK)).to(tl.int64)
        mask_r = offs_r < t.r
        grad = tl.zeros((BLOCK, BLOCK), tl.float32)
        if half_b is not None:
            grad = load(half_b, offs_r, mask_r, offs_d, mask_d)
        for row in tl.range(0, t.m, BLOCK_M, num_stages=1, disable_licm=True):
            offs_m = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
            mask_m = offs_m < t.m
            of_attended = load(transposed(attended), offs_r, mask_r, offs_m, mask_m)
            grad += product(of_attended, _fused_grad(t, y, d_x, offs_m, offs_d))
            query = load_parts(transposed(d_query), offs_r, mask_r, offs_m, mask_m, n_parts, part)
            grad += product(query, load(matrix(t.p, t.task), offs_m, mask_m, offs_d, mask_d))
        store(d_b, grad, offs_r, mask_r, offs_d, mask_d)


@triton.jit
def _grad_down(t, d_down, d_gate, d_x, attended, offs_d):
    """d[D | G]ᵀ = dXᵀ·F."""
    mask_d = offs_d < t.d
    for start in tl.range(0, t.width, BLOCK, num_stages=1, disable_licm=True):
        columns = start + tl.arange(0, BLOCK)
        offs_c = columns.to(tl.int64)
        grad = tl.zeros((BLOCK, BLOCK), tl.float32)
        for row in tl.range(0, t.m, BLOCK_M, num_stages=1, disable_licm=True):
            offs_m = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
            mask_m = offs_m < t.m
            fused = load(matrix(t.p, t.task), offs_m, mask_m, offs_d, mask_d)
            if t.b is not None:
                b = matrix(t.b, t.task)
                fused = add_product(fused, attended, offs_m, mask_m, b, offs_d, mask_d, t.r, 1.0)
            of_space = load(transposed(d_x), offs_c, columns < t.width, offs_m, mask_m)
            grad += product(of_space, fused)
        begins = space_offsets(columns, tl.cast(t.d, tl.int64) * t.dim, 1, t.dim)
        store(d_down, grad, begins, columns < t.dims, offs_d, mask_d)
        mask_k = (columns >= t.dims) & (columns < t.width)
        store(d_gate, grad, offs_c - t.dims, mask_k, offs_d, mask_d)


@triton.jit
def _grad_up(t, d_up, saved, y, offs_d, ACTIVATION: tl.constexpr):
    """dU = (g·Φ)ᵀ·Y."""
    mask_d = offs_d < t.d
    for start in tl.range(0, t.dims, BLOCK, num_stages=1, disable_licm=True):
        columns = start + tl.arange(0, BLOCK)
        grad = tl.zeros((BLOCK, BLOCK), tl.float32)
        for row in tl.range(0, t.m, BLOCK_M, num_stages=1, disable_licm=True):
            offs_m = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
            gated = load_gated(t, saved, offs_m, columns, ACTIVATION)
            grad += product(tl.trans(gated), load(y, offs_m, offs_m < t.m, offs_d, mask_d))
        store(d_up, grad, columns.to(tl.int64), columns < t.dims, offs_d, mask_d)


@triton.jit
def grad_bias(t, d_bias_ptr, d_x):
    """db = Σ dz."""
    for start in tl.range(0, t.spaces, BLOCK, num_stages=1, disable_licm=True):
        offs_k = (start + tl.arange(0, BLOCK)).to(tl.int64)
        mask_k = offs_k < t.spaces
        grad = tl.zeros((BLOCK,), tl.float32)
        for row in tl.range(0, t.m, BLOCK_M, num_stages=1, disable_licm=True):
            offs_m = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
            grad += tl.sum(load(d_x, offs_m, offs_m < t.m, t.dims + offs_k, mask_k), 0)
        tl.store(d_bias_ptr + offs_k, grad.to(d_bias_ptr.dtype.element_ty), mask=mask_k)


@triton.jit
def expand(
    t,
    kind,
    grads,
    halves,
    saved,
    y,
    d_x,
    d_query,  # its first part
    n_parts,
    attended,
    offs_d,
    ACTIVATION: tl.constexpr,
):
    """The gradients of some channels: all of them, or those of a kind >= 0."""
    if (kind < 0) | (kind == 0):
        _grad_prompt(t, dense(grads[0], t.task, t.m, t.d), y, d_x, d_query, n_parts, offs_d)
    if t.b is not None:
        if (kind < 0) | (kind == 1):
            half_b = halves
            if halves is not None:
                half_b = dense(halves[1], t.task, t.r, t.d)
            d_b = dense(grads[2], t.task, t.r, t.d)
            _grad_b(t, d_b, half_b, y, d_x, d_query, n_parts, attended, offs_d)
    if t.down is not None:
        if (kind < 0) | (kind == 2):
            d_down = Matrix(grads[3] + t.task * t.dims * t.d, 1, t.dim)
            d_gate = transposed(dense(grads[5], t.task, t.d, t.spaces))
            _grad_down(t, d_down, d_gate, d_x, attended, offs_d)
        if (kind < 0) | (kind == 3):
            d_up = dense(grads[4], t.task, t.dims, t.d)
            _grad_up(t, d_up, saved, y, offs_d, ACTIVATION)
