"""Call plans: what a call allocates and launches, worked out once and repeated in microseconds.

The host code of the kernels launches nothing itself. It describes a call to a :class:`Plan`, from
the tensors' shapes, strides and types alone: what is returned, what is kept for the backward, what
is scratch, and the launches in order. :func:`call` finds the plan by all that it depends on, takes
the memory (one allocation for what is kept and one for the scratch, however many tensors they hold)
and makes the launches.

A plan's first run goes through Triton's own front, which compiles; later ones go below Triton's
launcher, with addresses and numbers. The stream is looked up in every call and the tensors' device
is made the current one, so streams, several devices and CUDA graphs work as with the front. With
another Triton than those tried, with hooks on launches (a profiler's), and on GPUs other than
NVIDIA's, every launch goes through the front (:func:`.launch.launcher`).
"""

from __future__ import annotations

import functools
import itertools
import operator
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ept_fast.backends.fused import target
from ept_fast.backends.triton.launch import (
    hooked,
    launch_of,
    launcher,
    leaves,
    run,
    triton_runtime,
)

__all__ = [
    "PLANS",
    "Add",
    "Launch",
    "Operand",
    "Plan",
    "call",
    "facts_of",
    "forget",
    "layouts_of",
    "plan_of",
    "plans",
    "rounded",
]

PLANS = 512  # that are kept; the one that was not used for longest goes first
_ALIGNMENT = 16  # bytes: what Triton's front distinguishes, and the widest access
# Where an operand is: among the inputs, the tensors returned, or the pieces of buffers. And the
# buffers: what is kept, the scratch, and then the inputs.
_INPUTS, _RETURNED, _PIECES = range(3)
_KEPT, _SCRATCH, _FIRST_INPUT = range(3)
_SAME: Any = nullcontext()  # the device is the current one


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor of a call as host code sees it; its methods are as a tensor's.

    Attributes:
        place: where a run finds it: of which list, and at which index.
        shape, strides, dtype: of the tensor.
    """

    place: tuple[int, int]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def contiguous(
        cls, place: tuple[int, int], shape: Sequence[int], dtype: torch.dtype
    ) -> Operand:
        """One without gaps."""
        strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
        return cls(place, tuple(shape), strides, dtype)

    def stride(self) -> tuple[int, ...]:
        return self.strides

    def numel(self) -> int:
        return prod(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def unsqueeze(self, dim: int) -> Operand:
        assert dim == 0
        return Operand(self.place, (1, *self.shape), (1, *self.strides), self.dtype)


Tensors = Sequence[Tensor | None]
# Makes an operand of a shape and type, or finds it in memory that another call has kept.
Add = Callable[[Sequence[int], torch.dtype], Any]


class Launch(NamedTuple):
    """One launch: the kernel, programs of the grid, its arguments by name, compiler's options."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, Any]


