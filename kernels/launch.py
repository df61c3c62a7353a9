"""Launch configurations from documented heuristics: how much of a tensor one step works on.

A configuration depends on shapes and types alone, so the order of every sum, and with it every bit
of the result, is the same on each run.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

__all__ = [
    "ReconstructConfig",
    "reconstruct_config",
    "run",
]


@dataclass(frozen=True)
class SpliceConfig:
    """Launch of a splice kernel.

    Attributes:
        block_s: columns (backward: positions) of a tile.
        block_d: channels of a tile.
        block_r: rank that one matrix product covers.
        rows: rows of the batch a program looks through for those of its task.
        tiles: forward: tiles along d that a program computes in turn; backward: along the text.
        tiles_d: backward: tiles along d that a program computes in turn.
        block_b: rows that go together.
        block_c: columns of their masks that are looked at together.
        input_precision: of the products' operands: "ieee", or "tf32x3" if the result is rounded
            to 16 bits.
        num_warps: warps of a program.
        num_stages: depth of the compiler's software pipeline.
    """

    block_s: int
    block_d: int
    block_r: int
    rows: int
    tiles: int
    block_b: int
    block_c: int
    input_precision: str
    num_warps: int
    num_stages: int
    tiles_d: int = 1

    def options(self) -> dict[str, Any]:
        """The kernel's constants and the compiler's options."""
        return {
            "ROWS": self.rows,
            "TILES": self.tiles,
            "BLOCK_S": self.block_s,
            "BLOCK_D": self.block_d,
            "BLOCK_R": self.block_r,
            "BLOCK_B": self.block_b,
            "BLOCK_C": self.block_c,
            "INPUT_PRECISION": self.input_precision,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def _power_of_two(number: int) -> int:
    """The least power of two that is no smaller."""
    return 1 << max(0, number - 1).bit_length()


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _within(low: int, value: int, high: int) -> int:
    return max(low, min(value, high))


# Enough programs to fill the largest GPU of today several times over.
_PROGRAMS = 1024
# What is left when memory has to be saved: about one for each multiprocessor.
_FEWEST_PROGRAMS = 128
# The least that `tl.dot` multiplies, in every dimension.
_MIN_BLOCK = 16
_COUNTED = 2048
_WORKSPACE_BYTES = 8 * 1024 * 1024
# Largest tile of the splice's backward, by BLOCK_R, that compiles without spills.
_BACKWARD_TILE = {16: (32, 64), 32: (32, 64), 64: (16, 64), 128: (16, 32), 256: (16, 16)}
# Rows of the batch that the splice takes together: as many elements a thread as its registers hold.
_FORWARD_ROWS = {"tf32x3": 4, "ieee": 2}
_BACKWARD_ROWS = 8


def _input_precision(dtype: torch.dtype, device: torch.device) -> str:
    """Matrix units if the result's 16 bits hide what they lose, else exact products."""
    return "tf32x3" if dtype.itemsize == 2 and target(device).startswith("sm_") else "ieee"


