"""Call plans: what a call allocates and launches, worked out once and repeated in microseconds.

The host code of the kernels launches nothing itself. It describes a call to a :class:`Plan`, from
the tensors' shapes, strides and types alone: what is returned, what is kept for the backward, what
is scratch, and the launches in order. :func:`call` finds the plan by all that it depends on, takes
the memory (one allocation for what is kept and one for the scratch, however many tensors they hold)
and makes the launches.

A plan's first run goes through Triton's own front, which compiles. From then on a launch is one
call of the compiled kernel's launcher with addresses and numbers: the front's work of binding and
specialising arguments has no other outcome for the same plan. Plans are found by shapes, strides,
types, devices, the addresses' alignment, numbers, and the functions that choose launch sizes; a
change of any of them is another plan. At most ``PLANS`` are kept, and the one that was not used for
longest goes first.

The stream is looked up in every call and the tensors' device is made the current one, so streams,
several devices and CUDA graphs work as with the front. With another Triton than those of ``TRIED``,
with hooks on launches (a profiler's), and on GPUs other than NVIDIA's, every launch goes through
the front; :func:`launcher` says which way is taken, and why.

Nothing here imports Triton before a kernel is launched.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import operator
import os
import re
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "PLANS",
    "TRIED",
    "Launch",
    "Operand",
    "Plan",
    "Results",
    "call",
    "forget",
    "launcher",
    "plan_of",
    "plans",
    "rounded",
    "run",
    "target",
    "triton_version",
]

PLANS = 512
# Versions of Triton whose compiled kernels have been launched without its front.
TRIED = ((3, 6), (3, 7))
_ALIGNMENT = 16  # bytes: what Triton's front distinguishes, and the widest access
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
    if target(device).startswith("sm_"):
        # Without a limit of its own, ptxas spills a few registers to fit one more block.
        options["maxnreg"] = min(most, _BLOCK_REGISTERS // (32 * options.get("num_warps", 4)))
    return options


def _as_current(device: torch.device) -> AbstractContextManager[Any]:
    """The device as the current one; on a CPU it is the interpreter that runs."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def run(kernel: Any, programs: int, device: torch.device, *arguments: Any, **options: Any) -> Any:
    """Launch a kernel on a one-dimensional grid through Triton's front; return what it compiled.

    An empty grid launches nothing.
    """
    if programs == 0:
        return None
    with _as_current(device):
        return kernel[(programs,)](*arguments, **_options(device, options))


