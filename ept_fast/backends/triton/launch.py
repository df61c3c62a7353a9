"""Launches of Triton kernels, through Triton's front or without it.

Nothing here imports Triton before a kernel is launched.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from ept_fast.backends.fused import target

__all__ = [
    "TRIED",
    "as_current",
    "dotted",
    "hooked",
    "launch_of",
    "launcher",
    "leaves",
    "run",
    "triton_runtime",
    "triton_version",
]

# Versions of Triton whose compiled kernels have been launched without its front.
TRIED = ((3, 6), (3, 7))
# Registers of a multiprocessor, and so the most that one block can have.
_BLOCK_REGISTERS = 65536


# Which Triton


@functools.cache
def triton_version() -> tuple[int, ...] | None:
    """Triton's version, without importing it; None if it is not installed."""
    for name in ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm"):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return tuple(int(part) for part in re.findall(r"\d+", found)[:3])
    return None


def dotted(version: tuple[int, ...]) -> str:
    """A version as it is written."""
    return ".".join(map(str, version))


def launcher() -> tuple[bool, str]:
    """Whether compiled kernels are launched without Triton's front on an NVIDIA GPU, and why."""
    version = triton_version()
    if version is None:
        return False, "triton is not installed"
    name = dotted(version)
    if version[:2] not in TRIED:
        tried = ", ".join(map(dotted, TRIED))
        return False, f"through Triton's front: triton {name} is none of those tried ({tried})"
    return True, f"direct launches, triton {name}"


# Through Triton's front


def _options(device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    """The compiler's options with those that every kernel has.

    Products and sums fuse into one rounding whatever the compiler's default is: Triton 3.10 changes
    that, and with it the last bit of every result.
    """
    architecture, options = target(device), {**options, "enable_fp_fusion": True}
    most, warps = options.pop("maxnreg", 255), options.get("num_warps", 4)
    if architecture.startswith("gfx"):
        options["num_warps"] = min(8, warps)  # of 64 threads each
    elif architecture.startswith("sm_"):
        if int(architecture[3:]) >= 100:
            # Launch sizes are chosen for sm_80 and sm_90. Here as many registers a thread, or as
            # many warps, would make the compiler spill.
            most, warps = 255, min(8, warps)
            options["num_warps"] = warps
        # Without a limit of its own, ptxas spills a few registers to fit one more block.
        options["maxnreg"] = min(most, _BLOCK_REGISTERS // (32 * warps))
    return options


def as_current(device: torch.device) -> AbstractContextManager[Any]:
    """The device as the current one; on a CPU it is the interpreter that runs."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def run(kernel: Any, programs: int, device: torch.device, *arguments: Any, **options: Any) -> Any:
    """Launch a kernel on a one-dimensional grid, and return what Triton compiled for it.

    An empty grid launches nothing.
    """
    if programs == 0:
        return None
    with as_current(device):
        return kernel[(programs,)](*arguments, **_options(device, options))


# Without it


@functools.cache
def triton_runtime() -> tuple[Any, Any]:
    """Triton's driver and its switches; once it is imported."""
    from triton import knobs
    from triton.runtime import driver

    return driver, knobs.runtime


def hooked() -> bool:
    """Whether something wants to know of every launch."""
    _, switches = triton_runtime()
    enter, leave = switches.launch_enter_hook, switches.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def leaves(value: Any) -> Iterator[Any]:
    """What is in tuples of tuples, in order."""
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from leaves(each)
    else:
        yield value


def launch_of(made: Any, programs: int) -> tuple[Callable[..., None], list[int]] | None:
    """``launch(stream, values)`` of a compiled kernel, and which of its leaves the values are.

    Triton's own launcher takes the arguments in tuples, as the kernel has them, with constants that
    it leaves out again. One of the same class for those that are left, side by side, takes half the
    time; and the function in C below it is called, since it only adds memory that no kernel here
    has. None if this one has, or if something else has taken the launch's place.
    """
    if not hasattr(made, "packed_metadata"):
        return None
    types = list(leaves(tuple(made.src.signature.values())))
    taken = [i for i, kind in enumerate(types) if kind != "constexpr"]
    flat = SimpleNamespace(constants={}, signature=dict(enumerate(types[i] for i in taken)))
    own = type(made.run)(flat, made.metadata)
    if own.global_scratch_size or own.profile_scratch_size:
        return None
    below, function = own.launch, made.function
    first = (own.launch_cooperative_grid, own.launch_pdl)
    said = (made.packed_metadata, None, None, None)  # and no hooks
    none = (None, None)  # no memory
    if not hasattr(own, "kernel_signature"):
        rest = (*first, *none, *said)
        return lambda stream, values: below(programs, 1, 1, stream, function, *rest, *values), taken
    rest_3_7 = (*first, *said, *none, own.arg_annotations, own.kernel_signature)
    return lambda stream, values: below(programs, 1, 1, stream, function, *rest_3_7, values), taken
