"""Tiles of matrices in memory, and their products in float32 accuracy on matrix units.

A tensor goes to a kernel as a tuple: its address and its strides.

A float32 number is the sum of three bfloat16 numbers, to the last bit: 3 × 8 bits of significand.
A product of two such sums is made of products of bfloat16 numbers, which are exact, added in
float32. ``ORDER`` says which of them are left out: term i of one and term j of the other are
multiplied if i + j <= ORDER. Order 1 has three products ("bf16x3") and keeps 16 bits; order 2 has
six ("bf16x6") and keeps 24. Numbers that are bfloat16 already have one term, float16 numbers two.
Infinities become NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs

# Triton's interpreter cuts float32 to bfloat16 instead of rounding it, and multiplies the bit
# patterns of bfloat16 numbers: there, the terms stay float32 numbers with 8 bits.
_INTERPRETED: tl.constexpr = tl.constexpr(bool(knobs.runtime.interpret))


def constant(value: int | None) -> Any:
    """What kernels are compiled with; the interpreter computes with plain numbers."""
    return value if knobs.runtime.interpret else tl.constexpr(value)


def with_strides(tensor: Any) -> Any:
    """A tensor as a kernel takes it: address and strides; None if it is absent."""
    return None if tensor is None else (tensor, *tensor.stride())


class Axis(NamedTuple):
    """Places along one axis of a tile: their numbers in int64, and which of them are there."""

    offs: Any
    mask: Any


class Matrix(NamedTuple):
    """A matrix in memory, inside a kernel."""

    ptr: Any
    stride_i: Any
    stride_j: Any


@triton.jit
def axis(start, end, BLOCK: tl.constexpr):
    """Places from ``start`` on, as far as ``end``."""
    offs = (start + tl.arange(0, BLOCK)).to(tl.int64)
    return Axis(offs, offs < end)


@triton.jit
def matrix(tensor, task):
    """A task's matrix of a tensor (address, strides of the task and of the two axes)."""
    return Matrix(tensor[0] + task * tensor[1], tensor[2], tensor[3])


@triton.jit
def dense(ptr, task, rows, columns):
    """A task's matrix of a contiguous tensor [T, rows, columns]."""
    stride = tl.cast(columns, tl.int64)
    return Matrix(ptr + task * rows * stride, stride, 1)


@triton.jit
def transposed(of):
    """The same matrix with its axes exchanged."""
    return Matrix(of.ptr, of.stride_j, of.stride_i)


@triton.jit
def pointers(of, i, j):
    """Where the elements of a tile are."""
    return of.ptr + (i.offs[:, None] * of.stride_i + j.offs[None, :] * of.stride_j)


@triton.jit
def inside(i, j):
    """Which elements of a tile are there."""
    return i.mask[:, None] & j.mask[None, :]


@triton.jit
def load(of, i, j):
    """A tile in float32, zero outside."""
    return tl.load(pointers(of, i, j), mask=inside(i, j), other=0.0).to(tl.float32)


@triton.jit
def store(of, tile, i, j):
    """Write a tile, rounded to the matrix's type."""
    tl.store(pointers(of, i, j), tile.to(of.ptr.dtype.element_ty), mask=inside(i, j))


def terms_of(dtype: torch.dtype) -> int:
    """How many bfloat16 numbers add up to a number of this type."""
    return {torch.bfloat16: 1, torch.float16: 2}.get(dtype, 3)


@triton.jit
def _leading(x):
    """The bfloat16 number next to x, to even in the middle."""
    if _INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        result = bits.to(tl.float32, bitcast=True)
    else:
        result = x.to(tl.bfloat16)
    return result


@triton.jit
def dot_split(a, b, TERMS_A: tl.constexpr, TERMS_B: tl.constexpr, ORDER: tl.constexpr):
    """a·b of float32 tiles that are sums of so many terms, small products first."""
    a0, b0 = _leading(a), _leading(b)
    product = tl.zeros((a.shape[0], b.shape[1]), tl.float32)
    if TERMS_A > 1:
        rest_a = a - a0.to(tl.float32)
        a1 = _leading(rest_a)
    if TERMS_B > 1:
        rest_b = b - b0.to(tl.float32)
        b1 = _leading(rest_b)
    if ORDER > 1:
        if TERMS_A > 2:
            product = tl.dot(_leading(rest_a - a1.to(tl.float32)), b0, product)
        if TERMS_B > 2:
            product = tl.dot(a0, _leading(rest_b - b1.to(tl.float32)), product)
        if (TERMS_A > 1) & (TERMS_B > 1):
            product = tl.dot(a1, b1, product)
    if TERMS_A > 1:
        product = tl.dot(a1, b0, product)
    if TERMS_B > 1:
        product = tl.dot(a0, b1, product)
    return tl.dot(a0, b0, product)


@triton.jit
def product(a, b):
    """a·b of float32 tiles to 24 bits."""
    return dot_split(a, b, 3, 3, 2)
