"""What the allocator says about a call: the measure of the memory tests."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Allocations:
    """Bytes that a call asked the allocator for, exactly.

    Attributes:
        peak: the most that was there at once beyond what was there before the call.
        sizes: of every allocation, in order; on a GPU none.
        result: what the call returned, still there when it was measured.
    """

    peak: int
    sizes: list[int]
    result: Any


def allocations(call: Callable[[], Any], device: str = "cpu") -> Allocations:
    """Run the call once and follow every allocation, those inside of PyTorch's operators too.

    The garbage collector waits, so that only what the call itself lets go is counted as gone.
    """
    gc.disable()
    try:
        return _followed(call, device)
    finally:
        gc.enable()


def _followed(call: Callable[[], Any], device: str) -> Allocations:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        result = call()
        torch.cuda.synchronize()
        return Allocations(
            torch.cuda.memory_stats()["requested_bytes.all.peak"] - before, [], result
        )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    held = peak = 0
    sizes = []
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
            if event.nbytes() > 0:
                sizes.append(event.nbytes())
    return Allocations(peak, sizes, result)
