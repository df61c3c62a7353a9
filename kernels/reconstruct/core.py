"""What the kernels of operation 1 share: a task's tensors, products of matrices in memory, and the
products over d.

Columns of D and U are numbered c = k·h + j; W = K·h + K is the width of [D | G]. Tiles are small
enough for the registers at every size, so they are constants. Every kernel takes a task's sizes,
numbers and parameters as one tuple ``of``: a `Task` but for the task's number.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ept_fast.kernels import tiles
from ept_fast.kernels.activations import activate
from ept_fast.kernels.reconstruct.config import ROWS, WIDTH
from ept_fast.kernels.tiles import Axis, axis, dense, load, matrix, product

NONE = tiles.constant(None)  # what is absent
BLOCK_M = tiles.constant(ROWS)  # tokens of a tile
BLOCK = tiles.constant(WIDTH)  # positions, channels, columns of the spaces, or part of the rank
BLOCK_K = tiles.constant(16)  # columns of G in the products over d


class Task(NamedTuple):
    """One task: METHOD's sizes and the parameters, as addresses and strides; None if absent."""

    task: Any
    m: Any
    n: Any
    r: Any
    spaces: Any
    dim: Any
    dims: Any  # K·h
    width: Any  # W; K·h without a gate, which is then 1
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
    down_bias: Any
    up_bias: Any


class Kept(NamedTuple):
    """What the forward of a task keeps for the backward."""

    query: Any  # Q [m, r]
    stats_ptr: Any  # maxima of the scores and sums of the exponentials, [2, m]
    attended: Any  # O [m, r]
    hidden: Any  # Hin [m, K·h]
    gates: Any  # g [m, K]
    cross: Any  # S [r, W]


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
    """A task's matrix that is a sum of parts [T, number, rows, columns]: first, number, stride."""
    first = dense(ptr, task * number, rows, columns)
    return first, number, tl.cast(rows, tl.int64) * columns


@triton.jit
def load_sum(parts, i, j):
    """A tile of a sum of parts, added in order."""
    first, number, stride = parts
    ptrs, mask = tiles.pointers(first, i, j), tiles.inside(i, j)
    total = tl.zeros(ptrs.shape, tl.float32)
    for four in range(0, number, 4):
        for later in tl.static_range(4):  # loads that are under way together
            part = tl.cast(four + later, tl.int64)
            # Compared as a tile: Triton 3.9's interpreter makes no mask of a scalar comparison.
            mask_part = mask & (tl.full(mask.shape, part, tl.int64) < number)
            total += tl.load(ptrs + part * stride, mask=mask_part, other=0.0)
    return total


