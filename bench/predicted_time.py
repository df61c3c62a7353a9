"""Time of a kernel on paper: what its bytes, its products and its programs allow on a GPU.

Nothing is measured here. `predicted` goes by three things: every byte crosses the memory once at
the speed of a copy, every product goes through the matrix units at the speed that they reach, and
the multiprocessor with the most programs is done last. Caches, latency and whatever else a program
computes are left out, so a kernel may well take longer and hardly less.

``python -m bench.predicted_time`` prints the table of the splice's launches in ``docs/kernels.md``:
what they do is read off their plans, and how many warps a multiprocessor holds off
``results/compiled/shapes.csv``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.rows import read_csv
from bench.shapes import PREDICTED, Shape


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
        programs: blocks of the grid; of the splice those of the text, as a prompt's have little to
            do and go first.
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


# The launches of the splice

_COMPILED = Path(__file__).parent / "results" / "compiled" / "shapes.csv"
_TARGET = "sm_90"


def _warps_on_record(shape: str) -> dict[str, int]:
    """Warps of a multiprocessor by kernel, for bfloat16 text and float32 parameters."""
    rows = [
        row
        for row in read_csv(_COMPILED)
        if (row["shape"], row["target"], row["types"]) == (shape, _TARGET, "bf16/fp32")
    ]
    # Of several versions of Triton the last one written.
    return {row["kernel"]: int(row["warps_per_sm"]) for row in rows}


def _product(arguments: Mapping[str, Any], programs: int, backward: bool) -> tuple[int, int, int]:
    """Programs of the text in a launch, the FLOPs of all their products, and how many products of
    bf16 each of these takes.
    """
    a = {name: value for name, value in arguments.items() if isinstance(value, int)}
    once = 2 * a["BLOCK_S"] * a["BLOCK_D"] * a["BLOCK_R"]
    blocks = -(-a["length"] // a["BLOCK_S"])
    prompt = -(-arguments["sizes"][0] // a["BLOCK_S"])
    if backward:
        blocks = -(-blocks // a["TILES"])
        once *= 2 * a["TILES"] * a["TILES_D"]
    else:
        once *= a["TILES_R"]
    mine = programs * blocks // (blocks + prompt)
    return mine, mine * once, {1: 3, 2: 5, 3: 6}[a["TERMS_G"]] if backward else 3


def splice_works(shape: Shape) -> dict[str, Work]:
    """The splice's launches by kernel, for bfloat16 text, float32 parameters and a mask.

    Bytes are counted once each: the text's embeddings, the output, ids and mask; backward the
    gradient; and the parts of sums, written by one launch and read by the next.
    """
    from ept_fast.backends.fused import splice_flags
    from ept_fast.backends.triton import calls
    from ept_fast.backends.triton.runtime import Operand, Plan
    from ept_fast.ops.types import Needs, SpliceInputs

    kind: dict[str, Any] = {"device": "meta"}
    tasks, m, d, r = shape.tasks or 1, shape.num_virtual_tokens, shape.hidden_size, shape.rank
    ids = torch.empty(shape.batch, shape.length, dtype=torch.int64, **kind)
    inputs = SpliceInputs(
        torch.empty(tasks, m, d, **kind),
        ids,
        torch.empty(shape.vocabulary, d, dtype=torch.bfloat16, **kind),
        None,
        torch.empty(tasks, shape.max_length, r, **kind),
        torch.empty(tasks, r, d, **kind),
        ids,
        ids[:, 0] if shape.tasks else None,
    )
    parameters, behind = inputs.parts()
    flags, no_sizes = splice_flags(1.0), None  # of operation 1
    forward = Plan((*parameters, *behind))
    calls.describe_path_forward(forward, flags, False, no_sizes, calls.forward_config)
    size = (shape.batch, m + shape.length, d)
    grad = torch.empty(size, dtype=torch.bfloat16, **kind)
    memory = torch.empty(forward.sizes[0], dtype=torch.uint8, **kind)
    backward = Plan((grad, *parameters, *behind, memory))
    needs = Needs(True, True)
    calls.describe_path_backward(backward, flags, False, needs, no_sizes, calls.backward_config)
    text = shape.batch * shape.length * d * 2
    out = grad.numel() * 2
    small = 4 * tasks * (m * d + (shape.max_length + d) * r)
    parts = backward.sizes[1]
    moved = {
        # The mask, and the plan without the columns of rows with holes.
        "splice_plan_kernel": ids.numel() * 8 + forward.sizes[0] - ids.numel() * 4,
        "splice_forward_kernel": text + out + ids.numel() * 8 + small,
        "splice_backward_kernel": out + small + parts,
        "splice_finish_kernel": parts + small,
    }
    warps = _warps_on_record(shape.name)
    works = {}
    for launch in (*forward.launches, *backward.launches):
        name = launch.kernel.fn.__name__
        programs, flops, passes = launch.programs, 0, 1
        if name in ("splice_forward_kernel", "splice_backward_kernel"):
            numbers = {k: v for k, v in launch.arguments.items() if not isinstance(v, Operand)}
            programs, flops, passes = _product(numbers, programs, "backward" in name)
        own_warps = launch.options["num_warps"]
        works[name] = Work(moved[name], flops, passes, programs, own_warps, warps[name])
    return works


def table() -> str:
    """The launches of the splice at the sizes that are predicted."""
    return markdown(
        {
            f"{shape.name}, {name.removeprefix('splice_').removesuffix('_kernel')}": work
            for shape in PREDICTED
            for name, work in splice_works(shape).items()
        }
    )


if __name__ == "__main__":
    print(table())
