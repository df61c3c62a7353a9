"""Launch sizes of operation 1, from a documented heuristic over shapes alone.

The order of every sum follows from them, and with it every bit of the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton

__all__ = ["KINDS", "MOST_REPEATED", "ROWS", "WIDTH", "Config", "backward_config", "forward_config"]

# Products (a multiplication and an addition each) that a program repeats rather than wait for
# another launch: 2 million of them take about as long as a launch and what it costs the host.
MOST_REPEATED = 2_000_000
# Programs that fill a GPU of today, 100 to 150 multiprocessors. A constant, not the number that
# the GPU at hand has: the partition decides the order of the sums.
_PROGRAMS = 128
# The most parts of a sum over d, and of the attention in the forward.
_MOST_SPLITS = 16
_MOST_ATTENTION_SPLITS = 32
# Of a tile: tokens; positions, or channels.
ROWS, WIDTH = 16, 32
# Of programs that only expand backward: each makes one of dP, dB, d[D | G], dU of its channels.
KINDS = 4


@dataclass(frozen=True)
class Config:
    """Launches of one direction.

    Attributes:
        splits, steps: chunks of d of the products over d, and blocks of channels in each; 0 if
            these have no launch of their own.
        n_splits, n_tiles: chunks of n of the attention (backward: of the core), and tiles of
            positions in each; 0 splits if it has no launch of its own.
        chunks, d_tiles: programs that share a block of tokens (backward: a task), and tiles of
            channels of each.
    """

    splits: int
    steps: int
    n_splits: int
    n_tiles: int
    chunks: int
    d_tiles: int


def _chunks(length: int, block: int, most: int) -> tuple[int, int]:
    """``length`` cut into at most ``most`` equal chunks of blocks: (chunks, blocks of a chunk)."""
    blocks = max(1, triton.cdiv(length, block * max(1, most)))
    return max(1, triton.cdiv(length, blocks * block)), blocks


def _splits(width: int, blocks: int) -> tuple[int, int]:
    """Chunks of d for a launch of its own with so many blocks of rows, and steps of each."""
    most = min(triton.cdiv(_PROGRAMS, blocks), _MOST_SPLITS, triton.cdiv(width, 2 * WIDTH))
    return _chunks(width, WIDTH, most)


def forward_config(
    tasks: int, m: int, n: int, rank: int, spaces: int, dim: int, width: int, all_tokens: bool
) -> Config:
    """For METHOD's sizes T, m, n, r, K, h and d; 0 for what does not apply.

    The programs of a block of tokens repeat what they share, if the products over d are at most
    `MOST_REPEATED` and so are those of the attention. Otherwise the products over d get a launch,
    and the attention another one if it has more. Nothing is repeated if there are as many blocks
    of tokens as fill a GPU. ``all_tokens``: whether a program looks at all tokens of its task.
    """
    columns = spaces * dim + spaces
    blocks = triton.cdiv(m, ROWS)
    chunks, d_tiles = _chunks(width, WIDTH, triton.cdiv(_PROGRAMS, tasks * blocks))
    tokens = m if all_tokens else min(m, ROWS)
    products = width * (tokens * (rank + columns) + rank * columns)
    attention = 2 * tokens * n * rank
    repeated = chunks > 1 or (all_tokens and blocks > 1)
    splits = steps = n_splits = n_tiles = 0
    if repeated and max(products, attention) > MOST_REPEATED:
        blocks_of_b = triton.cdiv(rank, ROWS) if columns else 0
        splits, steps = _splits(width, tasks * (blocks + blocks_of_b))
    if repeated and attention > MOST_REPEATED:
        most = min(_PROGRAMS // (tasks * blocks), _MOST_ATTENTION_SPLITS)
        n_splits, n_tiles = _chunks(n, WIDTH, most)
    return Config(splits, steps, n_splits, n_tiles, chunks, d_tiles)


def backward_config(
    tasks: int, m: int, n: int, rank: int, spaces: int, dim: int, width: int
) -> Config:
    """As :func:`forward_config`; all programs of a task share what they repeat."""
    chunks, d_tiles = _chunks(width, WIDTH, triton.cdiv(_PROGRAMS, tasks))
    products, attention = m * (rank + spaces * dim) * width, 3 * m * n * rank
    core = chunks > 1 and attention > MOST_REPEATED
    splits = steps = 0
    if core or (chunks > 1 and products > MOST_REPEATED):
        splits, steps = _splits(width, tasks * triton.cdiv(m, ROWS))
    pieces, n_tiles = _chunks(n, WIDTH, triton.cdiv(_PROGRAMS, tasks) if core else chunks)
    return Config(splits, steps, pieces if core else 0, n_tiles, chunks, d_tiles)
