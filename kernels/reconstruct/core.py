"""What the kernels of operation 1 share: a task's tensors, products of matrices in memory, and the
products over d.

Columns of D and U are numbered c = k·h + j; W = K·h + K is the width of [D | G]. Tiles are small
enough for the registers at every size, so they are constants.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ept_fast.kernels.activations import activate
from ept_fast.kernels.reconstruct.config import ROWS, WIDTH
from ept_fast.kernels.tiles import constant, dense, load, matrix, product, transposed

__all__ = [
    "BLOCK",
    "BLOCK_M",
    "NONE",
    "Task",
    "add_product",
    "blocks_of",
    "load_down",
    "load_gated",
    "load_or_mean",
    "load_up",
    "reconstruct_reduce_kernel",
    "reduce",
    "space_offsets",
]

NONE = constant(None)  # what is absent
BLOCK_M = constant(ROWS)  # tokens of a tile
BLOCK = constant(WIDTH)  # positions, channels, columns of the spaces, or part of the rank


class Task(NamedTuple):
    """One task: METHOD's sizes and the parameters, as addresses and strides; None if absent."""

    task: Any
    m: Any
    n: Any
    r: Any
    spaces: Any
    dim: Any
    dims: Any  # K·h
    width: Any  # W
    d: Any
    p: Any
    a: Any
    b: Any
    down: Any  # strides of T, k, j, d, as of U
    up: Any
    gate: Any


