"""What the kernels of operation 1 share: a task's tensors, products of matrices in memory, and the
products over d.

Columns of D and U are numbered c = k·h + j; W = K·h + K is the width of [D | G]. Tiles are small
enough for the registers at every size, so they are constants. Every kernel takes a task's sizes,
numbers and parameters as one tuple, which is a `Task` but for the task's number.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ept_fast.kernels.activations import activate
from ept_fast.kernels.reconstruct.config import ROWS, WIDTH
from ept_fast.kernels.tiles import (
    Axis,
    Matrix,
    axis,
    constant,
    dense,
    load,
    load_parts,
    matrix,
    product,
    store,
    transposed,
)

__all__ = [
    "BLOCK",
    "BLOCK_M",
    "NONE",
    "Task",
    "add_product",
    "add_up",
    "gate_columns",
    "kept_of",
    "load_down",
    "load_gated",
    "load_or_mean",
    "load_sum",
    "of_spaces",
    "parts_of",
    "program",
    "reconstruct_reduce_kernel",
    "reduce",
    "shifted",
    "space_columns",
    "spaces_of",
]

NONE = constant(None)  # what is absent
BLOCK_M = constant(ROWS)  # tokens of a tile
BLOCK = constant(WIDTH)  # positions, channels, columns of the spaces, or part of the rank
_BLOCK_K = constant(16)  # spaces of a tile of the products over d


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
    scaling: Any  # c
    score_scale: Any  # 1/√d
    temperature: Any  # τ
    p: Any
    a: Any
    b: Any
    down: Any  # strides of T, k, j, d, as of U
    up: Any
    gate: Any
    bias: Any


class Kept(NamedTuple):
    """What the forward of a task keeps for the backward."""

    query: Any  # Q [m, r]
    stats_ptr: Any  # maxima of the scores and sums of the exponentials, [2, m]
    attended: Any  # O [m, r]
    hidden: Any  # Hin [m, K·h]
    gates: Any  # g [m, K]
    cross: Any  # S [r, W]


class Parts(NamedTuple):
    """A matrix that is the sum of ``number`` ones, ``stride`` apart."""

    first: Any
    number: Any
    stride: Any


@triton.jit
def program(inner, blocks):
    """What a program owns: one of ``inner`` parts of one of ``blocks``, and its task."""
    number = tl.program_id(0)
    return number % inner, number // inner % blocks, (number // (inner * blocks)).to(tl.int64)


@triton.jit
def kept_of(t, ptrs):
    """A task's part of what is kept."""
    query, attended = dense(ptrs[0], t.task, t.m, t.r), dense(ptrs[2], t.task, t.m, t.r)
    hidden, gates = dense(ptrs[3], t.task, t.m, t.dims), dense(ptrs[4], t.task, t.m, t.spaces)
    cross = dense(ptrs[5], t.task, t.r, t.width)
    return Kept(query, ptrs[1] + t.task * 2 * t.m, attended, hidden, gates, cross)


@triton.jit
def parts_of(ptr, task, number, rows, columns):
    """A task's sum of the parts in a contiguous tensor [T, number, rows, columns]."""
    first = dense(ptr, task * number, rows, columns)
    return Parts(first, number, tl.cast(rows, tl.int64) * columns)


# Tiles


@triton.jit
def shifted(at, by):
    """Places moved along their axis."""
    return Axis(at.offs + by, at.mask)


