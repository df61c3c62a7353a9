"""Kernels that each break one rule of `bench.compiled`, and one that breaks none.

Run as a program without ``TRITON_INTERPRET``: it prints, in JSON, the rules broken by toy and
target, and the targets for which a launch makes other code than the one that is checked. A toy is a
kernel, what it is launched with, and limits for it.
"""

from __future__ import annotations

import json
import sys
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from bench.compiled import LIMITED, TARGETS, Limits, broken, compiled, recorded, standing_in
from ept_fast.backends.triton.launch import run


@triton.jit
def clean(x_ptr, out_ptr, number, stride_x, BLOCK: tl.constexpr):
    offs = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    mask = offs < number
    x = tl.load(x_ptr + offs * stride_x, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, (x * 2).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def atomics(x_ptr, out_ptr, number, stride_x, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK).to(tl.int64)
    mask = offs < number
    x = tl.load(x_ptr + offs * stride_x, mask=mask, other=0.0).to(tl.float32)
    tl.atomic_add(out_ptr, tl.sum(x))


@triton.jit
def float64(x_ptr, out_ptr, number, stride_x, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK).to(tl.int64)
    mask = offs < number
    x = tl.load(x_ptr + offs * stride_x, mask=mask, other=0.0)
    total = tl.sum(x.to(tl.float64))
    tl.store(out_ptr + offs, (x + total).to(tl.float32), mask=mask)


@triton.jit
def narrow_offset(x_ptr, out_ptr, number, stride_x, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < number
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    tl.store(out_ptr + offs.to(tl.int64), x, mask=mask)


@triton.jit
def narrow_product(x_ptr, out_ptr, number, stride_x, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < number
    x = tl.load(x_ptr + (offs * stride_x).to(tl.int64), mask=mask, other=0.0)
    tl.store(out_ptr + offs.to(tl.int64), x, mask=mask)


@triton.jit
def spills(x_ptr, out_ptr, number, stride_x, BLOCK: tl.constexpr):
    # more values than one warp has registers, held over a reduction
    offs = tl.arange(0, BLOCK).to(tl.int64)
    mask = offs < number
    x = tl.load(x_ptr + offs * stride_x, mask=mask, other=0.0)
    tl.store(out_ptr + offs, x * tl.sum(x), mask=mask)


@triton.jit
def shared(x_ptr, out_ptr, number, stride_x, BLOCK: tl.constexpr):
    offs_m, offs_n = tl.arange(0, 16).to(tl.int64), tl.arange(0, 16).to(tl.int64)
    total = tl.zeros((16, 16), tl.float32)
    for start in range(0, number, BLOCK):
        offs_k = (start + tl.arange(0, BLOCK)).to(tl.int64)
        a = tl.load(x_ptr + offs_m[:, None] * stride_x + offs_k[None, :])
        b = tl.load(x_ptr + offs_n[None, :] * stride_x + offs_k[:, None])
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(out_ptr + offs_m[:, None] * 16 + offs_n[None, :], total)


@triton.jit
def no_code(x_ptr, out_ptr, number, stride_x, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK - 1)  # not a power of two
    tl.store(out_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
def product(x_ptr, out_ptr, number, stride_x, BLOCK: tl.constexpr):
    offs_m, offs_k = tl.arange(0, 64).to(tl.int64), tl.arange(0, BLOCK).to(tl.int64)
    x = tl.load(x_ptr + offs_m[:, None] * stride_x + offs_k[None, :])
    total = tl.dot(x, tl.trans(x))
    tl.store(out_ptr + offs_m[:, None] * 64 + offs_m[None, :], total)


_OPTIONS = {"BLOCK": 512}


class Toy(NamedTuple):
    kernel: Any
    limits: Limits | None = None
    options: dict[str, int] = _OPTIONS


# Every limit at what no kernel fails, for all but the one of the toy.
_NONE = Limits(255, 0, matrix=False, wide_loads=0.0, wide_stores=0.0)
TOYS = {
    "clean": Toy(clean),
    "atomics": Toy(atomics),
    "float64": Toy(float64),
    "narrow_offset": Toy(narrow_offset),
    "narrow_product": Toy(narrow_product),
    "spills": Toy(spills),
    "shared": Toy(shared, options={"BLOCK": 512, "num_stages": 5}),
    "no_code": Toy(no_code),
    "within_limits": Toy(product, Limits(), {"BLOCK": 32}),
    "many_registers": Toy(product, _NONE._replace(registers=16), {"BLOCK": 32}),
    "few_warps": Toy(shared, _NONE._replace(warps_per_sm=16), {"BLOCK": 512, "num_stages": 2}),
    "no_product": Toy(clean, _NONE._replace(matrix=True)),
    "scattered_loads": Toy(clean, _NONE._replace(wide_loads=0.5)),
}


class WithoutLaunch:
    """Compiles `clean` as a launch does, and launches nothing."""

    hash = ""

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.hash = clean.warmup(*arguments, grid=grid, **options).hash

        return launch


def main() -> None:
    found: dict[str, dict[str, dict[str, str]]] = {}
    x, out = torch.empty(1 << 16), torch.empty(1 << 16)
    for toy_name, (kernel, limits, options) in TOYS.items():
        for name, target in TARGETS.items():
            if kernel is spills:
                # 256 registers a lane on NVIDIA, 512 on AMD
                options = {"BLOCK": 256 * target.warp_size * (target.warp_size // 32)}
                options["num_warps"] = 1
            with recorded(target) as launches:
                run(kernel, 1, x.device, x, out, 4096, 48, **options)
            (code,) = compiled(launches)
            own = limits if name in LIMITED else None
            found.setdefault(toy_name, {})[name] = broken(code, target, limits=own)
    differing = []
    for name, target in TARGETS.items():
        arguments = (x.device, x, out[1:], 4097, 1)
        with recorded(target) as launches:
            run(clean, 1, *arguments, BLOCK=512, num_warps=2)
        (one,) = launches
        with standing_in(target):
            launched = WithoutLaunch()
            run(launched, 1, *arguments, BLOCK=512, num_warps=2)
            if launched.hash != clean.preload(one.data).hash:
                differing.append(name)
    json.dump({"broken": found, "differing": differing}, sys.stdout)


if __name__ == "__main__":
    main()
