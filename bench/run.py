"""One run of the benchmarks: its device, its clock, its floor, and the rows it leaves."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import parity, peers
from bench.environment import origin_of
from bench.inputs import DTYPES, Inputs, cotangent, make_inputs
from bench.models import Backbone
from bench.rows import Book, Row
from bench.shapes import Shape
from bench.timing import Clock, Work, floor_works, quantiles


@dataclass(frozen=True)
class Settings:
    """How a run measures.

    Attributes:
        quick: a smoke test: tiny sizes and few rounds; its times mean nothing.
        seconds: about how long the pairs of one row take.
        total: start no row after that many seconds; None: no limit.
        compiled: whether torch.compile takes part.
    """

    quick: bool
    seconds: float
    total: float | None
    compiled: bool
    folder: Path


@dataclass(frozen=True)
class Case:
    """One row to measure: an operation of :mod:`bench.peers`, at a shape, by a peer."""

    suite: str
    operation: str
    direction: str
    shape: Shape
    table: str
    peer: str

    @property
    def id(self) -> str:
        """The row's name in pytest."""
        parts = (self.operation, self.direction, self.shape.name, self.table, self.peer)
        return "-".join(part.replace(" ", "-") for part in parts)


@dataclass(frozen=True)
class ServingCase:
    """One row of inference: an operation at a shape, of a backbone if it has one, by a peer."""

    operation: str
    shape: Shape
    peer: str
    backbone: Backbone | None = None

    @property
    def id(self) -> str:
        """The row's name in pytest."""
        return "-".join((self.operation, self.shape.name, self.peer)).replace(" ", "-")


class Run:
    """What the rows of one run share; it holds the tensors of one shape at a time."""

    def __init__(self, device: torch.device, settings: Settings) -> None:
        self.device, self.settings = device, settings
        self.on_gpu = device.type == "cuda"
        fewest, most = (3, 3) if settings.quick else (7, 60)
        # Inputs take turns, so that a GPU's cache is cold.
        self.sets_of_inputs = 3 if self.on_gpu else 1
        self.clock = Clock(device, settings.seconds, fewest, most)
        self.book = Book(settings.folder)
        self.deadline = time.perf_counter() + (settings.total or float("inf"))
        self._held: dict[Any, Any] = {}
        self._held_for: Any = None

    @functools.cached_property
    def origin(self) -> dict[str, str]:
        """The columns of a row that say where, when and with what it was measured."""
        return origin_of(self.device)

    # What is kept between the rows of a shape

    def hold_for(self, key: Any) -> dict[Any, Any]:
        """A place for what rows with this key share; that of any other key is let go."""
        if key != self._held_for:
            self._held.clear()
            torch.compiler.reset()
            gc.collect()
            if self.on_gpu:
                torch.cuda.empty_cache()
            self._held_for = key
        return self._held

    def check_time(self) -> None:
        """Skip if the run's time is over; what was measured so far is on the disk."""
        if time.perf_counter() > self.deadline:
            pytest.skip("left out: the time of the run is over")

    # The floor

    @functools.cached_property
    def floor(self) -> tuple[float, float]:
        """Megabytes per millisecond of a copy, milliseconds of an empty launch."""
        quick = self.settings.quick
        rounds = 3 if quick else 15
        size = 1 << (22 if quick else 30 if self.on_gpu else 28)
        works = floor_works(self.device, size)
        p50 = {}
        for name, (work, moved) in works.items():
            p20, p50[name], p80 = quantiles(self.clock.alone_ms(work, rounds))
            row = Row(
                suite="floor",
                operation=name,
                shape=f"{moved // 2 >> 20} MiB" if moved else "",
                peer="torch" if moved or not self.on_gpu else "triton",
                rounds=rounds,
                floor_mb=moved / 1e6 or None,
                p20_ms=p20,
                p50_ms=p50[name],
                p80_ms=p80,
                **self.origin,
            )
            self.book.add(row)
        return works["copy"][1] / 1e6 / p50["copy"], p50["empty launch"]

    # Rows

    def row(
        self,
        benchmark: Any,
        case: Any,
        shape: Shape,
        check: Callable[[str], tuple[Any, float, str]],
        work_of: Callable[[Any], Work],
        *,
        floor_bytes: int | None = None,
        tokens: int | None = None,
        note: str = "",
        **columns: Any,
    ) -> Row | None:
        """Check a peer and ours, time them in pairs and keep the row.

        Args:
            case: with the row's ``id`` and its ``peer``.
            check: makes a peer by its name, and gives its error by what is allowed, and where that
                is. Rows that share what is held (``hold_for``) share this too.
            work_of: what is timed of it.
            floor_bytes: what has to be read and written once, if the peer does our work.
            tokens: real text tokens of a call.
            columns: of the row: what is done.

        Returns:
            The row; None if pytest-benchmark is off.

        Raises:
            AssertionError: a check is red; nothing is timed then.
        """
        names = peers.ours(self.device), case.peer
        for name in names:
            if name not in self._held:
                self._held[name] = check(name)
            parity.refuse_red(case.id, name, *self._held[name][1:])
        (ours, _, _), (peer, error, _) = (self._held[name] for name in names)
        speed, launch = self.floor
        group = (columns["operation"], columns["direction"], shape.name, columns["embeddings"])
        benchmark.group = " ".join(filter(None, group))
        timing = self.clock.pair(work_of(ours), work_of(peer), benchmark)
        if timing is None:
            return None
        columns |= {"shape": shape.name, "parameters": "float32", **shape.columns, **asdict(timing)}
        for end in ("", "_low", "_high"):
            columns[f"ours_to_peer{end}"] = columns.pop(f"ratio{end}")
        if floor_bytes is not None:
            floor_ms = max(floor_bytes / 1e6 / speed, launch)
            columns |= {"floor_mb": floor_bytes / 1e6, "floor_ms": floor_ms}
            columns["of_floor"] = floor_ms / timing.p50_ms
        if tokens is not None:
            columns["tokens_per_s"] = 1e3 * tokens / timing.p50_ms
        columns |= {"ours": names[0], "peer": names[1], "error": error}
        row = Row(**columns, note="; ".join(filter(None, (note, peer.note))), **self.origin)
        self.book.add(row)
        benchmark.extra_info.update(
            ours_to_peer=row.ours_to_peer, peak_mb=row.peak_mb, of_floor=row.of_floor
        )
        return row

    def operation_row(self, case: Case, benchmark: Any) -> Row | None:
        """As :meth:`row`, of an operation of :mod:`bench.peers`."""
        self.check_time()
        held = self.hold_for((case.operation, case.shape, case.table))
        if "inputs" not in held:
            held["inputs"] = make_inputs(
                case.shape, DTYPES[case.table], self.device, self.sets_of_inputs
            )
        sets: list[Inputs] = held["inputs"]

        def check(name: str) -> tuple[peers.Peer, float, str]:
            peer = peers.make(case.operation, name, sets[0])
            expected = held.get("expected") if peer.same_work else None
            if expected is None:
                expected = parity.expected_of(peer, sets[0])
            if peer.same_work:
                held["expected"] = expected
            return peer, *parity.check(peer, sets[0], expected)

        same_work = case.peer not in (peers.DEPT, peers.PEFT)
        moved = floor_bytes(case.operation, case.direction, case.shape, sets[0])
        return self.row(
            benchmark,
            case,
            case.shape,
            check,
            lambda peer: work_of(case.direction, peer, sets),
            floor_bytes=moved if same_work else None,
            suite=case.suite,
            operation=case.operation,
            direction=case.direction,
            embeddings="" if case.operation == "reconstruct" else case.table,
        )