class Operand:
    """A tensor of a call: its shape, strides and type, and where a run finds it."""

    __slots__ = ("dtype", "place", "shape", "strides")

    def __init__(
        self,
        place: tuple[int, int],
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        self.place, self.shape, self.strides = place, tuple(shape), tuple(strides)
        self.dtype = dtype

    def stride(self) -> tuple[int, ...]:
        """As of a tensor."""
        return self.strides

    def numel(self) -> int:
        """As of a tensor."""
        return prod(self.shape)


def rounded(size: int) -> int:
    """The bytes that a piece of so many takes."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _contiguous(place: tuple[int, int], shape: Sequence[int], dtype: torch.dtype) -> Operand:
    strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
    return Operand(place, shape, strides, dtype)


class _Piece(NamedTuple):
    """A tensor inside a buffer; ``buffer`` counts what is kept, the scratch, then the inputs."""

    buffer: int
    start: int
    operand: Operand


class Launch(NamedTuple):
    """One launch: the kernel, programs of the grid, its arguments by name, compiler's options."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, Any]


class Results(NamedTuple):
    """What a call gives: the tensors returned, and the memory of what is kept (None: nothing)."""

    returned: list[Tensor]
    kept: Tensor | None


_INPUTS, _RETURNED, _PIECES = range(3)
_KEPT, _SCRATCH, _FIRST_INPUT = range(3)


class Plan:
    """What one call allocates and launches. Host code fills it; a run carries it out.

    Args:
        inputs: the call's tensors; None for those that are absent.
    """

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        self.device = next(t.device for t in inputs if t is not None)
        self.last_used = 0
        self.inputs: list[Any] = [
            None if t is None else Operand((_INPUTS, i), t.shape, t.stride(), t.dtype)
            for i, t in enumerate(inputs)
        ]
        self._returned: list[Operand] = []
        self._pieces: list[_Piece] = []
        self._sizes = [0, 0]  # bytes of what is kept and of the scratch
        self.launches: list[Launch] = []
        self._direct: list[tuple[Any, ...]] | None = None

    # For host code

    def returned(self, shape: Sequence[int], dtype: torch.dtype) -> Operand:
        """A new tensor that the call returns."""
        found = _contiguous((_RETURNED, len(self._returned)), shape, dtype)
        self._returned.append(found)
        return found

    def kept(self, shape: Sequence[int], dtype: torch.dtype) -> Operand:
        """A new tensor in the memory that is kept."""
        return self._piece(_KEPT, shape, dtype)

    def scratch(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Operand:
        """A new tensor in the memory that is free again once the launches have run."""
        return self._piece(_SCRATCH, shape, dtype)

    def pieces_of(self, memory: Operand) -> Callable[[Sequence[int], torch.dtype], Operand]:
        """For an input that another call has kept: what finds the tensors in it, in their order."""
        buffer = _FIRST_INPUT + memory.place[1]
        self._sizes += [0] * (buffer + 1 - len(self._sizes))
        return functools.partial(self._piece, buffer)

    def _piece(self, buffer: int, shape: Sequence[int], dtype: torch.dtype) -> Operand:
        found = _contiguous((_PIECES, len(self._pieces)), shape, dtype)
        self._pieces.append(_Piece(buffer, self._sizes[buffer], found))
        self._sizes[buffer] += rounded(found.numel() * dtype.itemsize)
        return found

    def launch(self, kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
        """Launch a kernel on a one-dimensional grid, after the launches before.

        Args:
            kernel: a Triton kernel.
            programs: of the grid; 0 launches nothing.
            *arguments: the kernel's first ones: operands, numbers, None.
            **options: its others by name, and the compiler's options.
        """
        if programs == 0:
            return
        names = kernel.arg_names
        given = dict(zip(names, arguments, strict=False))
        given |= {name: options.pop(name) for name in names if name in options}
        ordered = {name: given[name] for name in names}
        self.launches.append(Launch(kernel, programs, ordered, options))

    @property
    def kernels(self) -> list[str]:
        """The names of the kernels launched, in order."""
        return [launch.kernel.fn.__name__ for launch in self.launches]

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of what is kept and of the scratch."""
        return self._sizes[_KEPT], self._sizes[_SCRATCH]

    # A run

    def carry_out(self, tensors: Sequence[Tensor | None]) -> Results:
        """Allocate, launch and return, for tensors that the plan is of."""
        device = self.device
        returned = [torch.empty(o.shape, dtype=o.dtype, device=device) for o in self._returned]
        kept, scratch = (
            torch.empty(size, dtype=torch.uint8, device=device) if size else None
            for size in self._sizes[:2]
        )
        if self._direct is None or _hooked():
            self.launch_all(tensors, returned, kept, scratch)
            return Results(returned, kept)
        driver = _driver()
        index = driver.get_current_device()
        with nullcontext() if device.index in (index, None) else torch.cuda.device(device):
            stream = driver.get_current_stream(index if device.index is None else device.index)
            pool: list[Any] = [None if t is None else t.data_ptr() for t in tensors]
            bases = [0 if b is None else b.data_ptr() for b in (kept, scratch)]
            bases += pool
            pool += [t.data_ptr() for t in returned]
            pool += [bases[buffer] + start for buffer, start in self._starts]
            pool += self._numbers
            for launch, programs, function, packed, pick in self._direct:
                launch(programs, 1, 1, stream, function, packed, None, None, None, *pick(pool))
        return Results(returned, kept)

    def launch_all(
        self,
        tensors: Sequence[Tensor | None],
        returned: list[Tensor],
        kept: Tensor | None,
        scratch: Tensor | None,
    ) -> None:
        """Launch through Triton's front, and keep what it compiled for the runs to come."""
        buffers = [kept, scratch, *tensors]
        pieces = [_view(buffers[p.buffer], p.start, p.operand) for p in self._pieces]
        places: tuple[Sequence[Any], ...] = (tensors, returned, pieces)

        def resolved(value: Any) -> Any:
            return places[value.place[0]][value.place[1]] if isinstance(value, Operand) else value

        compiled = []
        for kernel, programs, arguments, options in self.launches:
            given = {name: resolved(value) for name, value in arguments.items()}
            compiled.append(run(kernel, programs, self.device, **given, **options))
        if self._direct is None and launcher()[0] and target(self.device).startswith("sm_"):
            self._make_direct(compiled)

    def _make_direct(self, compiled: list[Any]) -> None:
        """Lay out the list that the launches' arguments are picked from."""
        firsts = list(
            itertools.accumulate((len(self.inputs), len(self._returned), len(self._pieces)))
        )
        offsets = [0, *firsts]
        numbers: list[Any] = []
        direct = []
        for launch, made in zip(self.launches, compiled, strict=True):
            if not all(hasattr(made, name) for name in ("run", "function", "packed_metadata")):
                return  # a hook has taken the launch's place
            slots = []
            for value in launch.arguments.values():
                if isinstance(value, Operand) and value.numel():
                    slots.append(offsets[value.place[0]] + value.place[1])
                else:
                    slots.append(offsets[-1] + len(numbers))
                    # The address of an empty tensor is 0, also inside a buffer.
                    numbers.append(0 if isinstance(value, Operand) else value)
            pick = operator.itemgetter(*slots)
            packed = made.packed_metadata
            direct.append((made.run, launch.programs, made.function, packed, pick))
        self._starts = [(piece.buffer, piece.start) for piece in self._pieces]
        self._numbers = numbers
        self._direct = direct  # last: another thread may be waiting to use it


def _view(memory: Tensor | None, start: int, operand: Operand) -> Tensor:
    """A tensor inside a buffer of bytes."""
    assert memory is not None or operand.numel() == 0
    if memory is None:
        return torch.empty(operand.shape, dtype=operand.dtype)
    found = memory[start : start + operand.numel() * operand.dtype.itemsize]
    return found.view(operand.dtype).view(operand.shape)


def _driver() -> Any:
    from triton.runtime import driver

    return driver.active


def _hooked() -> bool:
    """Whether something wants to know of every launch."""
    from triton import knobs

    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return any(getattr(hook, "calls", hook) for hook in hooks)


# Plans by what they depend on

_plans: dict[Any, Plan] = {}
_lock = threading.Lock()
_clock = itertools.count(1)


def plan_of(
    describe: Callable[..., None],
    tensors: Sequence[Tensor | None],
    *choices: Any,
    known: Hashable = None,
) -> Plan:
    """The plan of a call that host code describes; made now unless it was made before.

    Args:
        describe: ``describe(plan, *choices)`` fills a plan from the operands in ``plan.inputs``.
            It may depend on these and on ``choices`` only.
        tensors: the call's tensors, on one device.
        *choices: numbers, names, and the functions that choose launch sizes.
        known: stands for what a plan depends on of the tensors: equal for the same shapes, strides,
            types, devices and alignment, and for no others; None: look at them.
    """
    facts = tuple(map(_facts, tensors)) if known is None else known
    key = (describe, choices, facts)
    plan = _plans.get(key)
    if plan is None:
        plan = Plan(tensors)
        describe(plan, *choices)
        plan.last_used = next(_clock)
        with _lock:
            if key not in _plans and len(_plans) >= PLANS:
                del _plans[min(_plans, key=lambda key: _plans[key].last_used)]
            _plans[key] = plan
    plan.last_used = next(_clock)
    return plan


def _facts(tensor: Tensor | None) -> Hashable:
    if tensor is None:
        return None
    alignment = tensor.data_ptr() % _ALIGNMENT
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, alignment


def call(
    describe: Callable[..., None],
    tensors: Sequence[Tensor | None],
    *choices: Any,
    known: Hashable = None,
) -> Results:
    """Carry out a call by its plan (:func:`plan_of`)."""
    return plan_of(describe, tensors, *choices, known=known).carry_out(tensors)


def plans() -> int:
    """How many plans are kept."""
    return len(_plans)


def forget() -> None:
    """Drop all plans."""
    with _lock:
        _plans.clear()


def _after_fork() -> None:
    """A compiled kernel belongs to the process that loaded it, as does a lock's holder."""
    global _lock
    _lock = threading.Lock()
    _plans.clear()


os.register_at_fork(after_in_child=_after_fork)