@triton.jit
def spaces_of(c, dim):
    """The spaces k of the columns c."""
    return Axis((c.offs.to(tl.int32) // dim).to(tl.int64), c.mask)


@triton.jit
def of_spaces(tensor, task):
    """D or U [d, K·h] of a task; its rows are channels, its columns :func:`space_columns`."""
    return Matrix(tensor[0] + task * tensor[1], tensor[4], 1)


@triton.jit
def space_columns(t, tensor, c):
    """Where columns c of the spaces begin in D or U."""
    j = (c.offs.to(tl.int32) % t.dim).to(tl.int64)
    return Axis(spaces_of(c, t.dim).offs * tensor[2] + j * tensor[3], c.mask & (c.offs < t.dims))


@triton.jit
def gate_columns(t, c):
    """Those of the columns c that are the gate's."""
    return Axis(c.offs - t.dims, c.mask & (c.offs >= t.dims))


@triton.jit
def load_down(t, i, c):
    """[BLOCK, BLOCK] of [D | G], a channel in each row."""
    tile = load(of_spaces(t.down, t.task), i, space_columns(t, t.down, c))
    return tile + load(matrix(t.gate, t.task), i, gate_columns(t, c))


@triton.jit
def load_gated(t, kept, i, c, ACTIVATION: tl.constexpr):
    """g_k·φ(H_k) [BLOCK_M, BLOCK] of the columns c."""
    return load(kept.gates, i, spaces_of(c, t.dim)) * activate(load(kept.hidden, i, c), ACTIVATION)


@triton.jit
def load_sum(parts, i, j):
    """A tile of a sum of parts."""
    return load_parts(parts.first, i, j, parts.number, parts.stride)


@triton.jit
def add_up(total, t, of, k):
    """total + the sums over all tokens of columns k of a matrix."""
    for row in tl.range(0, t.m, BLOCK_M, num_stages=1, disable_licm=True):
        total += tl.sum(load(of, axis(row, t.m, BLOCK_M), k), 0)
    return total


@triton.jit
def load_or_mean(t, of, i, k, MEAN: tl.constexpr):
    """[BLOCK_M, BLOCK] of a matrix [m, K]; or its mean over all tokens, in every row."""
    tile = load(of, i, k)
    if MEAN:
        total = add_up(tl.zeros((BLOCK,), tl.float32), t, of, k)
        tile = tl.broadcast_to((total / t.m)[None, :], tile.shape)
    return tile


@triton.jit
def add_product(
    acc, left, i, right, j, depth, scale=1.0, begin=0, end=NONE, STAGES: tl.constexpr = 1
):
    """acc + (scale·left)·right for rows i and columns j of matrices in memory."""
    if end is None:
        end = depth
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES, disable_licm=True):
        at = axis(start, depth, BLOCK)
        acc += product(load(left, i, at) * scale, load(right, at, j))
    return acc


# Products over d


@triton.jit
def _store_product(sums, left, i, right, j, row, column, depth, begin, end):
    """A tile of the products over some of d, to where ``row`` and ``column`` say."""
    acc = tl.zeros((i.offs.shape[0], j.offs.shape[0]), tl.float32)
    acc = add_product(acc, left, i, right, j, depth, 1.0, begin, end, STAGES=3)
    store(sums, acc, row, column)


@triton.jit
def _reduce_rows(t, sums, left, i, row, b, spaces, gate, begin, end):
    """Rows i times [Bᵀ | D | G] or, backward, times [Bᵀ | Uᵀ]."""
    if b is not None:
        for start in tl.range(0, t.r, BLOCK, num_stages=1, disable_licm=True):
            j = axis(start, t.r, BLOCK)
            right = transposed(matrix(b, t.task))
            _store_product(sums, left, i, right, j, row, j, t.d, begin, end)
    if spaces is not None:
        for start in tl.range(0, t.dims, BLOCK, num_stages=1, disable_licm=True):
            c = axis(start, t.dims, BLOCK)
            j, column = space_columns(t, spaces, c), shifted(c, t.r)
            right = of_spaces(spaces, t.task)
            _store_product(sums, left, i, right, j, row, column, t.d, begin, end)
    if gate is not None:
        for start in tl.range(0, t.spaces, _BLOCK_K, num_stages=1, disable_licm=True):
            j = axis(start, t.spaces, _BLOCK_K)
            column = shifted(j, t.r + t.dims)
            right = matrix(gate, t.task)
            _store_product(sums, left, i, right, j, row, column, t.d, begin, end)


@triton.jit
def reduce(t, sums, block, x, spaces, gate, begin, end):
    """A block of rows of [P ; B]·[Bᵀ | D | G] but B·Bᵀ or, backward, of Y·[Bᵀ | Uᵀ].

    The sum goes over the channels from ``begin`` to ``end``. Blocks of B follow those of x.
    """
    blocks_m = tl.cdiv(t.m, BLOCK_M)
    if block < blocks_m:
        i = axis(block * BLOCK_M, t.m, BLOCK_M)
        _reduce_rows(t, sums, matrix(x, t.task), i, i, t.b, spaces, gate, begin, end)
    elif t.b is not None and gate is not None:
        i = axis((block - blocks_m) * BLOCK_M, t.r, BLOCK_M)
        row, b = shifted(i, t.m), matrix(t.b, t.task)
        _reduce_rows(t, sums, b, i, row, NONE, spaces, gate, begin, end)


@triton.jit(do_not_specialize=["splits", "steps"])
def reconstruct_reduce_kernel(
    sums,  # address of [T, splits, rows, columns], rows, columns, blocks of rows
    of,  # for P also Y, for D also U; the gate in the forward only
    splits,
    steps,
):
    """A block of rows of the products, over one chunk of d."""
    split, block, task = program(splits, sums[3])
    t = Task(task, *of)
    begin = split * steps * BLOCK
    end = tl.minimum(begin + steps * BLOCK, t.d)
    own = dense(sums[0], task * splits + split, sums[1], sums[2])
    reduce(t, own, block, t.p, t.down, t.gate, begin, end)
