"""Launches of Triton kernels: for which GPU, through Triton's front, or without it.

Nothing here imports Triton before a kernel is launched.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import operator
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

__all__ = [
    "TRIED",
    "as_current",
    "hooked",
    "launch_of",
    "launcher",
    "run",
    "target",
    "triton_runtime",
    "triton_version",
]

# Versions of Triton whose compiled kernels have been launched without its front.
TRIED = ((3, 6), (3, 7))
# Registers of a multiprocessor, and so the most that one block can have.
_BLOCK_REGISTERS = 65536


# Which Triton, which GPU


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


_forced_target: str | None = None


@functools.cache
def _architecture(device: torch.device) -> str:
    """Asked of the driver once for each device."""
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


def launcher() -> tuple[bool, str]:
    """Whether compiled kernels are launched without Triton's front on an NVIDIA GPU, and why."""
    version = triton_version()
    if version is None:
        return False, "triton is not installed"
    name = ".".join(map(str, version))
    if version[:2] not in TRIED:
        tried = ", ".join(".".join(map(str, each)) for each in TRIED)
        return False, f"through Triton's front: triton {name} is none of those tried ({tried})"
    return True, f"direct launches, triton {name}"


# Launches


def _options(device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    """The compiler's options with those that every kernel has.

    Products and sums fuse into one rounding whatever the compiler's default is: Triton 3.10 changes
    that, and with it the last bit of every result.
    """
    most = options.get("maxnreg", 255)
    options = {name: value for name, value in options.items() if name != "maxnreg"}
    options["enable_fp_fusion"] = True
    architecture = target(device)
    warps = options.get("num_warps", 4)
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
    """Launch a kernel on a one-dimensional grid through Triton's front; return what it compiled.

    An empty grid launches nothing.
    """
    if programs == 0:
        return None
    with as_current(device):
        return kernel[(programs,)](*arguments, **_options(device, options))


# Without Triton's front


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


def _flat(slots: Any) -> list[int]:
    return [i for each in slots for i in (_flat(each) if isinstance(each, tuple) else [each])]


def _picks(slots: tuple[Any, ...]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Picks the values at the slots, in tuples as these are."""
    if not any(isinstance(each, tuple) for each in slots):
        return operator.itemgetter(*slots)
    # One tuple takes less time than many: all values at once, then those of each argument.
    flat = operator.itemgetter(*_flat(slots))
    sizes = [len(each) if isinstance(each, tuple) else None for each in slots]
    ends = list(itertools.accumulate(size or 1 for size in sizes))
    cuts = [
        end - 1 if size is None else slice(end - size, end)
        for size, end in zip(sizes, ends, strict=True)
    ]
    cut = operator.itemgetter(*cuts)
    return lambda pool: cut(flat(pool))


def launch_of(
    made: Any, programs: int, slots: tuple[Any, ...]
) -> Callable[[int, Sequence[Any]], None]:
    """What launches a compiled kernel, given a stream and a pool of all values.

    ``slots`` say where in the pool the kernel's arguments are, in tuples as the kernel takes them.
    The function in C below the kernel's launcher is called where its arguments are as in the
    versions tried, since the launcher only adds memory that no kernel here has; else the launcher.
    """
    run, function, packed = made.run, made.function, made.packed_metadata
    below = getattr(run, "launch", None)
    sizes = [getattr(run, f"{kind}_scratch_size", None) for kind in ("global", "profile")]
    hooks = scratch = (None, None)
    pick = _picks(slots)

    def by_launcher(stream: int, pool: Sequence[Any]) -> None:
        run(programs, 1, 1, stream, function, packed, None, *hooks, *pick(pool))

    if below is None or sizes != [0, 0]:
        return by_launcher
    options = (run.launch_cooperative_grid, run.launch_pdl)
    if not hasattr(run, "kernel_signature"):
        rest_3_6 = (*options, *scratch, packed, None, *hooks)

        def of_3_6(stream: int, pool: Sequence[Any]) -> None:
            below(programs, 1, 1, stream, function, *rest_3_6, *pick(pool))

        return of_3_6
    rest = (*options, packed, None, *hooks, *scratch, run.arg_annotations, run.kernel_signature)

    def of_3_7(stream: int, pool: Sequence[Any]) -> None:
        below(programs, 1, 1, stream, function, *rest, pick(pool))

    return of_3_7