def rounded(size: int) -> int:
    """The bytes that a piece of so many takes."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class Plan:
    """What one call allocates and launches. Host code fills it; a run carries it out.

    Args:
        inputs: the call's tensors; None for those that are absent.
    """

    def __init__(self, inputs: Tensors) -> None:
        self.device = next(t.device for t in inputs if t is not None)
        self.inputs: list[Any] = [
            None if t is None else Operand((_INPUTS, i), t.shape, t.stride(), t.dtype)
            for i, t in enumerate(inputs)
        ]
        self._empty = functools.partial(torch.empty, device=self.device)
        self.last_used = 0
        self.launches: list[Launch] = []
        self._returned: list[Operand] = []
        self._pieces: list[tuple[int, int, Operand]] = []  # buffer, where in it, tensor
        self._sizes = [0, 0]  # bytes of what is kept and of the scratch, so far
        self._most_scratch = 0
        self._direct: list[Any] = []  # the launches without Triton's front
        # Of those: tensors without memory, which a run's are made like, in a third of the time.
        self._like_returned: list[Tensor] = []
        self._like_buffers: list[Tensor | None] = []
        self._numbers: list[Any] = []

    # For host code

    def returned(self, shape: Sequence[int], dtype: torch.dtype) -> Operand:
        """A new tensor that the call returns."""
        found = Operand.contiguous((_RETURNED, len(self._returned)), shape, dtype)
        self._returned.append(found)
        return found

    def returned_like(self, operand: Operand) -> Operand:
        """A new tensor of an input's shape and type, without gaps, that the call returns."""
        return self.returned(operand.shape, operand.dtype)

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
        found = Operand.contiguous((_PIECES, len(self._pieces)), shape, dtype)
        self._pieces.append((buffer, self._sizes[buffer], found))
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
        if programs > 0:
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

    def carry_out(self, tensors: Tensors) -> tuple[list[Tensor], Tensor | None]:
        """Allocate and launch, for tensors that the plan is of.

        Returns:
            The tensors returned, and the memory of what is kept; None if nothing is.
        """
        if self._direct:
            returned = [torch.empty_like(t) for t in self._like_returned]
            buffers = [None if t is None else torch.empty_like(t) for t in self._like_buffers]
        else:
            returned, buffers = self._new_tensors()
        if self._direct and not hooked():
            self._launch_directly(tensors, returned, buffers)
        else:
            self.launch_all(tensors, returned, buffers)
        return returned, buffers[_KEPT]

    def _new_tensors(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """The tensors returned, and the buffers; None for those without bytes."""
        new = self._empty
        returned = [new(each.shape, dtype=each.dtype) for each in self._returned]
        return returned, [new(size, dtype=torch.uint8) if size else None for size in self.sizes]

    def launch_all(self, tensors: Tensors, returned: list[Tensor], buffers: Tensors) -> None:
        """Launch through Triton's front, and keep what it compiled for the runs to come."""
        memory = [*buffers, *tensors]
        pieces = [_view(memory[buffer], start, each) for buffer, start, each in self._pieces]
        places: tuple[Tensors, ...] = (tensors, returned, pieces)

        def resolved(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(resolved, value))
            return places[value.place[0]][value.place[1]] if isinstance(value, Operand) else value

        compiled = []
        for kernel, programs, arguments, options in self.launches:
            given = {name: resolved(value) for name, value in arguments.items()}
            compiled.append(run(kernel, programs, self.device, **given, **options))
        if not self._direct and launcher()[0] and target(self.device).startswith("sm_"):
            self._keep(compiled)

    def _keep(self, compiled: Sequence[Any]) -> None:
        """Prepare the launches without the front.

        A run lays all addresses and numbers of the call side by side, in the order of their places
        and then the numbers; each launch picks its arguments from them by their slots.
        """
        counts = len(self.inputs), len(self._returned), len(self._pieces)
        offsets = [0, *itertools.accumulate(counts)]

        def slot(value: Any) -> int:
            if isinstance(value, Operand) and value.numel():
                return offsets[value.place[0]] + value.place[1]
            # The address of an empty tensor is 0, also inside a buffer.
            self._numbers.append(0 if isinstance(value, Operand) else value)
            return offsets[-1] + len(self._numbers) - 1

        self._numbers = []
        direct = []
        for launch, made in zip(self.launches, compiled, strict=True):
            found = launch_of(made, launch.programs)
            if found is None:
                return
            values = list(leaves(tuple(launch.arguments.values())))
            direct.append((found[0], operator.itemgetter(*(slot(values[i]) for i in found[1]))))
        self._like_returned, self._like_buffers = self._new_tensors()
        for each in (*self._like_returned, *self._like_buffers):
            if each is not None:
                each.untyped_storage().resize_(0)
        self._direct = direct

    def _launch_directly(self, tensors: Tensors, returned: list[Tensor], buffers: Tensors) -> None:
        """Make the launches, in order, on the current stream of the tensors' device."""
        driver = triton_runtime()[0].active
        current = driver.get_current_device()
        index = current if self.device.index is None else self.device.index
        with _SAME if index == current else torch.cuda.device(index):
            stream = driver.get_current_stream(index)
            pool: list[Any] = [None if t is None else t.data_ptr() for t in tensors]
            bases = [0 if b is None else b.data_ptr() for b in buffers] + pool
            pool += [t.data_ptr() for t in returned]
            pool += [bases[buffer] + start for buffer, start, _ in self._pieces]
            pool += self._numbers
            for launch, pick in self._direct:
                launch(stream, pick(pool))


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
    tensors: Tensors,
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
    facts = facts_of(tensors) if known is None else known
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


def facts_of(tensors: Tensors) -> tuple[Hashable, ...]:
    """What a plan depends on of tensors."""
    return tuple(
        [
            t if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % _ALIGNMENT)
            for t in tensors
        ]
    )


def layouts_of(tensors: Tensors) -> tuple[Hashable, ...]:
    """What of tensors may be another in the backward than in the forward, which saved them: hooks
    (torch.autograd.graph.saved_tensors_hooks) keep their shapes, types and devices.
    """
    return tuple([t if t is None else (t.stride(), t.data_ptr() % _ALIGNMENT) for t in tensors])


def call(
    describe: Callable[..., None],
    tensors: Tensors,
    *choices: Any,
    known: Hashable = None,
) -> tuple[list[Tensor], Tensor | None]:
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
