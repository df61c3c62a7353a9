"""Time of a kernel on paper: what its bytes, its products and its programs allow on a GPU.

Nothing is measured here. `predicted` goes by three things: every byte crosses the memory once at
the speed of a copy, every product goes through the matrix units at the speed that they reach, and
the multiprocessor with the most programs is done last. Caches, latency and whatever else a program
computes are left out, so a kernel may well take longer and hardly less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple


class Gpu(NamedTuple):
    """What a GPU reaches.

    Attributes:
        bytes_per_s: of a large copy, read and written bytes together.
        flops_per_s: of the matrix units on bf16, a multiplication and an addition being two.
        multiprocessors: how many it has.
        launch_s: time of an empty kernel.
    """

    bytes_per_s: float
    flops_per_s: float
    multiprocessors: int
    launch_s: float


# The copy and the empty kernel as measured (bench/results/nvidia-h200/floor.csv). Triton's small
# products compile to mma.sync, which reaches about half of the 800 TFLOP/s of wgmma.
H200 = Gpu(bytes_per_s=4.22e12, flops_per_s=400e12, multiprocessors=132, launch_s=2.75e-6)


class Work(NamedTuple):
    """What one launch has to do.

    Attributes:
        moved: bytes that are read and written.
        flops: of the products, each counted once.
        passes: how often the matrix units make each product, in units of bf16: 1 for bf16, 3 for
            bf16x3, 2 for tf32, 6 for tf32x3.
        programs: blocks of the grid.
        warps: of a program.
        warps_per_sm: resident warps of a multiprocessor, as `python -m bench.compiled` lists them.
    """

    moved: int
    flops: int
    passes: int
    programs: int
    warps: int
    warps_per_sm: int


class Prediction(NamedTuple):
    """Times in seconds.

    Attributes:
        memory_s: floor of the bytes.
        products_s: floor of the products.
        waves: how often the programs fill the GPU; below 1 they do not.
        predicted_s: the larger floor, stretched to the multiprocessor with the most programs, and
            the time of an empty kernel.
    """

    memory_s: float
    products_s: float
    waves: float
    predicted_s: float

    @property
    def floor_s(self) -> float:
        """The larger of the floors."""
        return max(self.memory_s, self.products_s)


def predicted(work: Work, gpu: Gpu = H200) -> Prediction:
    """The floors and the time of one launch.

    Raises:
        ValueError: no programs, or not one of them fits on a multiprocessor.
    """
    if work.programs < 1:
        raise ValueError(f"programs: expected at least 1, got {work.programs}")
    resident = work.warps_per_sm // work.warps
    if resident < 1:
        raise ValueError(
            f"warps_per_sm: expected at least the {work.warps} of a program, got"
            f" {work.warps_per_sm}"
        )
    memory_s = work.moved / gpu.bytes_per_s
    products_s = work.flops * work.passes / gpu.flops_per_s
    each = work.programs / gpu.multiprocessors
    stretched = max(memory_s, products_s) * math.ceil(each) / each
    return Prediction(memory_s, products_s, each / resident, gpu.launch_s + stretched)


def markdown(works: Mapping[str, Work], gpu: Gpu = H200) -> str:
    """A table with a row for each launch, by the name of its shape."""
    lines = [
        "| shape | MB | memory (µs) | products (µs) | programs | warps per multiprocessor | waves"
        " | floor (µs) | predicted (µs) |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, work in works.items():
        p = predicted(work, gpu)
        cells = (
            name,
            f"{work.moved / 1e6:.1f}",
            f"{1e6 * p.memory_s:.1f}",
            f"{1e6 * p.products_s:.1f}",
            str(work.programs),
            str(work.warps_per_sm),
            f"{p.waves:.2f}",
            f"{1e6 * p.floor_s:.1f}",
            f"{1e6 * p.predicted_s:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
