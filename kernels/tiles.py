"""Products of float32 tiles on matrix units.

A float32 number is the sum of three bfloat16 numbers, to the last bit: 3 × 8 bits of significand.
A product of two such sums is made of products of bfloat16 numbers, which are exact, added in
float32. ``ORDER`` says which of them are left out: term i of one and term j of the other are
multiplied if i + j <= ORDER. Order 1 has three products ("bf16x3") and keeps 16 bits; order 2 has
six ("bf16x6") and keeps 24. Numbers that are bfloat16 already have one term, float16 numbers two.
Infinities become NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton import knobs

__all__ = ["dot_split", "terms_of"]

# Triton's interpreter cuts float32 to bfloat16 instead of rounding it, and multiplies the bit
# patterns of bfloat16 numbers: there, the terms stay float32 numbers with 8 bits.
_INTERPRETED: tl.constexpr = tl.constexpr(bool(knobs.runtime.interpret))

_TERMS = {torch.bfloat16: 1, torch.float16: 2}


def terms_of(dtype: torch.dtype) -> int:
    """How many bfloat16 numbers add up to a number of this type."""
    return _TERMS.get(dtype, 3)


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
