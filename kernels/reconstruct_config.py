"""Launch sizes of reconstruct, from a documented heuristic over shapes alone.

The order of every sum follows from them, and with it every bit of the result.
"""

from __future__ import annotations

from dataclasses import dataclass

from ept_fast.kernels.sizes import ceil_div, power_of_two

__all__ = ["ReconstructConfig", "reconstruct_config"]


# Programs that fill a GPU of today, 100 to 150 multiprocessors. A constant, not the number that
# the GPU at hand has: the partition decides the order of the sums.
_RECONSTRUCT_PROGRAMS = 128


def _chunks(length: int, block: int, most: int) -> tuple[int, int]:
    """``length`` cut into at most ``most`` equal chunks of whole blocks: (chunks, their length)."""
    chunk = max(1, ceil_div(length, block * max(1, most))) * block
    return max(1, ceil_div(length, chunk)), chunk


@dataclass(frozen=True)
class ReconstructConfig:
    """Tiles and chunks of operation 1 on a GPU.

    Attributes:
        reduce_rows, reduce_columns, reduce_depth: tile of the products over d, and the chunk of d
            that one step of the sum takes.
        d_splits, d_chunk: chunks of d in the forward, and their length.
        backward_d_splits, backward_d_chunk: the same in the backward.
        rows: prompt tokens of a tile.
        rank: the rank's tile, which covers all of it.
        positions, backward_positions: offset positions of a tile, in each direction's core.
        columns: columns of the spaces, k·h + j, of a tile.
        spaces: spaces of a tile of the gate.
        n_splits, n_chunk: chunks of the softmax over n in the forward, and their length.
        groups, group_rows: groups of prompt tokens in the backward's core, and their length.
        backward_n_chunk: positions that one of its programs takes in turn.
        expand_depth: channels of a tile of an output.
        elements: elements a program adds up if partial sums are all it has to add.
        unroll: partial sums under way at a time.
        warps: of a program.
    """

    reduce_rows: int
    reduce_columns: int
    reduce_depth: int
    d_splits: int
    d_chunk: int
    backward_d_splits: int
    backward_d_chunk: int
    rows: int
    rank: int
    positions: int
    backward_positions: int
    columns: int
    spaces: int
    n_splits: int
    n_chunk: int
    groups: int
    group_rows: int
    backward_n_chunk: int
    expand_depth: int
    elements: int
    unroll: int
    warps: int


def reconstruct_config(
    tasks: int, m: int, n: int, rank: int, spaces: int, dim: int, width: int
) -> ReconstructConfig:
    """Tiles for METHOD's sizes: T, m, n, r, K, h and d; 0 for what does not apply.

    A bank of tasks fills the GPU by itself; for few of them d, n and the prompt are cut into chunks
    until there are about enough programs, and not further, since every partial sum is written and
    read again. Tiles of the other axes shrink as the rank grows, so that registers hold them.
    """
    rows = 16
    reduce_rows = reduce_columns = reduce_depth = 32
    dims = spaces * dim
    outer = ceil_div(m + rank if spaces else m, reduce_rows)
    tiles = tasks * outer * ceil_div(rank + dims + spaces, reduce_columns)
    most = ceil_div(width, 2 * reduce_depth)  # two steps of a sum at least
    d_splits, d_chunk = _chunks(
        width, reduce_depth, min(ceil_div(_RECONSTRUCT_PROGRAMS, tiles), 16, most)
    )
    tiles = tasks * ceil_div(m, reduce_rows) * ceil_div(rank + dims, reduce_columns)
    backward_d_splits, backward_d_chunk = _chunks(
        width, reduce_depth, min(ceil_div(_RECONSTRUCT_PROGRAMS, tiles), 16, most)
    )

    block_rank = max(16, power_of_two(rank))
    positions = 64 if block_rank <= 32 else 32 if block_rank <= 128 else 16
    backward_positions = min(positions, 32)
    blocks = ceil_div(m, rows)
    n_splits, n_chunk = _chunks(n, positions, min(_RECONSTRUCT_PROGRAMS // (tasks * blocks), 32))
    backward_chunks, backward_n_chunk = _chunks(
        n, backward_positions, ceil_div(2 * _RECONSTRUCT_PROGRAMS, tasks)
    )
    groups, group_rows = _chunks(m, rows, ceil_div(_RECONSTRUCT_PROGRAMS, tasks * backward_chunks))
    wide = tasks * blocks * (width // 64) >= _RECONSTRUCT_PROGRAMS and block_rank <= 64
    return ReconstructConfig(
        reduce_rows=reduce_rows,
        reduce_columns=reduce_columns,
        reduce_depth=reduce_depth,
        d_splits=d_splits,
        d_chunk=d_chunk,
        backward_d_splits=backward_d_splits,
        backward_d_chunk=backward_d_chunk,
        rows=rows,
        rank=block_rank,
        positions=positions,
        backward_positions=backward_positions,
        columns=32 if block_rank <= 64 else 16,
        spaces=16,
        n_splits=n_splits,
        n_chunk=n_chunk,
        groups=groups,
        group_rows=group_rows,
        backward_n_chunk=backward_n_chunk,
        expand_depth=64 if wide else 32,
        elements=256,
        unroll=8 if block_rank <= 32 else 4 if block_rank <= 64 else 2,
        warps=8,
    )