def work_of(direction: str, peer: peers.Peer, sets: list[Inputs]) -> Work:
    """A peer's forward, backward or both, on sets of inputs that take turns."""
    grads: dict[Any, Tensor] = {}

    def chosen(i: int) -> Inputs:
        return sets[i % len(sets)]

    def gradients(state: tuple[Tensor, Inputs]) -> tuple[Tensor, ...]:
        out, inputs = state
        key = (out.shape, out.dtype)
        if key not in grads:
            grads[key] = cotangent(*key, out.device)
        return torch.autograd.grad(out, list(peer.leaves(inputs).values()), grads[key])

    if direction == "forward":
        return Work(chosen, peer.forward)
    if direction == "backward":
        return Work(lambda i: (peer.forward(chosen(i)), chosen(i)), gradients)
    return Work(chosen, lambda inputs: gradients((peer.forward(inputs), inputs)))


def floor_bytes(operation: str, direction: str, shape: Shape, inputs: Inputs) -> int:
    """What has to be read and written once; parameters of tasks that no row has are not read."""
    itemsize = inputs.weight.itemsize
    parameters = _bytes(inputs.parameters.values())
    offset = inputs.parameters["offset_a"], inputs.parameters["offset_b"]
    small = _bytes([inputs.prompt, *offset])
    used = small
    integers = [inputs.input_ids]
    if inputs.task_ids is not None:
        used = small * inputs.task_ids.unique().numel() // shape.tasks
        integers.append(inputs.task_ids)
    if inputs.attention_mask is not None:
        integers.append(inputs.attention_mask)
    length = shape.num_virtual_tokens + shape.length
    out = shape.batch * length * shape.hidden_size * itemsize
    rows = inputs.input_ids.unique().numel() * shape.hidden_size * itemsize
    parts = {
        ("reconstruct", "forward"): parameters + inputs.prompt.nbytes,
        ("reconstruct", "backward"): 2 * parameters + inputs.prompt.nbytes,
        ("splice", "forward"): out + rows + _bytes(integers) + used,
        ("splice", "backward"): out + used + small,
    }
    if operation == "prompt path":
        return sum(parts.values())
    return parts[operation, direction]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)
