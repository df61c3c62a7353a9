"""Arithmetic of launch sizes."""

from __future__ import annotations

__all__ = ["ceil_div", "power_of_two"]


def power_of_two(number: int) -> int:
    """The least power of two that is no smaller."""
    return 1 << max(0, number - 1).bit_length()


def ceil_div(number: int, divisor: int) -> int:
    """How many pieces of this size cover the number."""
    return -(-number // divisor)