def splice_forward_config(
    batch: int,
    length: int,
    num_virtual_tokens: int,
    hidden_size: int,
    rank: int,
    tasks: int,
    dtype: torch.dtype,
    device: torch.device,
    has_mask: bool,
) -> SpliceConfig:
    """The launch of the splice's forward.

    A tile's offset is computed once for the rows that share it, so a program takes as many rows as
    leave enough programs; in a bank, as many as hold eight of its task if tasks are drawn evenly.
    A program that has to read much of the mask, or many task ids, before it starts does several
    tiles along d, if enough programs are left.
    """
    input_precision = _input_precision(dtype, device)
    widest = 128 if input_precision == "tf32x3" else 64
    block_s = _within(_MIN_BLOCK, _power_of_two(length), 32)
    block_d = _within(_MIN_BLOCK, _power_of_two(hidden_size), widest)
    blocks_d = _ceil(hidden_size, block_d)
    blocks = (_ceil(length, block_s) + _ceil(num_virtual_tokens, block_s)) * blocks_d
    together = _FORWARD_ROWS[input_precision]
    wanted = _within(1, blocks * batch // _PROGRAMS, 2 * together) if tasks == 1 else 8 * tasks
    rows = _power_of_two(min(batch, wanted))
    groups = 1 if tasks == 1 else min(tasks, batch)
    programs = blocks * groups * _ceil(batch, rows)
    tiles = 1
    if (has_mask and length > 1024) or (tasks > 1 and batch > 512):
        tiles = _within(1, programs // _PROGRAMS, blocks_d)
    block_b = min(rows, together)
    return SpliceConfig(
        block_s=block_s,
        block_d=block_d,
        block_r=_within(_MIN_BLOCK, _power_of_two(rank), 32 if input_precision == "tf32x3" else 16),
        rows=rows,
        tiles=_power_of_two(tiles),
        block_b=block_b,
        block_c=max(_MIN_BLOCK, _COUNTED // block_b),
        input_precision=input_precision,
        num_warps=8,
        num_stages=2,
    )


def splice_backward_config(
    batch: int,
    length: int,
    num_virtual_tokens: int,
    hidden_size: int,
    rank: int,
    tasks: int,
    has_prompt: bool,
    has_offset: bool,
) -> SpliceConfig:
    """The launch of the splice's backward.

    The whole rank goes through one product, so that no gradient element is read twice; the tile is
    the narrower for it. It is a plain float32 product, since gradients are not rounded to 16 bits.
    The rows, then the positions, are split until there are programs enough; then programs take more
    channels or positions each while the parts need more memory than the workspace has, and as long
    as some programs are left.
    """
    block_r = _within(_MIN_BLOCK, _power_of_two(rank), 256)
    widest_s, widest_d = _BACKWARD_TILE[block_r]
    block_s = _within(_MIN_BLOCK, _power_of_two(length), widest_s)
    block_d = _within(_MIN_BLOCK, _power_of_two(hidden_size), widest_d)
    blocks_d = _ceil(hidden_size, block_d)
    blocks_s = _ceil(length, block_s)
    groups = 1 if tasks == 1 else min(tasks, batch)
    chunks_b, chunks_s = 1, max(1, blocks_s)
    if tasks == 1:
        chunks_b = _within(1, _ceil(_PROGRAMS, blocks_d * chunks_s), _ceil(batch, _BACKWARD_ROWS))
    chunks_s = _within(1, _ceil(_PROGRAMS, blocks_d * chunks_b * groups), chunks_s)

    tiles_d = 1

    def parts_of_a() -> int:
        return chunks_b * rank * length * _ceil(blocks_d, tiles_d) if has_offset else 0

    def parts_of_b() -> int:
        return chunks_b * rank * hidden_size * chunks_s if has_offset else 0

    def too_much() -> bool:
        parts_of_p = num_virtual_tokens * hidden_size * chunks_b if has_prompt else 0
        total = groups * (parts_of_p + parts_of_a() + parts_of_b())
        programs = groups * chunks_b * chunks_s * _ceil(blocks_d, tiles_d)
        return 4 * total > _WORKSPACE_BYTES and programs >= 2 * _FEWEST_PROGRAMS

    while too_much():
        if chunks_b > 1:
            chunks_b = _ceil(chunks_b, 2)
        elif parts_of_a() >= parts_of_b() and tiles_d < blocks_d:
            tiles_d *= 2
        elif chunks_s > 1:
            chunks_s = _ceil(chunks_s, 2)
        else:
            break
    rows = _ceil(batch, chunks_b)
    block_b = min(_power_of_two(rows), _BACKWARD_ROWS)
    return SpliceConfig(
        block_s=block_s,
        block_d=block_d,
        block_r=block_r,
        rows=rows,
        tiles=_ceil(blocks_s, chunks_s) if blocks_s else 1,
        block_b=block_b,
        block_c=max(_MIN_BLOCK, _COUNTED // block_b),
        input_precision="ieee",
        num_warps=8,
        num_stages=2,
        tiles_d=tiles_d,
    )


# Registers of a multiprocessor, and so the most that one block can have.
_BLOCK_REGISTERS = 65536
_forced_target: str | None = None


@functools.cache
def _architecture(device: torch.device) -> str:
    """Asked of the driver once for each device: every launch wants to know."""
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def target(device: torch.device) -> str:
    """The architecture that kernels for this device are compiled for: "sm_90", "gfx942", "cpu"."""
    if _forced_target is not None:
        return _forced_target
    return "cpu" if device.type == "cpu" else _architecture(device)


# What `torch.compiler.assume_constant_result` does, without its import of the whole compiler: the
# compiler asks for the target while it traces a call, and cannot trace the driver's answer.
target._dynamo_marked_constant = True  # type: ignore[attr-defined]


# Programs that fill a GPU of today, 100 to 150 multiprocessors. A constant, not the number that
# the GPU at hand has: the partition decides the order of the sums.
_RECONSTRUCT_PROGRAMS = 128


def _chunks(length: int, block: int, most: int) -> tuple[int, int]:
    """``length`` cut into at most ``most`` equal chunks of whole blocks: (chunks, their length)."""
    chunk = max(1, _ceil(length, block * max(1, most))) * block
    return max(1, _ceil(length, chunk)), chunk


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
    outer = _ceil(m + rank if spaces else m, reduce_rows)
    tiles = tasks * outer * _ceil(rank + dims + spaces, reduce_columns)
    most = _ceil(width, 2 * reduce_depth)  # two steps of a sum at least
    d_splits, d_chunk = _chunks(
        width, reduce_depth, min(_ceil(_RECONSTRUCT_PROGRAMS, tiles), 16, most)
    )
    tiles = tasks * _ceil(m, reduce_rows) * _ceil(rank + dims, reduce_columns)
    backward_d_splits, backward_d_chunk = _chunks(
        width, reduce_depth, min(_ceil(_RECONSTRUCT_PROGRAMS, tiles), 16, most)
    )

    block_rank = max(16, _power_of_two(rank))
    positions = 64 if block_rank <= 32 else 32 if block_rank <= 128 else 16
    backward_positions = min(positions, 32)
    blocks = _ceil(m, rows)
    n_splits, n_chunk = _chunks(n, positions, min(_RECONSTRUCT_PROGRAMS // (tasks * blocks), 32))
    backward_chunks, backward_n_chunk = _chunks(
        n, backward_positions, _ceil(2 * _RECONSTRUCT_PROGRAMS, tasks)
    )
    groups, group_rows = _chunks(m, rows, _ceil(_RECONSTRUCT_PROGRAMS, tasks * backward_chunks))
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


def run(kernel: Any, programs: int, device: torch.device, *arguments: Any, **options: Any) -> None:
    """Launch a Triton kernel on a one-dimensional grid; an empty grid launches nothing.

    Products and sums fuse into one rounding whatever the compiler's default is: Triton 3.10 changes
    that, and with it the last bit of every result.
    """
    if programs == 0:
        return
    options["enable_fp_fusion"] = True
    if target(device).startswith("sm_"):
        # Without a limit of its own, ptxas spills a few registers to fit one more block.
        options["maxnreg"] = min(255, _BLOCK_REGISTERS // (32 * options.get("num_warps", 4)))
    # On a CPU it is the interpreter that runs.
    with nullcontext() if device.type == "cpu" else torch.cuda.device(device):
        kernel[(programs,)](*arguments, **options)