@triton.jit
def space_offsets(columns, stride_k, stride_j, dim):
    """Where columns c of the spaces begin."""
    return (columns // dim).to(tl.int64) * stride_k + (columns % dim).to(tl.int64) * stride_j


@triton.jit
def load_down(t, offs_d, columns):
    """[BLOCK, BLOCK] of [D | G], a channel in each row."""
    mask_d = offs_d < t.d
    offsets = space_offsets(columns, t.down[2], t.down[3], t.dim)
    of_down = matrix((t.down[0], t.down[1], t.down[4], 1), t.task)
    tile = load(of_down, offs_d, mask_d, offsets, columns < t.dims)
    mask_k = (columns >= t.dims) & (columns < t.width)
    return tile + load(
        matrix(t.gate, t.task), offs_d, mask_d, (columns - t.dims).to(tl.int64), mask_k
    )


@triton.jit
def load_up(t, columns, offs_d):
    """[BLOCK, BLOCK] of U, a column c in each row."""
    offsets = space_offsets(columns, t.up[2], t.up[3], t.dim)
    of_up = matrix((t.up[0], t.up[1], 1, t.up[4]), t.task)
    return load(of_up, offsets, columns < t.dims, offs_d, offs_d < t.d)


@triton.jit
def load_gated(t, saved, offs_m, columns, ACTIVATION: tl.constexpr):
    """g_k·φ(H_k) [BLOCK_M, BLOCK] of the columns c."""
    mask_m, mask_c = offs_m < t.m, columns < t.dims
    hidden = load(
        dense(saved[3], t.task, t.m, t.dims), offs_m, mask_m, columns.to(tl.int64), mask_c
    )
    offs_k = (columns // t.dim).to(tl.int64)
    gates = load(dense(saved[4], t.task, t.m, t.spaces), offs_m, mask_m, offs_k, mask_c)
    return gates * activate(hidden, ACTIVATION)


@triton.jit
def load_or_mean(t, of, offs_m, offs_k, MEAN: tl.constexpr):
    """[BLOCK_M, BLOCK] of a matrix [m, K]; or its mean over all tokens, in every row."""
    mask_k = offs_k < t.spaces
    tile = load(of, offs_m, offs_m < t.m, offs_k, mask_k)
    if MEAN:
        total = tl.zeros((BLOCK,), tl.float32)
        for row in tl.range(0, t.m, BLOCK_M, num_stages=1, disable_licm=True):
            rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
            total += tl.sum(load(of, rows, rows < t.m, offs_k, mask_k), 0)
        tile = tl.broadcast_to((total / t.m)[None, :], tile.shape)
    return tile


@triton.jit
def add_product(acc, left, i, mask_i, right, j, mask_j, depth, scale):
    """acc + (scale·left)·right for rows i and columns j of matrices in memory."""
    for start in tl.range(0, depth, BLOCK, num_stages=1, disable_licm=True):
        offs = (start + tl.arange(0, BLOCK)).to(tl.int64)
        mask = offs < depth
        acc += product(
            load(left, i, mask_i, offs, mask) * scale, load(right, offs, mask, j, mask_j)
        )
    return acc


# Products over d


class _Lines(NamedTuple):
    """One factor of a product over d: where some rows or columns begin, and their stride."""

    ptr: Any
    offsets: Any
    stride: Any
    mask: Any


@triton.jit
def _rows(of, first, end, NUMBER: tl.constexpr):
    """Rows of a matrix from ``first`` on."""
    rows = (first + tl.arange(0, NUMBER)).to(tl.int64)
    return _Lines(of.ptr, rows * of.stride_i, of.stride_j, rows < end)


@triton.jit
def _store_products(sums, left, right, row, column, first, steps, d):
    """A tile of the products: over ``steps`` blocks of d from block ``first`` on."""
    acc = tl.zeros((left.offsets.shape[0], right.offsets.shape[0]), tl.float32)
    for step in tl.range(first, first + steps, num_stages=3, disable_licm=True):
        offs_d = (step * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        mask_d = offs_d < d
        ptrs = left.ptr + (left.offsets[:, None] + offs_d[None, :] * left.stride)
        x = tl.load(ptrs, mask=left.mask[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
        ptrs = right.ptr + (right.offsets[None, :] + offs_d[:, None] * right.stride)
        y = tl.load(ptrs, mask=mask_d[:, None] & right.mask[None, :], other=0.0).to(tl.float32)
        acc += product(x, y)
    offs_m = (row + tl.arange(0, acc.shape[0])).to(tl.int64)
    offs_c = (column + tl.arange(0, acc.shape[1])).to(tl.int64)
    ptrs = sums.ptr + (offs_m[:, None] * sums.stride_i + offs_c[None, :])
    tl.store(ptrs, acc, mask=left.mask[:, None] & right.mask[None, :])


@triton.jit
def _reduce_rows(t, sums, left, row, spaces, b, gate, first, steps):
    """Lines times [Bᵀ | D | G] or, backward, times [Bᵀ | Uᵀ]; they end up at ``row``."""
    if b is not None:
        for column in tl.range(0, t.r, BLOCK, num_stages=1, disable_licm=True):
            right = _rows(matrix(b, t.task), column, t.r, BLOCK)
            _store_products(sums, left, right, row, column, first, steps, t.d)
    if spaces is not None:
        for column in tl.range(0, t.dims, BLOCK, num_stages=1, disable_licm=True):
            columns = column + tl.arange(0, BLOCK)
            offsets = space_offsets(columns, spaces[2], spaces[3], t.dim)
            ptr = spaces[0] + t.task * spaces[1]
            right = _Lines(ptr, offsets, spaces[4], columns < t.dims)
            _store_products(sums, left, right, row, t.r + column, first, steps, t.d)
    if gate is not None:
        for k in tl.range(0, t.spaces, 16, num_stages=1, disable_licm=True):
            right = _rows(transposed(matrix(gate, t.task)), k, t.spaces, 16)
            _store_products(sums, left, right, row, t.r + t.dims + k, first, steps, t.d)


@triton.jit
def reduce(t, sums, block, x, first, steps, FORWARD: tl.constexpr):
    """A block of rows of [P ; B]·[Bᵀ | D | G] but B·Bᵀ or, backward, of Y·[Bᵀ | Uᵀ].

    The sum goes over ``steps`` blocks of d from block ``first`` on. Blocks of B follow those of x.
    """
    blocks_m = tl.cdiv(t.m, BLOCK_M)
    if block < blocks_m:
        row = block * BLOCK_M
        left = _rows(x, row, t.m, BLOCK_M)
        if FORWARD:
            _reduce_rows(t, sums, left, row, t.down, t.b, t.gate, first, steps)
        else:
            _reduce_rows(t, sums, left, row, t.up, t.b, NONE, first, steps)
    elif FORWARD and t.b is not None and t.down is not None:
        row = (block - blocks_m) * BLOCK_M
        of_b = _rows(matrix(t.b, t.task), row, t.r, BLOCK_M)
        _reduce_rows(t, sums, of_b, t.m + row, t.down, NONE, t.gate, first, steps)


@triton.jit
def blocks_of(t, FORWARD: tl.constexpr):
    """Blocks of rows that :func:`reduce` knows."""
    blocks = tl.cdiv(t.m, BLOCK_M)
    if FORWARD and t.b is not None and t.down is not None:
        blocks += tl.cdiv(t.r, BLOCK_M)
    return blocks


@triton.jit(do_not_specialize=["splits", "steps"])
def reconstruct_reduce_kernel(
    sums_ptr,  # [T, splits, rows, columns]
    x,  # P or Y
    b,
    spaces,  # D or U
    gate,  # None in the backward
    sizes,
    rows,
    columns,
    splits,
    steps,
    FORWARD: tl.constexpr,
):
    """A block of rows of the products, over one chunk of d."""
    blocks = tl.cdiv(sizes[0], BLOCK_M)
    if FORWARD and b is not None and spaces is not None:
        blocks += tl.cdiv(sizes[2], BLOCK_M)
    split = tl.program_id(0) % splits
    block = tl.program_id(0) // splits % blocks
    task = (tl.program_id(0) // (splits * blocks)).to(tl.int64)
    m, n, r, number, dim, dims, width, d = sizes
    t = Task(task, m, n, r, number, dim, dims, width, d, x, NONE, b, spaces, spaces, gate)
    first = split * steps
    last = tl.minimum(first + steps, tl.cdiv(t.d, BLOCK))
    sums = dense(sums_ptr, task * splits + split, rows, columns)
    reduce(t, sums, block, matrix(x, task), first, last - first, FORWARD)
