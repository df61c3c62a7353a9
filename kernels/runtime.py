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
several devices and CUDA graphs work as with the front. With another Triton than those tried, with
hooks on launches (a profiler's), and on GPUs other than NVIDIA's, every launch goes through the
front; :func:`ept_fast.kernels.launch.launcher` says which way is taken, and why.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ept_fast.kernels.launch import hooked, launch_of, launcher, run, target, triton_runtime

__all__ = [
    "PLANS",
    "Add",
    "Launch",
    "Operand",
    "Plan",
    "Results",
    "call",
    "facts_of",
    "forget",
    "plan_of",
    "plans",
    "rounded",
]

PLANS = 512
_ALIGNMENT = 16  # bytes: what Triton's front distinguishes, and the widest access


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

    def dim(self) -> int:
        """As of a tensor."""
        return len(self.shape)

    def unsqueeze(self, dim: int) -> Operand:
        """As of a tensor, for a new first axis."""
        assert dim == 0
        return Operand(self.place, (1, *self.shape), (1, *self.strides), self.dtype)


def rounded(size: int) -> int:
    """The bytes that a piece of so many takes."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _contiguous(place: tuple[int, int], shape: Sequence[int], dtype: torch.dtype) -> Operand:
    strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
    return Operand(place, shape, strides, dtype)


# Makes an operand of a shape and type, or finds it in memory that another call has kept.
Add = Callable[[Sequence[int], torch.dtype], Any]


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
        self.results: list[Operand] = []
        self.pieces: list[_Piece] = []
        self._sizes = [0, 0]  # bytes of what is kept and of the scratch, so far
        self._most_scratch = 0
        self.launches: list[Launch] = []
        self._like: dict[int, int] = {}  # results by inputs of the same shape and strides
        self._direct: _Direct | None = None
        self._new: list[Any] = []
        self._new_buffers: list[Any] = [None, None]

    # For host code

    def returned(self, shape: Sequence[int], dtype: torch.dtype) -> Operand:
        """A new tensor that the call returns."""
        found = _contiguous((_RETURNED, len(self.results)), shape, dtype)
        self.results.append(found)
        return found

    def returned_like(self, operand: Operand) -> Operand:
        """A new tensor of an input's shape and type, without gaps, that the call returns."""
        found = self.returned(operand.shape, operand.dtype)
        if operand.strides == found.strides and operand.place[0] == _INPUTS:
            self._like[found.place[1]] = operand.place[1]
        return found

    def kept(self, shape: Sequence[int], dtype: torch.dtype) -> Operand:
        """A new tensor in the memory that is kept."""
        return self._piece(_KEPT, shape, dtype)

    def scratch(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Operand:
        """A new tensor in the memory that is free again once the launches have run."""
        return self._piece(_SCRATCH, shape, dtype)

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Scratch that is asked for within is free for others after it, in the launches' order."""
        before = self._sizes[_SCRATCH]
        yield
        self._most_scratch = max(self._most_scratch, self._sizes[_SCRATCH])
        self._sizes[_SCRATCH] = before

    def pieces_of(self, memory: Operand) -> Add:
        """For an input that another call has kept: what finds the tensors in it, in their order."""
        buffer = _FIRST_INPUT + memory.place[1]
        self._sizes += [0] * (buffer + 1 - len(self._sizes))
        return functools.partial(self._piece, buffer)

    def _piece(self, buffer: int, shape: Sequence[int], dtype: torch.dtype) -> Operand:
        found = _contiguous((_PIECES, len(self.pieces)), shape, dtype)
        self.pieces.append(_Piece(buffer, self._sizes[buffer], found))
        self._sizes[buffer] += rounded(found.numel() * dtype.itemsize)
        return found

    def launch(self, kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
        """Launch a kernel on a one-dimensional grid, after the launches before.

        Args:
            kernel: a Triton kernel.
            programs: of the grid; 0 launches nothing.
            *arguments: the kernel's first ones: operands, numbers, None, and tuples of them.
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
        return self._sizes[_KEPT], max(self._most_scratch, self._sizes[_SCRATCH])

    # A run

    def carry_out(self, tensors: Sequence[Tensor | None]) -> Results:
        """Allocate, launch and return, for tensors that the plan is of."""
        # What is made like another tensor takes a third of the time.
        returned = [
            new() if like is None else torch.empty_like(tensors[like]) for new, like in self._new
        ]
        new_kept, new_scratch = self._new_buffers
        kept = new_kept and new_kept()
        scratch = new_scratch and new_scratch()
        if self._direct is None or hooked():
            self.launch_all(tensors, returned, kept, scratch)
        else:
            self._direct.launch_all(tensors, returned, kept, scratch)
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
        pieces = [_view(buffers[p.buffer], p.start, p.operand) for p in self.pieces]
        places: tuple[Sequence[Any], ...] = (tensors, returned, pieces)

        def resolved(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(resolved, value))
            return places[value.place[0]][value.place[1]] if isinstance(value, Operand) else value

        compiled = []
        for kernel, programs, arguments, options in self.launches:
            given = {name: resolved(value) for name, value in arguments.items()}
            compiled.append(run(kernel, programs, self.device, **given, **options))
        if self._direct is None and launcher()[0] and target(self.device).startswith("sm_"):
            self._direct = _Direct.of(self, compiled)

    def seal(self) -> None:
        """Host code has said all: prepare the allocations."""
        kind: dict[str, Any] = {"device": self.device}
        self._new = [
            (functools.partial(torch.empty, o.shape, dtype=o.dtype, **kind), self._like.get(i))
            for i, o in enumerate(self.results)
        ]
        self._new_buffers = [
            functools.partial(torch.empty, size, dtype=torch.uint8, **kind) if size else None
            for size in self.sizes
        ]


class _Direct:
    """A plan's launches without Triton's front.

    A run lays all addresses and numbers of the call side by side, in the order of ``Operand.place``
    and then the numbers; each launch picks its arguments from them by their slots.
    """

    def __init__(self, plan: Plan, launches: list[Any], numbers: list[Any]) -> None:
        self._device = plan.device
        self._starts = [(piece.buffer, piece.start) for piece in plan.pieces]
        self._launches, self._numbers = launches, numbers

    @classmethod
    def of(cls, plan: Plan, compiled: list[Any]) -> _Direct | None:
        """For what the front compiled; None if something has taken a launch's place."""
        if not all(hasattr(made, "packed_metadata") for made in compiled):
            return None
        counts = len(plan.inputs), len(plan.results), len(plan.pieces)
        offsets = [0, *itertools.accumulate(counts)]
        numbers: list[Any] = []
        launches = []
        for launch, made in zip(plan.launches, compiled, strict=True):

            def slot(value: Any) -> Any:
                if isinstance(value, tuple):
                    return tuple(map(slot, value))
                if isinstance(value, Operand) and value.numel():
                    return offsets[value.place[0]] + value.place[1]
                # The address of an empty tensor is 0, also inside a buffer.
                numbers.append(0 if isinstance(value, Operand) else value)
                return offsets[-1] + len(numbers) - 1

            slots = tuple(map(slot, launch.arguments.values()))
            launches.append(launch_of(made, launch.programs, slots))
        return cls(plan, launches, numbers)

    def launch_all(
        self,
        tensors: Sequence[Tensor | None],
        returned: list[Tensor],
        kept: Tensor | None,
        scratch: Tensor | None,
    ) -> None:
        """Make the launches, in order, on the current stream of the tensors' device."""
        driver = triton_runtime()[0].active
        index = current = driver.get_current_device()
        if self._device.index is not None:
            index = self._device.index
        with nullcontext() if index == current else torch.cuda.device(index):
            stream = driver.get_current_stream(index)
            pool: list[Any] = [None if t is None else t.data_ptr() for t in tensors]
            bases = [0 if b is None else b.data_ptr() for b in (kept, scratch)]
            bases += pool
            pool += [t.data_ptr() for t in returned]
            pool += [bases[buffer] + start for buffer, start in self._starts]
            pool += self._numbers
            for launch in self._launches:
                launch(stream, pool)


def _view(memory: Tensor | None, start: int, operand: Operand) -> Tensor:
    """A tensor inside a buffer of bytes."""
    assert memory is not None or operand.numel() == 0
    if memory is None:
        return torch.empty(operand.shape, dtype=operand.dtype)
    found = memory[start : start + operand.numel() * operand.dtype.itemsize]
    return found.view(operand.dtype).view(operand.shape)


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
    facts = tuple(map(facts_of, tensors)) if known is None else known
    key = (describe, choices, facts)
    plan = _plans.get(key)
    if plan is None:
        plan = Plan(tensors)
        describe(plan, *choices)
        plan.seal()
        plan.last_used = next(_clock)
        with _lock:
            if key not in _plans and len(_plans) >= PLANS:
                del _plans[min(_plans, key=lambda key: _plans[key].last_used)]
            _plans[key] = plan
    plan.last_used = next(_clock)
    return plan


def facts_of(tensor: Tensor | None) -> Hashable:
    """What a plan depends on of a tensor."""
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