@triton.jit
def spaces(t, tensor, c, dim):
    """D or U as a matrix [d, K·h], and where its columns c begin; B and G have spaces of one."""
    number = c.offs.to(tl.int32)
    begins = (number // dim).to(tl.int64) * tensor[2] + (number % dim).to(tl.int64) * tensor[3]
    return matrix((tensor[0], tensor[1], tensor[4], 1), t.task), Axis(begins, c.mask)


@triton.jit
def load_gated(t, kept, i, c, ACTIVATION: tl.constexpr):
    """g_k·φ(H_k) [BLOCK_M, BLOCK] of the columns c."""
    if t.gate is None:
        gated = activate(load(kept.hidden, i, c), ACTIVATION)
    else:
        k = Axis((c.offs.to(tl.int32) // t.dim).to(tl.int64), c.mask)
        gated = load(kept.gates, i, k) * activate(load(kept.hidden, i, c), ACTIVATION)
    return gated


@triton.jit
def load_or_mean(t, of, i, k, MEAN: tl.constexpr):
    """[BLOCK_M, BLOCK] of a matrix [m, K]; or its mean over all tokens, in every row."""
    tile = load(of, i, k)
    if MEAN:
        total = tl.zeros((BLOCK,), tl.float32)
        for row in tl.range(0, t.m, BLOCK_M, num_stages=1, disable_licm=True):
            total += tl.sum(load(of, axis(row, t.m, BLOCK_M), k), 0)
        tile = tl.broadcast_to((total / t.m)[None, :], tile.shape)
    return tile


@triton.jit
def add_product(acc, left, i, right, j, depth, scale=1.0, chunk=NONE, STAGES: tl.constexpr = 1):
    """acc + (scale·left)·right for rows i and columns j of matrices in memory.

    ``chunk``: from where to where of the depth; None: all.
    """
    begin, end = 0, depth
    if chunk is not None:
        begin, end = chunk
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES, disable_licm=True):
        at = axis(start, depth, BLOCK)
        acc += product(load(left, i, at) * scale, load(right, at, j))
    return acc


@triton.jit
def _reduce_columns(t, sums, left, i, row, of, dim, first, end, chunk, COLUMNS: tl.constexpr):
    """Rows i times as many columns as end, to ``row`` and the columns from ``first`` on."""
    for start in tl.range(0, end, COLUMNS, num_stages=1, disable_licm=True):
        c = axis(start, end, COLUMNS)
        right, j = spaces(t, of, c, dim)
        acc = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
        acc = add_product(acc, left, i, right, j, t.d, 1.0, chunk, STAGES=3)
        tiles.store(sums, acc, row, Axis(c.offs + first, c.mask))


@triton.jit
def _reduce_rows(t, sums, left, i, row, b, down, gate, chunk):
    """Rows i times [Bᵀ | D | G] or, backward, times [Bᵀ | Uᵀ]."""
    if b is not None:
        b = (b[0], b[1], b[2], 0, b[3])
        _reduce_columns(t, sums, left, i, row, b, 1, 0, t.r, chunk, BLOCK)
    if down is not None:
        _reduce_columns(t, sums, left, i, row, down, t.dim, t.r, t.dims, chunk, BLOCK)
    if gate is not None:
        gate = (gate[0], gate[1], gate[3], 0, gate[2])
        _reduce_columns(t, sums, left, i, row, gate, 1, t.r + t.dims, t.spaces, chunk, BLOCK_K)


@triton.jit
def reduce(t, sums, block, x, down, gate, chunk, FORWARD: tl.constexpr):
    """A block of rows of [P ; B]·[Bᵀ | D | G] but B·Bᵀ or, backward, of Y·[Bᵀ | Uᵀ].

    The sum goes over a chunk of d. Blocks of B follow those of x. With a gate and biases the
    backward has the bias of U, turned, in G's place.
    """
    blocks = tl.cdiv(t.m, BLOCK_M)
    if block < blocks:
        i = axis(block * BLOCK_M, t.m, BLOCK_M)
        _reduce_rows(t, sums, matrix(x, t.task), i, i, t.b, down, gate, chunk)
    elif FORWARD and (t.b is not None and down is not None):
        i = axis((block - blocks) * BLOCK_M, t.r, BLOCK_M)
        row = Axis(i.offs + t.m, i.mask)
        _reduce_rows(t, sums, matrix(t.b, t.task), i, row, NONE, down, gate, chunk)


@triton.jit(do_not_specialize=["splits", "steps"])
def reconstruct_reduce_kernel(
    sums,  # address of [T, splits, rows, columns], rows, columns, blocks of rows
    of,  # backward Y for P, U for D, and no G or the bias of U
    splits,
    steps,
    FORWARD: tl.constexpr,
):
    """A block of rows of the products, over one chunk of d."""
    split, block, task = program(splits, sums[3])
    t = Task(task, *of)
    begin = split * steps * BLOCK
    chunk = begin, tl.minimum(begin + steps * BLOCK, t.d)
    own = dense(sums[0], task * splits + split, sums[1], sums[2])
    reduce(t, own, block, t.p, t.down, t.gate, chunk, FORWARD)
