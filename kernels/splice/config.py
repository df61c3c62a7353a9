"""Launch sizes of the splice, from a documented heuristic over shapes and types alone.

The order of every sum follows from them, and with it every bit of the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

__all__ = [
    "BackwardConfig",
    "ForwardConfig",
    "backward_config",
    "forward_config",
    "gather_options",
    "plan_options",
]

# Programs that fill the largest GPU of today: 132 to 160 multiprocessors hold two to four each.
_PROGRAMS = 512
# What is left when memory has to be saved: about one for each multiprocessor.
_FEWEST_PROGRAMS = 128
_MOST_REGISTERS = 255  # of a thread
# The least that `tl.dot` multiplies, in every dimension.
_MIN_BLOCK = 16
_WORKSPACE_BYTES = 14 * 1024 * 1024
# Largest tile of the backward by BLOCK_R, which covers the whole rank: what its registers hold.
_BACKWARD_TILE = {16: (32, 64), 32: (32, 64), 64: (32, 32), 128: (16, 32), 256: (16, 16)}


@dataclass(frozen=True)
class ForwardConfig:
    """Launch of the forward."""

    rows: int  # of a program: slots (forward), or rows of one task that it adds up (backward)
    block_s: int  # positions of a tile
    block_d: int  # channels of a tile
    block_r: int  # rank that one product covers
    order: int  # of the products (:mod:`ept_fast.kernels.tiles`)
    num_warps: int
    maxnreg: int  # registers of a thread

    def options(self) -> dict[str, int]:
        """The kernel's constants, and the compiler's options."""
        compiler = ("num_warps", "maxnreg")
        found = {k if k in compiler else k.upper(): v for k, v in vars(self).items()}
        return {**found, "num_stages": 1}


@dataclass(frozen=True)
class BackwardConfig(ForwardConfig):
    """Launch of the backward's sums. One product covers the rank: no gradient is read twice."""

    tiles: int  # along the text, which a program computes in turn
    tiles_d: int  # along d


def _within(low: int, value: int, high: int) -> int:
    return max(low, min(value, high))


def _block(size: int, most: int) -> int:
    return _within(_MIN_BLOCK, triton.next_power_of_2(size), most)


def _registers(rank: int) -> int:
    """Of a thread: so that a multiprocessor holds 16 warps, unless the rank needs more."""
    return 128 if rank <= 32 else _MOST_REGISTERS


def _order(dtype: torch.dtype) -> int:
    """Of the products for a result of this type: 16 bits hide what order 1 leaves out."""
    return 1 if dtype.itemsize == 2 else 2


def plan_options(batch: int, length: int) -> dict[str, int]:
    """Of the plan's launch: eight columns a thread, and as many threads as the length needs."""
    block_s = _within(128, triton.next_power_of_2(length), 4096)
    block_b = _within(32, triton.next_power_of_2(batch), 1024)
    return {"BLOCK_B": block_b, "BLOCK_S": block_s, "num_warps": _within(1, block_s // 256, 16)}


def gather_options(d: int) -> dict[str, int]:
    """Of the launch that sums over the places of gathered rows: 32 elements a thread."""
    return {"BLOCK_N": 16, "BLOCK_D": _block(d, 256), "num_warps": 4}


def forward_config(
    batch: int, length: int, m: int, d: int, rank: int, has_tasks: bool, dtype: torch.dtype
) -> ForwardConfig:
    """The launch of the splice's forward; ``dtype``: of the text.

    A tile's offset is computed once for the rows that share it, so a program takes as many rows as
    leave enough programs. Of a bank, whose kernel needs more registers, tiles are half as long.
    """
    block_s = _block(length, 16 if has_tasks else 32)
    block_d, block_r = _block(d, 64), _block(rank, 32)
    blocks = (triton.cdiv(length, block_s) + triton.cdiv(m, block_s)) * triton.cdiv(d, block_d)
    rows = triton.next_power_of_2(_within(1, blocks * batch // _PROGRAMS, 8))
    tile = (min(rows, triton.next_power_of_2(batch)), block_s, block_d, block_r)
    return ForwardConfig(*tile, _order(dtype), num_warps=4, maxnreg=_registers(rank))


def backward_config(
    batch: int, length: int, m: int, d: int, rank: int, tasks: int, dtype: torch.dtype
) -> BackwardConfig:
    """The launch of the splice's backward; ``dtype``: of the offset's parameters.

    ``m`` and ``rank`` are 0 if the gradients of the prompt or of the offset are not needed.

    The whole rank goes through one product; the tile is the smaller for it. The channels are split
    into as many programs as there are tiles, then the positions and the rows until the programs
    fill a GPU. If their parts need more memory than the workspace has, there are fewer programs,
    then they take more channels each; if it is never enough, the fewest programs are split so that
    they need the least. One row whose rank is no multiple of 16 then needs the registers of twice
    as many threads: its loads are 8 bytes wide, and its products take longer than these.
    """
    block_r = _block(rank, 256)
    widest_s, widest_d = _BACKWARD_TILE[block_r]
    block_s, block_d = _block(length, widest_s), _block(d, widest_d)
    blocks_d, blocks_s = triton.cdiv(d, block_d), max(1, triton.cdiv(length, block_s))
    groups = max(1, min(tasks, batch))

    def split(programs: int, tiles_d: int) -> tuple[int, int, int]:
        """Bytes of the parts, and chunks of positions and of rows, for about so many programs."""
        chunks_d = triton.cdiv(blocks_d, tiles_d)
        chunks_s = _within(1, triton.cdiv(programs, chunks_d * groups), blocks_s)
        chunks_b = 1
        if tasks == 1:
            chunks_b = _within(1, triton.cdiv(programs, chunks_d * chunks_s), triton.cdiv(batch, 8))
        parts = [(m * d, chunks_b)]
        if length:
            parts += [(rank * length, chunks_b * chunks_d), (rank * d, chunks_b * chunks_s)]
        # What is in one part is written where it belongs.
        elements = sum(size * number for size, number in parts if number > 1)
        return 4 * groups * elements, chunks_s, chunks_b

    # The registers of the widest rank leave no room for a second loop.
    most = _WORKSPACE_BYTES * (8 if block_r == 256 else 1)
    tiles = [1 << i for i in range(blocks_d.bit_length())]
    numbers = (_PROGRAMS, _PROGRAMS // 2, _FEWEST_PROGRAMS)
    fits = ((n, t) for t in tiles for n in numbers if split(n, t)[0] <= most)
    least = min(tiles, key=lambda t: split(_FEWEST_PROGRAMS, t)[0])
    programs, tiles_d = next(fits, (_FEWEST_PROGRAMS, least))
    _, chunks_s, chunks_b = split(programs, tiles_d)
    rows = max(1, triton.cdiv(batch, chunks_b))
    tile = (rows, block_s, block_d, block_r)
    num_warps = 16 if rows == 1 and tiles_d > 1 and rank % _MIN_BLOCK else 8
    registers = _registers(rank) if dtype != torch.float16 else _MOST_REGISTERS
    turns = (triton.cdiv(blocks_s, chunks_s), tiles_d)
    return BackwardConfig(*tile, _order(dtype), num_warps, registers, *turns)
